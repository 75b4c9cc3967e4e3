"""Captures the forward of a transformer as CUDA graphs."""

from __future__ import annotations

from pipeboost.contract.context import ApplyContext, Component
from pipeboost.contract.decision import Decision
from pipeboost.core.ledger import Ledger
from pipeboost.features.graphs.graphs import Graphs, capture_graphs


def apply(component: Component, decision: Decision, context: ApplyContext, ledger: Ledger) -> Graphs | None:
    """Replay a transformer's forward in the calls of the acceleration, where it can be captured."""
    if not component.denoises:
        return None
    return capture_graphs(component.object, decision.settings, ledger, owner=context.owner)
