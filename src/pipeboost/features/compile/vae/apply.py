"""Lets a VAE compute faster in the same precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from pipeboost.contract.context import ApplyContext, Component
from pipeboost.contract.decision import Decision
from pipeboost.core.families import Family
from pipeboost.core.ledger import Ledger
from pipeboost.features.compile.model import CompiledModel, compile_model
from pipeboost.features.compile.vae.decide import VaeSettings
from pipeboost.features.compile.vae.known_sizes import key_of, noting_sizes, only_sizes
from pipeboost.features.compile.vae.rewrites import (
    PARTS,
    is_compiled,
    is_rewritable,
    rewrite_vae,
    step_back_where_compiled,
)


@dataclass(frozen=True)
class CompiledVae:
    """What compiling a VAE's encoder and decoder cost so far."""

    parts: tuple[CompiledModel, ...]

    def summary(self) -> dict[str, Any]:
        """Return the counts of both as a report shows them."""
        summaries = [part.summary() for part in self.parts]
        eager: dict[str, int] = {}
        for reason, count in (item for summary in summaries for item in summary["eager"].items()):
            eager[reason] = eager.get(reason, 0) + count
        return {**{name: sum(each[name] for each in summaries) for name in ("graphs", "seconds")}, "eager": eager}


def apply(component: Component, decision: Decision, context: ApplyContext, ledger: Ledger) -> CompiledVae | None:
    """Rewrite or compile the VAE in the calls of the acceleration; it is compiled when it is first called.

    Tiling and slicing call the same encoder and decoder, with a tile or a sample.

    Raises:
        UnsupportedError: as `compile_model`.
    """
    if component.path != "vae":
        return None
    vae, settings = component.object, decision.settings
    assert isinstance(settings, VaeSettings)
    if settings.rewrites and is_rewritable(vae) and not is_compiled(vae):
        rewrite_vae(vae, context.family.autoencoder, ledger, owner=context.owner)
    if settings.compiled is None:
        return None
    return compile_vae(vae, settings, context.family, context.hardware.name, ledger, owner=context.owner)


def compile_vae(
    vae: nn.Module, settings: VaeSettings, family: Family, hardware: str, ledger: Ledger, *, owner: Any = None
) -> CompiledVae:
    """Run a VAE's encoder and decoder compiled in the calls of an acceleration; undone by the ledger.

    Args:
        vae: the VAE.
        settings: how, and which sizes.
        family: of the pipeline.
        hardware: the device's name, for which compiled sizes are noted.
        ledger: takes the inverse.
        owner: the acceleration; None for every call.

    Raises:
        UnsupportedError: as `compile_model`.
    """
    assert settings.compiled is not None
    # Tiles of a video have up to eight sizes.
    video = any(isinstance(module, nn.Conv3d) for module in vae.modules())
    compiled = replace(settings.compiled, dynamic=settings.compiled.dynamic or video)
    models: list[CompiledModel] = []
    for name in PARTS:
        part = getattr(vae, name, None)
        if part is None:
            continue
        models.append(compile_model(part, compiled, family, ledger, owner=owner))
        middleware = None if settings.sizes is None else only_sizes(name, settings.sizes, dynamic=compiled.dynamic)
        if middleware is None and compiled.backend == "inductor":
            middleware = noting_sizes(name, key_of(vae), hardware, models[-1], dynamic=compiled.dynamic)
        if middleware is not None:
            ledger.share_middleware(
                part, "__call__", middleware, place="component.sizes", kind="sizes", settings=settings.sizes is None
            )
    return CompiledVae(tuple(models))


def rebind(component: Component, decision: Decision, context: ApplyContext) -> None:
    """Leave a VAE that the user has compiled since to them."""
    if component.path == "vae":
        step_back_where_compiled(component.object)
