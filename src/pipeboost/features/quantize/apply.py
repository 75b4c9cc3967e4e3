"""Puts the linears of a transformer's blocks in 8 bits."""

from __future__ import annotations

from pipeboost.contract.context import ApplyContext, Component
from pipeboost.contract.decision import Decision
from pipeboost.core.ledger import Ledger
from pipeboost.features.quantize.model import Counts, quantise_model, quantised_model, restore_before_pipe_reads


def apply(component: Component, decision: Decision, context: ApplyContext, ledger: Ledger) -> Counts | None:
    """Quantise a transformer.

    Raises:
        UnsupportedError: as `quantise_model`.
    """
    if not component.path:
        restore_before_pipe_reads(component.object, context.family, ledger)
    if not component.denoises:
        return None
    device = context.model.device
    return quantise_model(component.object, decision.settings, context.family, ledger, device=device).counts


def rebind(component: Component, decision: Decision, context: ApplyContext) -> None:
    """Quantise what was put back or replaced since.

    Raises:
        UnsupportedError: as `quantise_model`.
    """
    quantised = quantised_model(component.object) if component.denoises else None
    if quantised is not None:
        quantised.requantise()
