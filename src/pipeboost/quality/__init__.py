"""Judges a whole generation: how far it is from stock, and how fast."""

from pipeboost.quality.parity import Verification, psnr, relative_error, verify_acceleration

__all__ = ["Verification", "psnr", "relative_error", "verify_acceleration"]
