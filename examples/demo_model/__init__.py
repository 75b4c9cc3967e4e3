"""A small FLUX-architecture text-to-image model, trained here from scratch on scenes we draw ourselves."""
