"""The VAE: compiled where that pays, its convolutions and norms rewritten where they are a video's."""

from pipeboost.features.compile.vae.known_sizes import key_of
from pipeboost.features.compile.vae.rewrites import REWRITES, is_compiled, is_rewritable, rewrite_vae

__all__ = ["REWRITES", "is_compiled", "is_rewritable", "key_of", "rewrite_vae"]
