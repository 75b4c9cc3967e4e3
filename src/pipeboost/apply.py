"""One part of a pipeline and what is done to it. This is the only place where the features meet.

They are applied to each component in this order, and undone in reverse:

1. attention: the innermost change, a kernel inside the blocks' own processors;
2. parallel: shards what attention then sees, so it comes before anything that captures shapes;
3. quantize: replaces linears, which must happen before a graph of them exists;
4. cache: decides which blocks run, and must call blocks that compile can still stand in front of;
5. compile: captures what the blocks have become, and CUDA graphs what the forward has;
6. offload: moves finished modules;
7. reuse: stands before the encoders, whatever they have become;
8. stages: the outermost layers, which watch everything above.
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass
from typing import Any

from pipeboost.core.ledger import Ledger
from pipeboost.distributed import suspend_timeout
from pipeboost.features.attention import swap_attention, trim_padded_text
from pipeboost.features.cache import attach_cache
from pipeboost.features.compile import CompiledModel, Graphs, capture_graphs, compile_model
from pipeboost.features.offload import place
from pipeboost.features.parallel.rank_team import Team
from pipeboost.features.reuse import PromptReuse, reuse_prompts
from pipeboost.plan import Plan
from pipeboost.stages import watch


@dataclass(frozen=True)
class Part:
    """One component of a pipeline, or of a view of it, and what was done to it.

    It holds the component weakly: what the pipeline drops must free its memory at once.

    Attributes:
        path: of the component from the pipeline; empty for the pipeline itself.
        target: the component.
        ledger: undoes what was done.
        compiled, graphs: what there is to report of a transformer; None where it runs without.
        of_view: whether only a view of the pipeline has it.
    """

    path: str
    target: weakref.ref[Any]
    ledger: Ledger
    compiled: CompiledModel | None
    graphs: Graphs | None
    of_view: bool


def accelerate_part(
    path: str,
    obj: Any,
    plan: Plan,
    *,
    team: Team | None,
    prompts: PromptReuse | None,
    owner: object,
    of_view: bool,
) -> Part:
    """Do to one component what the plan says; an error leaves it as it was.

    Args:
        path: of the component from the pipeline; empty for the pipeline itself.
        team: the ranks that run the pipeline together; None for one rank.
        prompts: the embeddings that are kept; None where none are.
        owner: in whose calls the features act; it is not kept alive.
        of_view: whether only a view of the pipeline has it.
    """
    family, denoiser = plan.family, path in plan.family.denoisers
    compiled: CompiledModel | None = None
    graphs: Graphs | None = None
    with Ledger() as ledger, contextlib.nullcontext() if team is None else team.telling():
        if denoiser and plan["attention"].on:
            swap_attention(
                obj,
                plan["attention"].settings,
                ledger,
                tier=plan.quality,
                hardware=plan.hardware,
                right_padded=family.padded_text is not None and (team is None or team.across is None),
                across=None if team is None else team.across,
            )
            trim_padded_text(obj, family, ledger, at_least=1 if team is None else team.token_ranks)
        if team is not None:
            if denoiser:
                team.refuse_stock_processors(obj)
            team.share(path, obj, ledger, owner=owner)
        if denoiser and plan["cache"].on:
            position = family.denoisers.index(path)
            attach_cache(obj, plan["cache"].settings, family, ledger, owner=owner, position=position)
        if denoiser and plan["compile"].on:
            compiled = compile_model(obj, plan["compile"].settings, family, ledger, owner=owner)
        if denoiser and plan["graphs"].on:
            graphs = capture_graphs(obj, plan["graphs"].settings, ledger, owner=owner)
        if plan["offload"].on:
            with suspend_timeout("placing weights"):
                place(path, obj, plan["offload"].settings, family, ledger)
        if not path and prompts is not None:
            reuse_prompts(obj, prompts, ledger)
        watch(path, obj, family, ledger)
    return Part(path, weakref.ref(obj), ledger, compiled, graphs, of_view)
