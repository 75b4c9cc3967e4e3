"""What a plan says of one feature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeboost.contract.model_info import ModelInfo
from pipeboost.core.errors import ConfigurationError


@dataclass(frozen=True)
class Decision:
    """What the plan says of one feature.

    Attributes:
        feature: its name: an argument of `accelerate_pipeline`, or `"graphs"` or `"vae"`, settings of its `compile`.
        choice: what is used, `"off"` where nothing is.
        why: the reason in a sentence.
        considered: the alternatives and what spoke against each.
        settings: what the feature is applied with; None where it is off.
        leaves: the model as later features see it; None where this one changes nothing of it.
    """

    feature: str
    choice: str
    why: str
    considered: tuple[str, ...] = ()
    settings: Any = None
    leaves: ModelInfo | None = None

    @property
    def on(self) -> bool:
        """Whether the feature is used."""
        return self.settings is not None


Decisions = Mapping[str, Decision]
"""Feature → what was decided, in the order of the plan."""


def needs_tier(feature: str, choice: object, tier: str, given: str) -> ConfigurationError:
    """Return the error for a setting that the tier does not allow."""
    return ConfigurationError(f"{feature}={choice!r} is not allowed in quality={given!r}; it needs quality={tier!r}")
