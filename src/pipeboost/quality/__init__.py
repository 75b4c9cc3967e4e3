"""Judges a whole generation: how far it is from stock, and how fast."""

from pipeboost.quality.metrics import psnr, relative_error
from pipeboost.quality.verification import Verification
from pipeboost.quality.verify import verify_acceleration

__all__ = ["Verification", "psnr", "relative_error", "verify_acceleration"]
