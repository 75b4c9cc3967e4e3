"""`Tuned`: the schedule that was found, what it was judged on, and everything else that was tried."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist, median
from typing import Any

from pipeboost.core.errors import ConfigurationError, MissingPackageError, UnsupportedError, quoted
from pipeboost.core.user_files import user_path
from pipeboost.quality.call_metrics import METRICS, Made, Measure
from pipeboost.tune.search import Schedule


@dataclass(frozen=True)
class Budget:
    """How near to stock's each result must be.

    Attributes:
        metric: name of a metric that compares with stock's.
        bound: the worst value that keeps the budget.
        measure: takes what a call made and what stock made of it; the metric's value.
    """

    metric: str
    bound: float
    measure: Measure = field(repr=False, compare=False)

    @classmethod
    def of(cls, text: str) -> Budget:
        """Read such as `psnr>=30`, `ssim>=0.95` or `lpips<=0.1`.

        Raises:
            ConfigurationError: it is no metric, `>=` or `<=`, and a number.
            MissingPackageError: a package or weights that the metric needs are not on this machine.
        """
        words = r"\s*([a-z]+)\s*(>=|<=)\s*(\d+\.?\d*|\.\d+)\s*"
        match = re.fullmatch(words, text) if isinstance(text, str) else None
        if match is None or _BUDGETS.get(match[1]) != match[2]:
            allowed = ", ".join(f"'{name}{sign}'" for name, sign in _BUDGETS.items())
            raise ConfigurationError(
                f"budget={quoted(text)} must be one of {allowed} and a number, as in 'psnr>=30', which is in dB"
            )
        return cls(match[1], float(match[3]), METRICS[match[1]].make())

    def require(self, stock: Made) -> None:
        """Refuse calls that make nothing which the metric can judge.

        Raises:
            UnsupportedError: these do.
        """
        if not METRICS[self.metric].applies(stock):
            raise UnsupportedError(f"budget='{self}' judges {METRICS[self.metric].asks}, and the calls make none")

    def merit(self, value: float) -> float:
        """Return a number that is the higher the better a value is."""
        return value if METRICS[self.metric].higher else -value

    def keeps(self, value: float) -> bool:
        """Whether a value keeps the budget."""
        return self.merit(value) >= self.merit(self.bound)

    def __str__(self) -> str:
        return f"{self.metric}{_BUDGETS[self.metric]}{self.bound:g}"


_BUDGETS = {
    name: ">=" if metric.higher else "<="
    for name, metric in METRICS.items()
    if metric.higher is not None and not metric.alone
}


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
        values: of the budget's metric, one for each prompt.
    """

    name: str
    forwards: int
    schedule: Schedule | None
    values: tuple[float, ...]

    def kept(self, budget: Budget) -> int:
        """Return how many prompts kept the budget."""
        return sum(map(budget.keeps, self.values))

    def share(self, budget: Budget) -> float:
        """Return the share of prompts that kept the budget."""
        return self.kept(budget) / len(self.values)

    def row(self, budget: Budget) -> str:
        """Return one line of a table."""
        low, high = interval(self.kept(budget), len(self.values))
        schedule = "" if self.schedule is None else f" {self.schedule}"
        form, worst = METRICS[budget.metric].form, min(self.values, key=budget.merit)
        return (
            f"{self.name:<9} {self.forwards:>3} forwards  kept {self.kept(budget)}/{len(self.values)} "
            f"({self.share(budget):.1%}, 95% interval {low:.1%} to {high:.1%})  worst {worst:{form}}  "
            f"median {median(self.values):{form}}{schedule}"
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
