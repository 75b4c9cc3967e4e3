"""`Tuned`: the schedule that was found, what it was judged on, and everything else that was tried."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, median
from typing import Any

from pipeboost.core.errors import ConfigurationError, MissingPackageError, quoted
from pipeboost.core.user_files import user_path
from pipeboost.tune.search import Schedule


@dataclass(frozen=True)
class Budget:
    """The least PSNR that each result must have to stock's, in dB."""

    least: float

    @classmethod
    def of(cls, text: str) -> Budget:
        """Read such as `psnr>=30`.

        Raises:
            ConfigurationError: it is not `psnr>=` and a number.
        """
        match = re.fullmatch(r"\s*psnr\s*>=\s*(\d+\.?\d*|\.\d+)\s*", text) if isinstance(text, str) else None
        if match is None:
            raise ConfigurationError(f"budget={quoted(text)} must be 'psnr>=' and a number of dB, as in 'psnr>=30'")
        return cls(float(match[1]))

    def __str__(self) -> str:
        return f"psnr>={self.least:g}"


def interval(kept: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval for a share, of which `kept` of `of` were seen."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, spread = kept / of, z * z / of
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / of + spread / (4 * of)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Judged:
    """One way to make a picture, and how near each of some prompts' pictures was to stock's.

    Attributes:
        name: `"schedule"`, or `"stock"` with fewer steps.
        forwards: of the transformer for each guidance branch; where the second one is gated, the mean of both.
        schedule: which were computed; None for stock.
        values: PSNR to stock's in dB, one for each prompt.
    """

    name: str
    forwards: int
    schedule: Schedule | None
    values: tuple[float, ...]

    def kept(self, budget: Budget) -> int:
        """Return how many prompts kept the budget."""
        return sum(value >= budget.least for value in self.values)

    def share(self, budget: Budget) -> float:
        """Return the share of prompts that kept the budget."""
        return self.kept(budget) / len(self.values)

    def row(self, budget: Budget) -> str:
        """Return one line of a table."""
        low, high = interval(self.kept(budget), len(self.values))
        schedule = "" if self.schedule is None else f" {self.schedule}"
        return (
            f"{self.name:<9} {self.forwards:>3} forwards  kept {self.kept(budget)}/{len(self.values)} "
            f"({self.share(budget):.1%}, 95% interval {low:.1%} to {high:.1%})  worst {min(self.values):.1f}  "
            f"median {median(self.values):.1f}{schedule}"
        )


@dataclass(frozen=True)
class Tuned:
    """What `Acceleration.tune` found.

    Attributes:
        budget: that was asked for.
        share: of the prompts that was to keep it.
        steps: denoising steps of stock.
        best: the schedule, judged on the held-out prompts.
        rival: stock with as many forwards, judged on the same.
        tried: schedules and stock with fewer steps, on the tuning prompts.
        pipeline: class name of the pipeline.
        latents: elements of what the transformer returned for one sample.
    """

    budget: Budget
    share: float
    steps: int
    best: Judged
    rival: Judged
    tried: tuple[Judged, ...]
    pipeline: str
    latents: int

    @property
    def kept(self) -> bool:
        """Whether the share of held-out prompts that was asked for kept the budget."""
        return self.best.share(self.budget) >= self.share

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `accelerate_pipeline`, of plain types."""
        assert self.best.schedule is not None
        tuned_on = {"pipeline": self.pipeline, "latents": self.latents}
        return {"quality": "fast", "cache": self.best.schedule.settings(self.steps) | tuned_on}

    def __str__(self) -> str:
        verdict = "kept" if self.kept else "NOT kept"
        return "\n".join(
            [
                f"budget {self.budget} for {self.share:.0%} of prompts: {verdict} on {len(self.best.values)} prompts "
                f"that the search did not see, with {self.best.forwards} of {self.steps} forwards",
                f"  {self.best.row(self.budget)}",
                f"  {self.rival.row(self.budget)}",
                f"tried on {len(self.tried[0].values)} other prompts:",
                *(f"  {each.row(self.budget)}" for each in self.tried),
            ]
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the settings as a YAML file, which `config=` reads.

        Raises:
            ConfigurationError: there can be no such file.
        """
        import yaml

        text = "".join(f"# {line}\n" for line in str(self).splitlines())
        text += yaml.safe_dump(self.settings, sort_keys=False)
        user_path(path, "path").write_text(text)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the share of prompts that kept the budget over the forwards, schedules and stock; needs matplotlib.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingPackageError("plots need matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        lines = ("schedule", "o", "computed steps, extrapolated between"), ("stock", "s", "stock with fewer steps")
        for name, marker, label in lines:
            best: dict[int, float] = {}
            for each in (*self.tried, self.best, self.rival):
                if each.name == name:
                    best[each.forwards] = max(best.get(each.forwards, 0.0), each.share(self.budget))
            axes.plot(sorted(best), [best[forwards] for forwards in sorted(best)], marker, ls="-", label=label)
        axes.axhline(self.share, color="0.6", ls=":")
        axes.set(xlabel=f"forwards (stock: {self.steps})", ylabel=f"prompts with {self.budget}", ylim=(0, 1.02))
        axes.legend()
        figure.savefig(Path(path))
