"""Caches the blocks of a transformer."""

from __future__ import annotations

from pipeboost.contract.context import ApplyContext, Component
from pipeboost.contract.decision import Decision
from pipeboost.core.ledger import Ledger
from pipeboost.features.cache.attach import attach_cache, refuse_other_caches


def apply(component: Component, decision: Decision, context: ApplyContext, ledger: Ledger) -> None:
    """Let a cache decide in each step which blocks of a transformer run.

    Raises:
        PipeboostError: as `attach_cache`.
    """
    if component.denoises:
        family = context.family
        position = family.denoisers.index(component.path)
        attach_cache(component.object, decision.settings, family, ledger, owner=context.owner, position=position)


def rebind(component: Component, decision: Decision, context: ApplyContext) -> None:
    """Refuse a call with another cache beside ours.

    Raises:
        UnsupportedError: Diffusers' or cache-dit's own was turned on since.
    """
    if component.denoises:
        refuse_other_caches(component.object, context.family)
