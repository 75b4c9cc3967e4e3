"""Puts each component where it waits."""

from __future__ import annotations

from pipeboost.contract.context import ApplyContext, Component
from pipeboost.contract.decision import Decision
from pipeboost.core.ledger import Ledger
from pipeboost.distributed import suspend_timeout
from pipeboost.features.offload.place import place


def apply(component: Component, decision: Decision, context: ApplyContext, ledger: Ledger) -> None:
    """Put a component's weights where they wait between its stages.

    Raises:
        UnsupportedError: as `place`.
    """
    with suspend_timeout("placing weights"):
        place(component.path, component.object, decision.settings, context.family, ledger)
