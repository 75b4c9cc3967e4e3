"""Which components wait on the host."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pipeboost.contract.decision import Decision, Decisions
from pipeboost.contract.model_info import ModelInfo
from pipeboost.core.config import AccelerationConfig, CompileConfig, OffloadConfig, ParallelConfig
from pipeboost.core.errors import ConfigurationError, UnsupportedError
from pipeboost.core.families import Family
from pipeboost.core.hardware import Hardware
from pipeboost.features.offload.budget import choose_policies
from pipeboost.features.offload.place import Placement


def decide(
    config: AccelerationConfig, model: ModelInfo, hardware: Hardware, family: Family, earlier: Decisions
) -> Decision:
    """Choose where each kind of component lives.

    Raises:
        ConfigurationError: it contradicts the tier or another setting.
        UnsupportedError: what was asked for needs what this machine or model does not have.
    """
    asked = config.offload
    if isinstance(asked, OffloadConfig) and asked.all_resident:
        return Decision("offload", "off", "components stay where they are")
    if model.offloaded:
        if isinstance(asked, OffloadConfig):
            raise UnsupportedError(
                f"offload={asked.policy!r} would fight Diffusers' own CPU offload, which is on; call "
                "pipe.remove_all_hooks() first, or use offload=None"
            )
        return Decision("offload", "off", "left as Diffusers' own CPU offload was set")
    if asked is None:
        return Decision("offload", "off", "turned off; components stay where they are")
    if asked == "auto" and (hardware.device == "cpu" or not model.components):
        why = "the pipeline is on the CPU" if hardware.device == "cpu" else "the size of the weights is not known"
        return Decision("offload", "off", f"components stay where they are: {why}")
    settings = OffloadConfig() if asked == "auto" else asked
    streams = not (isinstance(config.compile, CompileConfig) and config.compile.scope == "full")
    budget = hardware.memory if model.free is None else model.free
    policies, why = choose_policies(settings, model.components, model.activations, budget, streams=streams)
    if all(policy == "resident" for policy in policies.values()):
        return Decision("offload", "off", f"components stay where they are: {why}")
    if not streams and policies["transformers"] == "layerwise":
        raise ConfigurationError(
            "offload.transformers='layerwise' streams blocks, which compile='full' does not have; use 'regional'"
        )
    for component in model.components:
        if policies[component.kind] == "resident" or component.path not in model.unmovable:
            continue
        reason = f"{component.path}, which has {model.unmovable[component.path]}"
        if asked != "auto":
            raise UnsupportedError(f"offload cannot move {reason}; use offload=None")
        return Decision("offload", "off", f"components stay where they are, for it cannot move {reason}")
    if hardware.device == "cpu":
        why += "; on a CPU weights move within one memory, which saves nothing"
    where = ", ".join(f"{kind} {policy}" for kind, policy in policies.items())
    _refuse_moving_shares(where, policies, earlier["parallel"].settings)
    placement = Placement(model.device or torch.device(hardware.device), **policies)
    return Decision("offload", where, why, settings=placement)


def _refuse_moving_shares(choice: str, policies: Mapping[str, str], layout: ParallelConfig | None) -> None:
    if layout is None:
        return
    for kind in layout.split_kinds:
        if policies[kind] != "resident":
            raise UnsupportedError(
                f"tensor={layout.tensor} shares the weights of the {kind.replace('_', ' ')}, which "
                f"offload={choice!r} would move; use offload=None, or more ranks where they do not fit"
            )
