"""Finds the step schedule that computes the fewest forwards within a budget of quality, on the user's own prompts."""

from pipeboost.tune.tuned import Tuned
from pipeboost.tune.tuner import tune

__all__ = ["Tuned", "tune"]
