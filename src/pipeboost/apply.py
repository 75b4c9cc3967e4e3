"""How a plan is applied: in which order the features join, change each component, and look at it again at each call.

The second of three recipes. Features join once a pipeline and are applied once a component, and undone in reverse.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

from pipeboost.contract.context import ApplyContext, Component, Counters
from pipeboost.core.ledger import Ledger
from pipeboost.features.attention import apply as attention
from pipeboost.features.cache import apply as cache
from pipeboost.features.compile import apply as compile
from pipeboost.features.compile.vae import apply as vae
from pipeboost.features.graphs import apply as graphs
from pipeboost.features.offload import apply as offload
from pipeboost.features.parallel import apply as parallel
from pipeboost.features.quantize import apply as quantize
from pipeboost.features.reuse import apply as reuse
from pipeboost.stages import instrument_component

JOIN: dict[str, Any] = {
    "parallel": parallel,  # ranks come together before anything is changed that they might not agree on
    "reuse": reuse,
}
APPLY: dict[str, Any] = {
    "attention": attention,  # the innermost change, a kernel inside the blocks' own processors
    "parallel": parallel,  # shards what attention then sees: before anything that captures shapes
    "quantize": quantize,  # replaces linears, which must happen before a graph of them exists
    "cache": cache,  # decides which blocks run, and calls blocks that compile can still stand in front of
    "compile": compile,  # captures what the blocks have become
    "vae": vae,  # computes otherwise what ranks may share
    "graphs": graphs,  # captures what the forward has become
    "offload": offload,  # moves finished modules
    "reuse": reuse,  # stands before the encoders, whatever they have become
}
REBIND = {name: feature for name, feature in APPLY.items() if hasattr(feature, "rebind")}


def join(pipe: Any, context: ApplyContext, ledger: Ledger) -> ApplyContext:
    """Let the features join, each rank being at this point of its program; return what they know from then on."""
    for name, feature in JOIN.items():
        if context.decisions[name].on:
            joined = feature.join(pipe, context.decisions[name], context, ledger)
            context = replace(context, joined={**context.joined, name: joined})
    team = context.joined.get("parallel")
    return context if team is None else replace(context, ranks=team.ranks)


def apply(component: Component, context: ApplyContext, ledger: Ledger) -> dict[str, Counters]:
    """Do to one component what the plan says; an error leaves it as it was.

    Returns:
        Feature → what it counts.
    """
    counters = {}
    reporting_errors = contextlib.nullcontext() if context.ranks is None else context.ranks.reporting_errors()
    with ledger, reporting_errors:
        for name, feature in APPLY.items():
            if context.decisions[name].on:
                counters[name] = feature.apply(component, context.decisions[name], context, ledger)
        instrument_component(component.path, component.object, context.family, ledger)
    return {name: counted for name, counted in counters.items() if counted is not None}


def rebind(component: Component, context: ApplyContext) -> None:
    """Take in what the user has replaced inside a component that features were applied to."""
    for name, feature in REBIND.items():
        if context.decisions[name].on:
            feature.rebind(component, context.decisions[name], context)
