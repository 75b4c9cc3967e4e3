"""Layout: how many ranks along each axis of the mesh, chosen or checked before anything changes."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipeboost.contract.model_info import ModelInfo
from pipeboost.core.config import ParallelConfig, tier_allows
from pipeboost.core.errors import ConfigurationError, UnsupportedError
from pipeboost.core.families import Family
from pipeboost.features.parallel.rank_share import of_one_rank

_FOR_WEIGHTS = 0.8
"""Share of a device's memory that weights may take."""
DEGREES = ("replicas", "cfg", "ulysses", "ring", "tensor")


@dataclass(frozen=True)
class Ranks:
    """What a layout depends on, besides what was asked for.

    Attributes:
        count: ranks of the group that runs the pipeline.
        family: the model family.
        model: of one rank that has it all.
        tier: the quality tier.
        attention: whether its attention processors call our dispatcher.
        free: bytes a rank's device could hold; None where that is not known.
    """

    count: int
    family: Family
    model: ModelInfo
    tier: str
    attention: bool
    free: int | None = None

    def fit(self, tensor: int) -> bool:
        """Whether the weights fit on a rank, with room for activations, where so many share them.

        Whole weights of other components can wait elsewhere; those that ranks share cannot.
        """
        if self.free is None:
            return True
        denoisers = [each.nbytes for each in self.model.components if each.path in self.family.denoisers]
        shared = ParallelConfig(tensor=tensor)
        return (sum(denoisers) if tensor == 1 else of_one_rank(self.model, shared).weights) <= _FOR_WEIGHTS * self.free


def choose_layout(ranks: Ranks) -> tuple[ParallelConfig, str, tuple[str, ...]]:
    """Return the layout that `parallel="auto"` takes, why, and what was considered.

    Guidance branches come first, which exchange least; then heads, then tokens around a ring; weights are shared where
    they do not fit, by as few ranks as will do, and where even all are too few they are left whole, which can wait on
    the host.

    Raises:
        UnsupportedError: this pipeline cannot use that many ranks.
    """
    # A second cfg rank needs a second branch; sharing weights exchanges most, so it is for those that do not fit.
    candidates = [
        layout
        for layout in _layouts(ranks.count)
        if layout.replicas == 1
        and (layout.cfg == 1 or ranks.family.guided)
        and (layout.tensor == 1 or not ranks.fit(1))
    ]
    allowed = [layout for layout in candidates if _objection(layout, ranks) is None]
    layout = min(
        allowed or candidates, key=lambda each: (not ranks.fit(each.tensor), -each.cfg, each.tensor, -each.ulysses)
    )
    try:
        check_layout(layout, ranks)
    except (ConfigurationError, UnsupportedError) as refusal:
        raise _none_suits(ranks, refusal) from None
    reasons = []
    if layout.cfg > 1 and ranks.family.batched is None:
        reasons.append("each rank computes a guidance branch (without guidance in a call, half of them wait)")
    elif layout.cfg > 1:
        reasons.append(
            "each rank computes its part of a step's batch of guidance branches (where guidance is off, as in calls of "
            "distilled models, one prompt is computed whole by every rank: nothing is gained)"
        )
    if layout.tensor > 1:
        reasons.append("the weights do not fit on one device")
    if layout.ulysses > 1:
        reasons.append(f"{ranks.model.heads} heads divide by {layout.ulysses}")
    if layout.ring > 1:
        reasons.append("the remaining ranks pass keys and values around")
    considered = [
        f"{describe_layout(other)}: {reason}"
        for other, reason in (
            (ParallelConfig(ring=ranks.count), "moves more bytes than Ulysses"),
            (ParallelConfig(tensor=ranks.count), "two sums of all tokens a block; for weights that do not fit"),
        )
        if other != layout and _objection(other, ranks) is None
    ]
    return layout, "; ".join(reasons), tuple(considered)


def check_layout(layout: ParallelConfig, ranks: Ranks) -> None:
    """Refuse a layout that this pipeline and these ranks cannot have.

    Raises:
        ConfigurationError: the product of the degrees is not the number of ranks, or the tier does not allow one.
        UnsupportedError: the model cannot be shared like this.
    """
    degrees = describe_layout(layout)
    if layout.size != ranks.count:
        there = "there is 1 rank" if ranks.count == 1 else f"there are {ranks.count} ranks"
        raise ConfigurationError(f"ParallelConfig({degrees}) is for {layout.size} ranks, and {there}{_way_out(ranks)}")
    if layout.vae is True and not layout.shares_vae(ranks.tier):
        raise ConfigurationError(f"parallel.vae=True changes rounding, which quality={ranks.tier!r} does not allow")
    if layout.text_encoder is True and layout.tensor == 1:
        raise ConfigurationError(
            "parallel.text_encoder=True is for tensor ranks, and tensor=1; use 'auto', then the first rank encodes"
        )
    objection = _objection(layout, ranks)
    if objection is not None:
        error = ConfigurationError if "quality" in objection else UnsupportedError
        raise error(f"ParallelConfig({degrees}): {objection}{_way_out(ranks)}")


def describe_layout(layout: ParallelConfig) -> str:
    """Describe a layout, such as `cfg=2, ulysses=2`."""
    named = [f"{name}={getattr(layout, name)}" for name in DEGREES if getattr(layout, name) > 1]
    return ", ".join(named) or "one rank"


def _objection(layout: ParallelConfig, ranks: Ranks) -> str | None:
    """Return the first degree that something speaks against, and what."""
    for axis in DEGREES[1:]:
        degree = getattr(layout, axis)
        against = None if degree == 1 else _against(ranks, axis, degree, tensor=layout.tensor)
        if against is not None:
            return f"{axis}={degree} {against}"
    return None


def _none_suits(ranks: Ranks, refusal: Exception) -> Exception:
    """Return what `parallel="auto"` raises: the layout that it came to last may be none that a user would think of."""
    if tier_allows(ranks.tier, "lossless"):
        return type(refusal)(f"parallel='auto' finds no layout for {ranks.count} ranks; of the last one, {refusal}")
    way_out = _way_out(ranks)
    with contextlib.suppress(ConfigurationError, UnsupportedError):
        choose_layout(replace(ranks, tier="lossless", attention=True))
        way_out = way_out.replace("; use ", "; use quality='lossless' or ", 1)
    return ConfigurationError(
        f"parallel='auto': {ranks.count} ranks cannot share {ranks.model.model} at quality={ranks.tier!r}, which "
        f"allows nothing but guidance branches that the script computes one after the other{way_out}"
    )


def _against(ranks: Ranks, axis: str, degree: int, *, tensor: int = 1) -> str | None:
    """Return what speaks against a degree, as the end of a sentence that begins with it."""
    family, model, heads = ranks.family, ranks.model.model, ranks.model.heads
    if axis == "cfg" and not family.pipelines:
        return f"is not known to be possible for {model} in this pipeline, which no family lists"
    if axis == "cfg" and family.prediction is not None:
        # A script combines its two predictions as soon as it has made them; a guider says when it has all of its.
        return None if degree == 2 or family.guider else f"is not 2, as many guidance branches as a step of {model} has"
    if axis == "cfg" and family.batched is None:
        return f"is not known to be possible for {model}"
    if not tier_allows(ranks.tier, "lossless"):
        return f"changes rounding, which quality={ranks.tier!r} does not allow"
    if axis == "cfg":
        return None
    if axis == "tensor":
        if family.tensor is None:
            return f"is not known to be possible for {model}"
        splits = ranks.model.degrees(family.denoisers)
        if splits is not None and degree not in splits:
            return f"does not divide the heads and widths of {model}"
    else:
        if family.token_sharding is None:
            return f"is not known to be possible for {model}"
        if not ranks.attention:
            return "needs attention processors that call pipeboost's dispatcher, so not attention=None"
    shared = {"ulysses": degree * tensor, "tensor": degree}.get(axis)
    if shared is not None and heads is not None and heads % shared:
        together = f" and tensor={tensor}" if axis == "ulysses" and tensor > 1 else ""
        return f"{together.removeprefix(' ') + ' ' if together else ''}does not divide the {heads} heads of {model}"
    return None


def _way_out(ranks: Ranks) -> str:
    fitting = [describe_layout(layout) for layout in _layouts(ranks.count) if _objection(layout, ranks) is None]
    if ranks.count == 1:
        return "; start more (torchrun --nproc-per-node), or use parallel=None"
    return f"; use {' or '.join(fitting[:4])}" if fitting else "; use parallel=None, then every rank runs by itself"


def _layouts(count: int) -> Iterator[ParallelConfig]:
    """Return all layouts of `count` ranks, those of one axis first; last those that share several samples."""
    divisors = [degree for degree in range(1, count + 1) if count % degree == 0]
    every = itertools.product(divisors, repeat=len(DEGREES))
    fitting = [each for each in every if math.prod(each) == count and each[0] < count and each[1] <= 2]
    for degrees in sorted(fitting, key=lambda each: (each[0], sum(degree > 1 for degree in each[1:]))):
        named: dict[str, Any] = dict(zip(DEGREES, degrees, strict=True))
        yield ParallelConfig(**named)
