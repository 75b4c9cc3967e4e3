"""A pipeline whose class no family lists gets what its family knows of its transformer, and nothing of its script."""

import functools

import pytest
import torch
from diffusers import DiffusionPipeline

from pipeboost import CacheConfig, CompileConfig, ParallelConfig, accelerate_pipeline
from pipeboost.contract.registry import families, family_of
from pipeboost.core.config import AccelerationConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.hardware import Hardware
from pipeboost.features.parallel.layout import Ranks, check_layout
from pipeboost.model_reader import model_info
from pipeboost.plan import make_plan
from tests.floors import floor_of, is_rounding
from tests.parameters import often
from tests.pipelines.tiny import TINY
from tests.pipelines.tiny_parts import seeded
from tests.pipelines.tiny_unlisted import UNLISTED

H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", (9, 0), 80 * 2**30, 1, False, True)


EXACT = ("flux_control_img2img", "qwen_image_controlnet_inpaint", "lucy_edit")


@pytest.mark.usefixtures("graphs_stay")
@pytest.mark.parametrize(
    ("name", "traced"),
    often([("z_image_controlnet", True), *((name, False) for name in EXACT)], [(name, True) for name in UNLISTED]),
)
def test_an_unlisted_pipeline_runs_exactly_as_stock_and_close_to_it_compiled(name, traced):
    entry = UNLISTED[name]
    pipe, other = entry.build(), entry.build()

    def call(pipe: DiffusionPipeline = pipe) -> torch.Tensor:
        with seeded(0):  # Qwen-Image's inpainting with a ControlNet draws from the global generator
            return entry.call(pipe)

    stock = call(other)
    accelerate_pipeline(pipe, quality="exact", offload="stage")
    assert pipe.acceleration.plan.family.name == entry.family
    assert torch.equal(call(), stock)
    accelerate_pipeline(pipe, compile=CompileConfig(backend="eager") if traced else None)
    floor = functools.partial(floor_of, lambda: call(other), other.transformer, other.vae, stock=stock)
    assert is_rounding(float((call() - stock).abs().max()), floor)
    pipe.acceleration.remove()
    assert torch.equal(call(), stock)


@pytest.mark.parametrize("name", UNLISTED)
def test_what_only_the_script_can_tell_is_off_with_its_reason(name):
    entry = UNLISTED[name]
    pipe = entry.build()
    family, kind = family_of(pipe), type(pipe).__name__
    info = model_info(pipe, family, torch.device("cpu"), ranks=2)
    plan = make_plan(AccelerationConfig(quality="fast", parallel=None), H100, family, info)
    assert family.blocks == next(each.blocks for each in families() if each.name == entry.family)
    assert f"which forwards {kind} makes in a step" in str(plan)
    assert f"{kind}" in plan["cache"].why
    with pytest.raises(UnsupportedError, match=kind):
        make_plan(AccelerationConfig(quality="fast", parallel=None, cache=CacheConfig()), H100, family, info)
    ranks = Ranks(2, family, info, "lossless", attention=True)
    with pytest.raises(UnsupportedError, match="in this pipeline, which no family lists"):
        check_layout(ParallelConfig(cfg=2), ranks)


def test_a_controlnet_is_named_as_what_stays_stock():
    for entry, name in (
        (UNLISTED["z_image_controlnet"], "ZImageControlNetModel"),
        (TINY["flux_controlnet"], "FluxControlNetModel"),
    ):
        pipe = entry.build()
        assert f"controlnet ({name}), which steps call beside" in str(accelerate_pipeline(pipe).acceleration.plan)
    for name in ("ltx2", "wan22_i2v"):  # a vocoder, connectors and a second expert are none
        assert "stays stock" not in str(accelerate_pipeline(TINY[name].build(), attention=None).acceleration.plan)
