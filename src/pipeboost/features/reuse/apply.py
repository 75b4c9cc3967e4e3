"""Keeps the embeddings of prompts."""

from __future__ import annotations

from typing import Any

from pipeboost.contract.context import ApplyContext, Component
from pipeboost.contract.decision import Decision
from pipeboost.core.ledger import Ledger
from pipeboost.features.reuse.attach import PromptReuse


def join(pipe: Any, decision: Decision, context: ApplyContext, ledger: Ledger) -> PromptReuse:
    """Return what keeps the embeddings of a pipeline and its views."""
    prompts = PromptReuse(decision.settings, owner=context.owner, denoisers=context.family.denoisers)
    ledger.record("kept prompts", prompts.clear)
    return prompts


def apply(component: Component, decision: Decision, context: ApplyContext, ledger: Ledger) -> None:
    """Look prompts up before the pipeline encodes them."""
    if not component.path:
        ledger.add_middleware(component.object, "encode_prompt", context.joined["reuse"], place="pipe.reuse")
