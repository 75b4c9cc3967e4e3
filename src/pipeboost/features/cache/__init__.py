"""Step caching: in some steps the transformer, or its middle blocks, do not run but are extrapolated."""
