"""Joins the ranks, and lets them share each component of the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pipeboost.contract.context import ApplyContext, Component
from pipeboost.contract.decision import Decision
from pipeboost.contract.registry import text_encoder_sharding
from pipeboost.core.ledger import Ledger
from pipeboost.features.parallel.cancellation import agree_on_interrupts, agree_on_steps
from pipeboost.features.parallel.cfg_parallel import flush_deferred, share_branches
from pipeboost.features.parallel.rank_share import take_from_host
from pipeboost.features.parallel.rank_team import RankTeam
from pipeboost.features.parallel.sequence_parallel import shard_sequence
from pipeboost.features.parallel.tensor import guard_pipeline, shard_weights
from pipeboost.features.parallel.vae import parallelize_vae


def join(pipe: Any, decision: Decision, context: ApplyContext, ledger: Ledger) -> RankTeam:
    """Form the team of ranks; each of them is at this point of its program.

    Raises:
        UnsupportedError: they cannot share what they were asked to.
    """
    team = RankTeam(pipe, context)
    ledger.record("ranks", team.mesh.close)
    return team


def apply(component: Component, decision: Decision, context: ApplyContext, ledger: Ledger) -> None:
    """Let the ranks share one component in the calls of the acceleration."""
    team: RankTeam = context.joined["parallel"]
    family, mesh, path, obj = context.family, team.mesh, component.path, component.object
    if mesh.degree("tensor") > 1:
        sharding = family.tensor if component.denoises else None
        if path in team.text_encoders:
            sharding = text_encoder_sharding(obj)
        if sharding is not None:
            group = mesh.group("tensor")
            shard_weights(obj, sharding, group, ledger, ready=team.require_all, reporting=team.reporting)
            take_from_host(obj, mesh.device, ledger)
        if not path:
            guard_pipeline(obj, mesh.group("tensor"), ledger)
    if component.denoises and mesh.degree("cfg") > 1:
        share_branches(obj, family, ledger)
    if component.denoises and team.across is not None:
        shard_sequence(obj, family, ledger)
    if not path:
        agree_on_interrupts(obj, ledger)
        if not mesh.main:
            ledger.add_middleware(obj, "progress_bar", _hide_progress_bar, place="pipe.parallel")
    if path == "scheduler":
        flush_deferred(obj, ledger)
        agree_on_steps(obj, ledger)
    if path and path == family.guider:
        flush_deferred(obj, ledger, method="__call__")
    if path == "vae" and decision.settings.shares_vae(context.tier):
        parallelize_vae(obj, family.autoencoder, ledger, owner=context.owner)
    if isinstance(obj, nn.Module):  # whose weights have been split where they are to be
        team.state.watch(obj, ledger)


def _hide_progress_bar(call_next: Callable[..., Any], pipe: Any, *args: Any, **kwargs: Any) -> Any:
    """Hide all progress bars but one for the ranks of a sample, unless the user has said whether they are shown."""
    before = getattr(pipe, "_progress_bar_config", {})
    try:
        pipe._progress_bar_config = {"disable": True, **before}
        return call_next(*args, **kwargs)
    finally:
        pipe._progress_bar_config = before
