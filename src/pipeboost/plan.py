"""The plan: configuration × hardware × family × model → what will be done, why, and what was considered.

The first of three recipes: the order in which the features decide. A decision sees the earlier ones, and the model as
these leave it. Making a plan changes nothing and loads nothing; whatever cannot be done is refused here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeboost.contract.decision import Decision, Decisions
from pipeboost.contract.model_info import ModelInfo
from pipeboost.contract.registry import family_of
from pipeboost.core.config import FEATURES, OFFLOAD_KINDS, AccelerationConfig, ParallelConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Activations, Family
from pipeboost.core.hardware import Hardware, detect_hardware
from pipeboost.distributed import announce, decline, rendezvous, world_size
from pipeboost.features.attention.decide import decide as decide_attention
from pipeboost.features.cache.decide import decide as decide_cache
from pipeboost.features.compile.decide import decide as decide_compile
from pipeboost.features.compile.vae.decide import decide as decide_vae
from pipeboost.features.graphs.decide import decide as decide_graphs
from pipeboost.features.offload.budget import describe_memory, in_gib, predict
from pipeboost.features.offload.decide import decide as decide_offload
from pipeboost.features.offload.place import execution_device
from pipeboost.features.parallel.decide import decide as decide_parallel
from pipeboost.features.parallel.rank_share import to_own_device
from pipeboost.features.quantize.decide import decide as decide_quantize
from pipeboost.features.reuse.decide import decide as decide_reuse
from pipeboost.kernels.table import available_kernels
from pipeboost.model_reader import model_info

_PLANS = "plans"

DECIDE = (
    decide_attention,
    decide_parallel,  # ranks share tokens only where attention is swapped; leaves one rank's share of the model
    decide_quantize,
    decide_cache,
    decide_compile,
    decide_offload,  # places what one rank has, and asks whether its blocks are compiled one by one
    decide_graphs,  # not where a cache decides on the host, or weights come and go
    decide_vae,  # compiled neither where ranks share it nor where its weights come block by block
    decide_reuse,  # not where ranks encode together
)


def make_plan(config: AccelerationConfig, hardware: Hardware, family: Family, model: ModelInfo) -> Plan:
    """Decide every feature.

    Raises:
        ConfigurationError: a setting contradicts the tier or another setting.
        UnsupportedError: a setting needs what this machine, model or version does not have.
        MissingPackageError: a setting needs a package that is not installed.
    """
    model = replace(model, activations=family.activations)
    decisions: dict[str, Decision] = {}
    for decide in DECIDE:
        decision = decide(config, model, hardware, family, decisions)
        decisions[decision.feature] = decision
        model = decision.leaves or model
    default = all(getattr(config, feature) == "auto" for feature in FEATURES)
    return Plan(config.quality, family, hardware, model, decisions, default)


@dataclass(frozen=True)
class Plan:
    """What `accelerate_pipeline` does to one pipeline on this machine.

    Attributes:
        model: as the last feature leaves it: of several ranks, what one of them has.
        default: whether every choice was left to the plan.
    """

    quality: str
    family: Family
    hardware: Hardware
    model: ModelInfo
    decisions: Decisions
    default: bool

    def __getitem__(self, feature: str) -> Decision:
        return self.decisions[feature]

    @property
    def features(self) -> frozenset[str]:
        """The names of the features that are on."""
        return frozenset(name for name, decision in self.decisions.items() if decision.on)

    @property
    def policies(self) -> Mapping[str, str]:
        """Kind of component → where it lives: `"resident"`, `"stage"` or `"layerwise"`."""
        return {kind: getattr(self["offload"].settings, kind, "resident") for kind in OFFLOAD_KINDS}

    @property
    def activations(self) -> Activations | None:
        """What the stages take besides weights, on this rank; None where no family says."""
        return self.model.activations

    @property
    def expected(self) -> str:
        """Expected speed, from our own measurements where this hardware and family were measured."""
        if not self.features - {"reuse", "vae"}:
            return "stock speed per step: nothing in this plan changes it"
        for measured in self.family.measured if self._is_as_measured else ():
            if measured.hardware in self.hardware.name and measured.tier == self.quality:
                return f"{measured.speedup:.2f}x per step over stock eager ({measured.workload}, {measured.source})"
        return "not measured on this hardware; pipe.acceleration.verify() and `pipeboost bench` measure it"

    @property
    def _is_as_measured(self) -> bool:
        """Whether it is the tier's own, with the kernels it prefers, and all weights on one device."""
        return (
            self.default
            and not self["offload"].on
            and not self["parallel"].on
            and self.model.dtype == torch.bfloat16
            and "flash3" in available_kernels(self.hardware)
        )

    @property
    def peaks(self) -> dict[str, int]:
        """Predicted peak bytes on the device in each stage, weights included; empty where the weights are not known."""
        if not self.model.components or self.model.offloaded:
            return {}
        return predict(self.model.components, self.policies, self.activations)

    @property
    def _weights(self) -> str:
        model = self.model
        if not self.peaks:
            return f"weights of {model.weighed} {in_gib(model.weights)}"
        # They were measured on a GPU; on a CPU, in float32, they are others.
        activations = self.activations if self.hardware.device == "cuda" else None
        return describe_memory(model.components, self.policies, activations, weighed=model.weighed)

    def __str__(self) -> str:
        free = self.model.free
        available = self.hardware.memory if free is None else free
        lines = [
            f"{self.model.pipeline} ({self.family.name} family) on {self.hardware}, quality={self.quality!r}",
            f"  memory    {self._weights}; {in_gib(available)} {'free' if free else 'in all'} on the device",
            f"  expected  {self.expected}",
        ]
        for decision in self.decisions.values():
            lines.append(f"  {decision.feature:<9} {decision.choice}: {decision.why}")
            lines.extend(f"  {'':<9}   considered {alternative}" for alternative in decision.considered)
        for path, name in self.model.stock_denoisers.items():
            lines.append(f"  stock     {path} ({name}), which steps call beside the transformer, stays stock")
        lines.extend(f"  missing   {item}" for item in self.family.missing)
        return "\n".join(lines)


def plan_for(pipe: Any, config: AccelerationConfig, *, anew: bool = False) -> Plan:
    """Return the plan for a pipeline where it is now.

    Args:
        anew: whether it was planned for before; then blocks that have hooks since run eager, also where compile was
            asked for.

    Raises:
        PipeboostError: as `make_plan`.
    """
    family = family_of(pipe)
    device = execution_device(pipe, config.offload)
    model = model_info(pipe, family, device)
    if anew and config.compile != "auto":
        model = replace(model, hooks=None)
    return make_plan(config, detect_hardware(device), family, model)


def agreed_plan(
    pipe: Any, config: AccelerationConfig, check: Callable[[], None] = lambda: None, *, anew: bool = False
) -> Plan:
    """Return the plan as `plan_for`; where ranks are to share the pipeline all of them have a plan, or none has.

    Each rank's pipeline is moved to its own device first; nothing else is changed.

    Args:
        check: raises what else speaks against applying a plan to this rank's pipeline.
        anew: as `plan_for`.

    Raises:
        PipeboostError: as `make_plan` and `check`.
        UnsupportedError: the ranks planned differently.
        RankFailedError: another rank has no plan; its traceback says why.
    """
    count, layout = world_size(), config.parallel
    if count == 1 or layout is None:
        check()
        return plan_for(pipe, config, anew=anew)
    group = layout.group if isinstance(layout, ParallelConfig) else None
    ranks = range(count) if group is None else torch.distributed.get_process_group_ranks(group)
    announce()
    try:
        check()
        to_own_device(pipe)
        plan = plan_for(pipe, config, anew=anew)
    except Exception as error:
        # Ranks that do not share the pipeline wait for no rendezvous.
        if isinstance(layout, ParallelConfig) or family_of(pipe).shares_samples:
            decline(_PLANS, ranks, error)
        raise
    if plan["parallel"].on:
        plans = rendezvous(_PLANS, ranks, "\n".join(_compared(plan)))
        _refuse_different(ranks, [each.split("\n") for each in plans], plan["parallel"].settings.replicas)
    return plan


def _compared(plan: Plan) -> Iterator[str]:
    """What all ranks must have decided alike; weights may go to another device on each."""
    parallel, *others = sorted(plan.decisions.values(), key=lambda each: each.feature != "parallel")
    yield f"parallel: {parallel.choice} on {plan.hardware.device} ({parallel.settings})"
    yield f"quality: {plan.quality}"
    for each in others:
        settings = f" ({each.settings})" if each.on and each.feature != "offload" else ""
        yield f"{each.feature}: {each.choice}{settings}"


def _refuse_different(ranks: Sequence[int], plans: Sequence[Sequence[str]], replicas: int) -> None:
    """Refuse ranks that share a layout and differ in it, or a sample and differ in anything."""
    share = len(ranks) // replicas
    for place, number in itertools.product(range(len(ranks)), range(len(plans[0]))):
        first = place - place % share if number else 0
        if plans[place][number] != plans[first][number]:
            raise UnsupportedError(
                f"ranks planned differently: rank {ranks[first]} {plans[first][number]}, rank {ranks[place]} "
                f"{plans[place][number]}; name the settings instead of 'auto', the same on every rank, and move every "
                "pipeline to the same kind of device"
            )
