"""Attention on one device: which kernel runs, chosen per call, inside the blocks' own processors."""

from pipeboost.features.attention.choice import choose_kernel, explain_choice
from pipeboost.features.attention.padding import trim_padded_text
from pipeboost.features.attention.swap import (
    dispatcher_of,
    rebind_attention,
    refuse_stock_processors,
    swap_attention,
    swappable_processors,
)

__all__ = [
    "choose_kernel",
    "dispatcher_of",
    "explain_choice",
    "rebind_attention",
    "refuse_stock_processors",
    "swap_attention",
    "swappable_processors",
    "trim_padded_text",
]
