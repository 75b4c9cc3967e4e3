"""`Budget`: how near to stock a result has to be, such as `psnr>=30`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from pipeboost.core.errors import ConfigurationError, quoted
from pipeboost.quality.metrics import psnr

METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {"psnr": psnr}
"""The larger the nearer; of a whole result, picture or video, to stock's."""


@dataclass(frozen=True)
class Budget:
    """A metric and the least that each result must reach."""

    metric: str
    least: float

    @classmethod
    def of(cls, text: str) -> Budget:
        """Read such as `psnr>=30`.

        Raises:
            ConfigurationError: it is no metric of `METRICS`, `>=` and a number.
        """
        match = re.fullmatch(r"\s*([a-z]+)\s*>=\s*([0-9.]+)\s*", text) if isinstance(text, str) else None
        if match is None or match[1] not in METRICS or match[2].count(".") > 1:
            raise ConfigurationError(
                f"budget={quoted(text)} must be one of {', '.join(METRICS)}, then '>=' and a number, as in 'psnr>=30'"
            )
        return cls(match[1], float(match[2]))

    def __str__(self) -> str:
        return f"{self.metric}>={self.least:g}"

    def measure(self, ours: np.ndarray, stock: np.ndarray) -> float:
        """Return how near a result is to stock's."""
        return METRICS[self.metric](ours, stock)


def interval(kept: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval for a share, of which `kept` of `of` were seen."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, spread = kept / of, z * z / of
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / of + spread / (4 * of)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
