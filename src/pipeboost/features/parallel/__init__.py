"""Parallel: several ranks share one call of a pipeline: guidance branches, tokens, weights, the VAE."""
