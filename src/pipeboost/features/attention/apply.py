"""Swaps the attention processors of a transformer, and cuts padded text."""

from __future__ import annotations

from pipeboost.contract.context import ApplyContext, Component
from pipeboost.contract.decision import Decision
from pipeboost.core.ledger import Ledger
from pipeboost.features.attention.padding import trim_padded_text
from pipeboost.features.attention.swap import rebind_attention, refuse_stock_processors, swap_attention


def apply(component: Component, decision: Decision, context: ApplyContext, ledger: Ledger) -> None:
    """Swap the attention of a transformer.

    Raises:
        UnsupportedError: several ranks share the tokens, and a processor of a block stays stock.
    """
    if not component.denoises:
        return
    family, ranks = context.family, context.ranks
    swap_attention(
        component.object,
        decision.settings,
        ledger,
        tier=context.tier,
        hardware=context.hardware,
        right_padded=family.padded_text is not None and (ranks is None or ranks.attention is None),
        across=None if ranks is None else ranks.attention,
    )
    trim_padded_text(component.object, family, ledger, at_least=1 if ranks is None else ranks.token_ranks)
    _refuse_partial_attention(component, context)


def rebind(component: Component, decision: Decision, context: ApplyContext) -> None:
    """Swap processors that the user has set since.

    Raises:
        UnsupportedError: as `apply`.
    """
    if component.denoises:
        rebind_attention(component.object)
        _refuse_partial_attention(component, context)


def _refuse_partial_attention(component: Component, context: ApplyContext) -> None:
    if context.ranks is not None and context.ranks.attention is not None:
        refuse_stock_processors(component.object, [blocks.path for blocks in context.family.blocks])
