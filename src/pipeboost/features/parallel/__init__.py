"""Parallel: several ranks share one call of a pipeline: guidance branches, tokens, weights, the VAE."""

from pipeboost.parallel.attend import AcrossRanks
from pipeboost.parallel.batch import share_batch
from pipeboost.parallel.branches import apart, callback_apart, settle_branches, share_branches
from pipeboost.parallel.first_step import check_first_step
from pipeboost.parallel.layout import (
    Ranks,
    beside_in_words,
    check_layout,
    choose_layout,
    layout_in_words,
    shares_text_encoders,
    shares_vae,
)
from pipeboost.parallel.stops import agree_on_interrupts, agree_on_stops
from pipeboost.parallel.tensor import bytes_on_other_ranks, shard_weights, split_bytes, tensor_degrees
from pipeboost.parallel.tensor_guards import guard_pipeline
from pipeboost.parallel.tokens import shard_tokens
from pipeboost.parallel.vae import parallelize_vae

__all__ = [
    "AcrossRanks",
    "Ranks",
    "agree_on_interrupts",
    "agree_on_stops",
    "apart",
    "beside_in_words",
    "bytes_on_other_ranks",
    "callback_apart",
    "check_first_step",
    "check_layout",
    "choose_layout",
    "guard_pipeline",
    "layout_in_words",
    "parallelize_vae",
    "settle_branches",
    "shard_tokens",
    "shard_weights",
    "share_batch",
    "share_branches",
    "shares_text_encoders",
    "shares_vae",
    "split_bytes",
    "tensor_degrees",
]
