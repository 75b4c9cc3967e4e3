"""Compiles the blocks of a transformer."""

from __future__ import annotations

from pipeboost.contract.context import ApplyContext, Component
from pipeboost.contract.decision import Decision
from pipeboost.core.ledger import Ledger
from pipeboost.features.compile.model import CompiledModel, compile_model


def apply(component: Component, decision: Decision, context: ApplyContext, ledger: Ledger) -> CompiledModel | None:
    """Run a transformer compiled in the calls of the acceleration; it is compiled when it is first called.

    Raises:
        UnsupportedError: as `compile_model`.
    """
    if not component.denoises:
        return None
    return compile_model(component.object, decision.settings, context.family, ledger, owner=context.owner)
