"""Joins the ranks, and lets them share each component of the pipeline."""

from __future__ import annotations

from typing import Any

from pipeboost.contract.context import ApplyContext, Component
from pipeboost.contract.decision import Decision
from pipeboost.core.ledger import Ledger
from pipeboost.features.parallel.rank_team import RankTeam


def join(pipe: Any, decision: Decision, context: ApplyContext, ledger: Ledger) -> RankTeam:
    """Form the team of ranks; each of them is at this point of its program.

    Raises:
        UnsupportedError: the ranks planned differently, or cannot share what they were asked to.
    """
    team = RankTeam(pipe, context)
    ledger.record("ranks", team.mesh.close)
    return team


def apply(component: Component, decision: Decision, context: ApplyContext, ledger: Ledger) -> None:
    """Let the ranks share one component in the calls of the acceleration."""
    team: RankTeam = context.joined["parallel"]
    team.share(component.path, component.object, ledger, owner=context.owner)
