"""The plan: configuration × hardware × family → what will be done, why, and what was considered.

Making a plan changes nothing and loads nothing; whatever cannot be done is refused here, before any change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pipeboost.contract.model_info import ModelFacts, activations_of_one_rank, of_one_rank, split_kinds
from pipeboost.core.config import (
    FEATURES,
    OFFLOAD_KINDS,
    AccelerationConfig,
    AttentionConfig,
    CacheConfig,
    CompileConfig,
    OffloadConfig,
    ParallelConfig,
    ReuseConfig,
    tier_allows,
)
from pipeboost.core.errors import ConfigurationError, UnsupportedError
from pipeboost.core.families import Activations, Family
from pipeboost.core.hardware import Hardware
from pipeboost.features.attention import explain_choice
from pipeboost.features.offload import (
    Placement,
    choose_policies,
    in_gib,
    memory_in_words,
    predict,
)
from pipeboost.features.parallel import (
    Ranks,
    beside_in_words,
    check_layout,
    choose_layout,
    layout_in_words,
    shares_text_encoders,
)
from pipeboost.kernels import available_kernels


@dataclass(frozen=True)
class Decision:
    """What the plan says of one feature.

    Attributes:
        feature: its name: an argument of `accelerate_pipeline`, or `"graphs"`, a setting of its `compile`.
        choice: what is used, `"off"` where nothing is.
        why: the reason in a sentence.
        considered: the alternatives and what spoke against each.
        settings: what the feature is applied with; None where it is off.
    """

    feature: str
    choice: str
    why: str
    considered: tuple[str, ...] = ()
    settings: Any = None

    @property
    def on(self) -> bool:
        """Whether the feature is used."""
        return self.settings is not None


@dataclass(frozen=True)
class Plan:
    """What `accelerate_pipeline` does to one pipeline on this machine.

    Attributes:
        default: whether every choice is the one that was measured: the tier's own, with the kernels it prefers, and
            all weights on the device.
        policies: kind of component → where it lives: `"resident"`, `"stage"` or `"layerwise"`.
        activations: what the stages take besides weights, on this rank; None where no family tells.
    """

    quality: str
    family: Family
    hardware: Hardware
    facts: ModelFacts
    decisions: tuple[Decision, ...]
    default: bool
    policies: Mapping[str, str] = field(default_factory=dict)
    activations: Activations | None = None

    def __getitem__(self, feature: str) -> Decision:
        return next(decision for decision in self.decisions if decision.feature == feature)

    @property
    def expected(self) -> str:
        """Expected speed, from our own measurements where this hardware and family were measured."""
        if not any(decision.on for decision in self.decisions if decision.feature != "reuse"):
            return "stock speed per step: nothing in this plan changes it"
        for measured in self.family.measured if self.default else ():
            if measured.hardware in self.hardware.name and measured.tier == self.quality:
                return f"{measured.speedup:.2f}x per step over stock eager ({measured.workload}, {measured.source})"
        return "not measured on this hardware; pipe.acceleration.verify() and `pipeboost bench` measure it"

    @property
    def peaks(self) -> dict[str, int]:
        """Predicted peak bytes on the device in each stage, weights included; empty where the weights are not known."""
        if not self.facts.components or self.facts.offloaded:
            return {}
        return predict(self.facts.components, self.policies, self.activations)

    @property
    def _weights(self) -> str:
        facts = self.facts
        if not self.peaks:
            return f"weights of {facts.weighed} {in_gib(facts.weights)}"
        # They were measured on a GPU; on a CPU, in float32, they are others.
        activations = self.activations if self.hardware.device == "cuda" else None
        return memory_in_words(facts.components, self.policies, activations, weighed=facts.weighed)

    def __str__(self) -> str:
        available = self.hardware.memory if self.facts.free is None else self.facts.free
        lines = [
            f"{self.facts.pipeline} ({self.family.name} family) on {self.hardware}, quality={self.quality!r}",
            f"  memory    {self._weights}; {in_gib(available)} {'free' if self.facts.free else 'in all'} on the device",
            f"  expected  {self.expected}",
        ]
        for decision in self.decisions:
            lines.append(f"  {decision.feature:<9} {decision.choice}: {decision.why}")
            lines.extend(f"  {'':<9}   considered {alternative}" for alternative in decision.considered)
        lines.extend(f"  missing   {item}" for item in self.family.missing)
        return "\n".join(lines)


def make_plan(config: AccelerationConfig, hardware: Hardware, family: Family, facts: ModelFacts) -> Plan:
    """Decide every feature.

    Raises:
        ConfigurationError: a setting contradicts the tier or another setting.
        UnsupportedError: a setting needs what this machine, model or version does not have.
        MissingPackageError: a setting needs a package that is not installed.
    """
    attention = _attention(config, hardware, facts)
    parallel = _parallel(config, hardware, family, facts, attention=attention.on)
    facts = of_one_rank(facts, parallel.settings)
    activations = activations_of_one_rank(family.activations, parallel.settings, config.quality)
    offload = _offload(config, hardware, facts, activations)
    _refuse_moving_shares(offload, parallel.settings)
    cache = _cache(config, family, facts)
    policies = {kind: getattr(offload.settings, kind, "resident") for kind in OFFLOAD_KINDS}
    return Plan(
        policies=policies,
        activations=activations,
        quality=config.quality,
        family=family,
        hardware=hardware,
        facts=facts,
        decisions=(
            attention,
            parallel,
            _quantize(config),
            cache,
            _compile(config, hardware, family, facts),
            _graphs(config, hardware, facts, cache, policies),
            offload,
            _reuse(config, facts, parallel.settings),
        ),
        default=all(getattr(config, feature) == "auto" for feature in FEATURES)
        and not offload.on
        and not parallel.on
        and facts.dtype == torch.bfloat16
        and "flash3" in available_kernels(hardware),
    )


def _attention(config: AccelerationConfig, hardware: Hardware, facts: ModelFacts) -> Decision:
    asked = config.attention
    if asked is None:
        return Decision("attention", "off", "turned off; stock's processors run")
    if config.quality == "exact":
        if asked != "auto":
            raise _needs_tier("attention", asked.backend, "lossless", config.quality)
        return Decision("attention", "off", "another kernel changes rounding, which tier 'exact' does not allow")
    settings = AttentionConfig() if asked == "auto" else asked
    choice, why, considered = explain_choice(settings, hardware=hardware, tier=config.quality, dtype=facts.dtype)
    left = tuple(f"{name} stays stock: {reason}" for name, reason in facts.stock_processors)
    if facts.processors == 0:
        if settings.backend != "auto":
            raise UnsupportedError(
                f"attention={settings.backend!r} would not run in {facts.pipeline}, whose processors call their kernel "
                "themselves; use attention=None"
            )
        return Decision("attention", "off", "its processors call their kernel themselves", left)
    return Decision("attention", choice, why, (*considered, *left), settings)


def _parallel(
    config: AccelerationConfig, hardware: Hardware, family: Family, facts: ModelFacts, *, attention: bool
) -> Decision:
    asked = config.parallel
    given = asked if isinstance(asked, ParallelConfig) else None
    count = facts.ranks if given is None or given.group is None else given.group.size()
    if asked is None:
        apart = f"turned off; the {count} ranks work apart" if count > 1 else "turned off"
        return Decision("parallel", "off", apart)
    if count == 1 and (given is None or given.size == 1):
        return Decision("parallel", "off", "one process")
    ranks = Ranks(
        count=count,
        family=family,
        model=facts.model,
        heads=facts.heads,
        splits=facts.degrees(family.denoisers),
        tier=config.quality,
        attention=attention,
        weights=sum(component.nbytes for component in facts.components if component.path in family.denoisers),
        resident={degree: of_one_rank(facts, ParallelConfig(tensor=degree)).weights for degree in range(2, count + 1)},
        free=hardware.memory if facts.free is None and hardware.device == "cuda" else facts.free,
    )
    considered: tuple[str, ...] = ()
    if given is not None:
        check_layout(given, ranks)
        layout, why = given, "; ".join(filter(None, ("as asked for", beside_in_words(given))))
    elif not family.shares_samples:
        why = f"no family tells how ranks could share {facts.pipeline}; the {count} ranks work apart"
        return Decision("parallel", "off", why)
    else:
        layout, why, considered = choose_layout(ranks)
    if (
        layout.ulysses * layout.ring > 1
        and isinstance(config.compile, CompileConfig)
        and config.compile.scope == "full"
    ):
        raise ConfigurationError(
            "ranks share tokens outside the blocks, which compile='full' does not have; use 'regional'"
        )
    return Decision("parallel", layout_in_words(layout), why, considered, layout)


def _refuse_moving_shares(offload: Decision, layout: ParallelConfig | None) -> None:
    for kind in split_kinds(layout):
        if offload.on and getattr(offload.settings, kind) != "resident":
            assert layout is not None
            raise UnsupportedError(
                f"tensor={layout.tensor} shares the weights of the {kind.replace('_', ' ')}, which "
                f"offload={offload.choice!r} would move; use offload=None, or more ranks where they do not fit"
            )


def _quantize(config: AccelerationConfig) -> Decision:
    if config.quantize not in (None, "auto"):
        raise UnsupportedError("quantize='fp8' is not in this version yet; use quantize=None")
    return Decision("quantize", "off", "fp8 linears are not in this version yet")


def _cache(config: AccelerationConfig, family: Family, facts: ModelFacts) -> Decision:
    asked = config.cache
    if asked is None:
        return Decision("cache", "off", "turned off")
    if not tier_allows(config.quality, "fast"):
        if asked != "auto":
            raise _needs_tier("cache", asked, "fast", config.quality)
        return Decision("cache", "off", f"skipping steps is lossy, and tier {config.quality!r} does not allow it")
    if not family.blocks:
        if asked != "auto":
            raise UnsupportedError(
                f"cache needs to know which blocks it may skip, which no family tells for {family.pipelines[0]}; "
                "use cache=None or add a family (entry-point group 'pipeboost.patches')"
            )
        return Decision("cache", "off", "no family tells which blocks of this pipeline may be skipped")
    if facts.controlnet:
        if asked != "auto":
            raise UnsupportedError(
                f"cache cannot skip blocks of {facts.pipeline}, whose ControlNet adds to the states between them; "
                "use cache=None"
            )
        return Decision("cache", "off", "a ControlNet adds to the states between the blocks, which a cache would skip")
    if isinstance(config.compile, CompileConfig) and config.compile.scope == "full":
        if asked != "auto":
            raise ConfigurationError("cache decides between blocks, which compile='full' does not have; use 'regional'")
        return Decision("cache", "off", "compile='full' leaves no blocks to decide between")
    settings = CacheConfig() if asked == "auto" else asked
    how = (
        f"fixed steps ({settings.step_mask})"
        if settings.step_mask is not None
        else f"a step is skipped while the residual of the first {settings.fn} block(s) moves less than "
        f"{settings.threshold}, at most {settings.max_continuous} in a row, never in the first {settings.warmup}"
    )
    return Decision("cache", "cache-dit", how, settings=settings)


def _compile(config: AccelerationConfig, hardware: Hardware, family: Family, facts: ModelFacts) -> Decision:
    asked = config.compile
    if asked is None:
        return Decision("compile", "off", "turned off")
    if asked != "auto" and asked.scope is None:
        return Decision("compile", "off", "turned off; CUDA graphs alone")
    if config.quality == "exact":
        if asked != "auto":
            raise _needs_tier("compile", asked.scope, "lossless", config.quality)
        return Decision("compile", "off", "compiling changes rounding, which tier 'exact' does not allow")
    if asked == "auto" and hardware.device == "cpu":
        return Decision(
            "compile", "off", "on a CPU building takes longer than one image saves; compile='regional' turns it on"
        )
    settings = CompileConfig() if asked == "auto" else asked
    if settings.backend == "inductor" and not hardware.compiler:
        needs = "a C++ compiler such as g++" if hardware.device == "cpu" else "the package triton"
        if asked != "auto":
            raise UnsupportedError(f"compile={settings.scope!r} needs {needs}, which is missing here; use compile=None")
        return Decision("compile", "off", f"it needs {needs}, which is missing here")
    if facts.hooks is not None and asked != "auto":
        raise UnsupportedError(
            f"compile={settings.scope!r} cannot capture blocks of {facts.model}, which have {facts.hooks}; use "
            "compile=None, or take the hooks off"
        )
    obstacle = facts.hooks or facts.odd_blocks
    if obstacle is not None and asked == "auto":
        return Decision("compile", "off", f"the blocks may not be captured: they have {obstacle}")
    considered = () if settings.scope == "full" else ("full: 1-2% faster on FLUX for 4x the cold start",)
    if settings.dynamic:
        sizes = "for all sizes"
    elif any(blocks.text_dims for blocks in family.blocks):
        sizes = "reused by all; the text length is dynamic, the image size is not"
    elif family.blocks:
        sizes = "reused by all; another image size is another graph"
    else:
        sizes = "reused by all; a size that changes costs one more, which then fits any"
    why = f"one graph {'of the whole model' if settings.scope == 'full' else 'per kind of block'}, {sizes}"
    # What is compiled does not depend on how it is launched, so pipelines that differ in that alone can share it.
    return Decision("compile", str(settings.scope), why, considered, replace(settings, graphs=False))


def _graphs(
    config: AccelerationConfig, hardware: Hardware, facts: ModelFacts, cache: Decision, policies: Mapping[str, str]
) -> Decision:
    asked = config.compile
    if asked is None:
        return Decision(
            "graphs", "off", "turned off with compile; CompileConfig(scope=None, graphs=True) has them alone"
        )
    wanted = "auto" if asked == "auto" else asked.graphs
    if wanted is False:
        return Decision("graphs", "off", "turned off")
    against: dict[str, bool] = {
        "the pipeline is on the CPU": hardware.device == "cpu",
        "the cache decides on the host which blocks run": cache.on,
        "the transformer's weights come and go": facts.offloaded or policies["transformers"] != "resident",
    }
    reason = next((words for words, holds in against.items() if holds), None)
    if reason is not None:
        if wanted is True:
            raise UnsupportedError(f"compile.graphs=True is not possible here: {reason}; use graphs='auto' or False")
        return Decision("graphs", "off", f"a CUDA graph is not possible: {reason}")
    why = "a forward whose launches take the host about as long as the device runs is captured at its third run"
    if wanted is True:
        why = "a forward is captured at its second run with the same shapes and settings"
    return Decision("graphs", "auto" if wanted == "auto" else "on", f"{why}; the report counts them", settings=wanted)


def _offload(
    config: AccelerationConfig, hardware: Hardware, facts: ModelFacts, activations: Activations | None
) -> Decision:
    asked = config.offload
    if isinstance(asked, OffloadConfig) and asked.all_resident:
        return Decision("offload", "off", "components stay where they are")
    if facts.offloaded:
        if isinstance(asked, OffloadConfig):
            raise UnsupportedError(
                f"offload={asked.policy!r} would fight Diffusers' own CPU offload, which is on; call "
                "pipe.remove_all_hooks() first, or use offload=None"
            )
        return Decision("offload", "off", "left as Diffusers' own CPU offload was set")
    if asked is None:
        return Decision("offload", "off", "turned off; components stay where they are")
    if asked == "auto" and (hardware.device == "cpu" or not facts.components):
        why = "the pipeline is on the CPU" if hardware.device == "cpu" else "the size of the weights is not known"
        return Decision("offload", "off", f"components stay where they are: {why}")
    settings = OffloadConfig() if asked == "auto" else asked
    streams = not (isinstance(config.compile, CompileConfig) and config.compile.scope == "full")
    budget = hardware.memory if facts.free is None else facts.free
    policies, why = choose_policies(settings, facts.components, activations, budget, streams=streams)
    if all(policy == "resident" for policy in policies.values()):
        return Decision("offload", "off", f"components stay where they are: {why}")
    if not streams and policies["transformers"] == "layerwise":
        raise ConfigurationError(
            "offload.transformers='layerwise' streams blocks, which compile='full' does not have; use 'regional'"
        )
    for component in facts.components:
        if policies[component.kind] == "resident" or component.path not in facts.unmovable:
            continue
        reason = f"{component.path}, which has {facts.unmovable[component.path]}"
        if asked != "auto":
            raise UnsupportedError(f"offload cannot move {reason}; use offload=None")
        return Decision("offload", "off", f"components stay where they are, for it cannot move {reason}")
    if hardware.device == "cpu":
        why += "; on a CPU weights move within one memory, which saves nothing"
    where = ", ".join(f"{kind} {policy}" for kind, policy in policies.items())
    placement = Placement(facts.device or torch.device(hardware.device), **policies)
    return Decision("offload", where, why, settings=placement)


def _reuse(config: AccelerationConfig, facts: ModelFacts, layout: ParallelConfig | None) -> Decision:
    asked = config.reuse
    if asked is None:
        return Decision("reuse", "off", "turned off; every prompt is encoded anew")
    if layout is not None and shares_text_encoders(layout):
        if asked != "auto":
            raise UnsupportedError(
                "reuse would let a rank leave out an encoding that the others share with it; use reuse=None, or "
                "ParallelConfig(text_encoder=False)"
            )
        return Decision("reuse", "off", "the ranks share the text encoders, and encode every prompt together")
    if not facts.encodes:
        if asked != "auto":
            raise UnsupportedError(
                f"reuse keeps what encode_prompt returns, which {facts.pipeline} does not have; use reuse=None"
            )
        return Decision("reuse", "off", "the pipeline has no encode_prompt")
    settings = ReuseConfig() if asked == "auto" else asked
    why = f"same prompt, encoders and settings, same embeddings; keeps at most {settings.max_bytes / 2**20:.0f} MiB"
    return Decision("reuse", "prompts", why, settings=settings)


def _needs_tier(feature: str, choice: object, tier: str, given: str) -> ConfigurationError:
    return ConfigurationError(f"{feature}={choice!r} is not allowed in quality={given!r}; it needs quality={tier!r}")
