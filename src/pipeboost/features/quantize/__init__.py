"""Linears in 8 bits: which, how they compute, and the way back."""

from pipeboost.features.quantize.select import of_original, quantizable

__all__ = ["of_original", "quantizable"]
