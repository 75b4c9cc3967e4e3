"""Replaces linears; not in this version, whose `decide` refuses it."""

from __future__ import annotations

from pipeboost.contract.context import ApplyContext, Component
from pipeboost.contract.decision import Decision
from pipeboost.core.ledger import Ledger


def apply(component: Component, decision: Decision, context: ApplyContext, ledger: Ledger) -> None:
    """Fail: there is nothing to apply yet."""
    raise AssertionError("decide() of quantize is always off")
