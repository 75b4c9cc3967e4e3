"""Parallel: several ranks share one call of a pipeline: guidance branches, tokens, weights, the VAE."""

from pipeboost.features.parallel.cancellation import agree_on_interrupts, agree_on_stops
from pipeboost.features.parallel.cfg_batch import share_batch
from pipeboost.features.parallel.cfg_parallel import apart, callback_apart, settle_branches, share_branches
from pipeboost.features.parallel.latent_check import check_first_step
from pipeboost.features.parallel.layout import (
    Ranks,
    check_layout,
    choose_layout,
    layout_in_words,
)
from pipeboost.features.parallel.running_state import RunningState
from pipeboost.features.parallel.sequence_parallel import shard_tokens
from pipeboost.features.parallel.tensor import bytes_on_other_ranks, shard_weights, split_bytes, tensor_degrees
from pipeboost.features.parallel.tensor_guards import guard_pipeline
from pipeboost.features.parallel.ulysses_ring import AcrossRanks
from pipeboost.features.parallel.vae import parallelize_vae

__all__ = [
    "AcrossRanks",
    "Ranks",
    "RunningState",
    "agree_on_interrupts",
    "agree_on_stops",
    "apart",
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
    "split_bytes",
    "tensor_degrees",
]
