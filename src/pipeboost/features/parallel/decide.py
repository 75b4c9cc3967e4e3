"""How the ranks share a call, and what one of them then has of the model."""

from __future__ import annotations

from dataclasses import replace

from pipeboost.contract.decision import Decision, Decisions
from pipeboost.contract.model_info import ModelInfo
from pipeboost.core.config import AccelerationConfig, CompileConfig, ParallelConfig
from pipeboost.core.errors import ConfigurationError
from pipeboost.core.families import Family
from pipeboost.core.hardware import Hardware
from pipeboost.features.parallel.layout import Ranks, check_layout, choose_layout, describe_layout
from pipeboost.features.parallel.rank_share import activations_of_one_rank, of_one_rank


def decide(
    config: AccelerationConfig, model: ModelInfo, hardware: Hardware, family: Family, earlier: Decisions
) -> Decision:
    """Choose the layout of the ranks.

    Raises:
        ConfigurationError: it contradicts the tier or another setting.
        UnsupportedError: what was asked for needs what this machine or model does not have.
    """
    asked = config.parallel
    given = asked if isinstance(asked, ParallelConfig) else None
    count = model.ranks if given is None or given.group is None else given.group.size()
    alone = f"each of the {count} ranks works by itself"
    if asked is None:
        return Decision("parallel", "off", f"turned off; {alone}" if count > 1 else "turned off")
    if count == 1 and (given is None or given.size == 1):
        return Decision("parallel", "off", "one process")
    ranks = Ranks(
        count=count,
        family=family,
        model=model,
        tier=config.quality,
        attention=earlier["attention"].on,
        free=hardware.memory if model.free is None and hardware.device == "cuda" else model.free,
    )
    considered: tuple[str, ...] = ()
    if given is not None:
        check_layout(given, ranks)
        layout, why = given, "as asked for"
    elif not family.shares_samples:
        return Decision("parallel", "off", f"no family tells how ranks could share {model.pipeline}; {alone}")
    else:
        layout, why, considered = choose_layout(ranks)
    scope = config.compile.scope if isinstance(config.compile, CompileConfig) else ""
    if layout.ulysses * layout.ring > 1 and scope == "full":
        raise ConfigurationError(
            "ranks share tokens outside the blocks, which compile='full' does not have; use 'regional'"
        )
    activations = activations_of_one_rank(model.activations, layout, config.quality)
    leaves = replace(of_one_rank(model, layout), activations=activations)
    return Decision("parallel", describe_layout(layout), why, considered, layout, leaves)
