"""What a feature may know while it is applied."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeboost.contract.decision import Decisions
from pipeboost.contract.model_info import ModelInfo
from pipeboost.core.families import Family
from pipeboost.core.hardware import Hardware
from pipeboost.distributed import Mesh


@dataclass(frozen=True)
class Component:
    """One object of a pipeline that features are applied to.

    Attributes:
        path: from the pipeline; empty for the pipeline itself.
        object: the component.
        denoises: whether it is one of the family's transformers.
    """

    path: str
    object: Any
    denoises: bool


@dataclass(frozen=True)
class RankContext:
    """The ranks that run the pipeline together, as other features see them.

    Attributes:
        mesh: the ranks.
        attention: attention among the tokens of all ranks; None where each rank has all tokens.
        token_ranks: how many ranks share the tokens.
        reporting_errors: inside it, an error is sent to the other ranks before anything is taken back.
    """

    mesh: Mesh
    attention: Any
    token_ranks: int
    reporting_errors: Callable[[], AbstractContextManager[None]]


class Counters(Protocol):
    """What a feature counts for the report."""

    def summary(self) -> dict[str, Any]:
        """Return the counts by name, as the report shows them."""


@dataclass(frozen=True)
class ApplyContext:
    """What a feature may know while it is applied.

    Attributes:
        decisions: of all features.
        tier: quality tier.
        family: the model family.
        hardware: what the pipeline runs on.
        model: the model as the last decision leaves it.
        acceleration: in whose calls the features act.
        ranks: the ranks that run the pipeline together; None for one rank.
        joined: feature → what its `join` returned.
    """

    decisions: Decisions
    tier: str
    family: Family
    hardware: Hardware
    model: ModelInfo
    acceleration: weakref.ref[Any]
    ranks: RankContext | None = None
    joined: Mapping[str, Any] = field(default_factory=dict)

    @property
    def owner(self) -> Any:
        """The acceleration in whose calls the features act; they must not keep it alive."""
        return self.acceleration()
