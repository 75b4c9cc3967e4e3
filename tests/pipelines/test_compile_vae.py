"""The VAE of an accelerated pipeline: compiled where asked for, rewritten where it is a video's, stock once removed."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from pipeboost import CompileConfig, ParallelConfig, accelerate_pipeline
from pipeboost.contract.model_info import ModelInfo
from pipeboost.contract.registry import family_named
from pipeboost.core.config import AccelerationConfig
from pipeboost.core.errors import ConfigurationError, UnsupportedError
from pipeboost.core.hardware import Hardware
from pipeboost.core.seams import stock_class
from pipeboost.plan import Plan, make_plan
from tests.floors import is_rounding
from tests.pipelines.tiny import TINY

HOPPER = Hardware("cuda", "NVIDIA H200", (9, 0), 140 * 2**30, 1, False, True)
CPU = Hardware("cpu", "CPU with 2 cores", None, 24 * 2**30, 1, False, True)
FLUX = ModelInfo("FluxPipeline", torch.bfloat16, 33 * 2**30, vae="other")
ASKED = CompileConfig(backend="eager", vae=True)
pytestmark = pytest.mark.usefixtures("graphs_stay")


@pytest.fixture(scope="module", autouse=True)
def graphs_of_flux_stay() -> Iterator[None]:
    kept = accelerate_pipeline(TINY["flux_dev"].build(), compile=ASKED)
    yield
    del kept


def plan(hardware: Hardware = HOPPER, model: ModelInfo = FLUX, **settings: object) -> Plan:
    return make_plan(AccelerationConfig(**settings), hardware, family_named(model.pipeline), model)  # type: ignore[arg-type]


def test_compiling_is_asked_for_and_the_plan_says_after_how_many_pictures_it_pays() -> None:
    automatic = plan()["vae"]
    assert not automatic.on
    assert "20 s and saves 52 ms" in automatic.why
    assert "after 379" in automatic.why
    assert plan(compile=CompileConfig(vae=True))["vae"].choice == "compiled"
    assert plan(compile=CompileConfig(vae=False))["vae"].why == "turned off"
    assert plan(compile=None)["vae"].why == "turned off"


def test_a_video_vae_is_rewritten_where_the_tier_allows_rounding() -> None:
    model = replace(FLUX, pipeline="QwenImagePipeline", vae="causal")
    assert plan(model=model)["vae"].choice == "rewritten"
    assert plan(model=model, compile=CompileConfig(vae=True))["vae"].choice == "rewritten"
    assert "was compiled before" in plan(model=replace(model, vae="compiled"))["vae"].why
    assert not plan(CPU, model)["vae"].on
    assert not plan(model=model, quality="exact")["vae"].on
    assert not plan(model=model, compile=CompileConfig(scope=None, graphs=True))["vae"].on


def test_what_cannot_be_compiled_is_refused_when_asked_for_and_explained_otherwise() -> None:
    with pytest.raises(ConfigurationError, match=r"compile\.vae=True is not allowed|needs quality"):
        plan(quality="exact", compile=CompileConfig(scope=None, graphs=True, vae=True))
    with pytest.raises(UnsupportedError, match="has no VAE"):
        plan(model=replace(FLUX, vae=None), compile=CompileConfig(vae=True))
    with pytest.raises(UnsupportedError, match="ranks share its work"):
        plan(model=replace(FLUX, ranks=2), compile=CompileConfig(vae=True), parallel=ParallelConfig(ulysses=2))
    alone = ParallelConfig(ulysses=2, vae=False)
    assert plan(model=replace(FLUX, ranks=2), compile=CompileConfig(vae=True), parallel=alone)["vae"].on
    with pytest.raises(UnsupportedError, match="block by block"):
        plan(compile=CompileConfig(vae=True), offload="layerwise")
    with pytest.raises(ConfigurationError, match=r"compile\.vae"):
        CompileConfig(vae="always")  # type: ignore[arg-type]


def test_a_compiled_vae_is_one_graph_a_size_of_encoder_and_decoder_and_remove_gives_stock() -> None:
    entry = TINY["flux_img2img"]
    pipe = accelerate_pipeline(entry.build(), compile=ASKED)
    output, stock = entry.call(pipe, num_images_per_prompt=2), entry.stock(num_images_per_prompt=2)
    assert is_rounding(float((output - stock).abs().max()), entry.floor)
    graphs = pipe.acceleration.report().compiled["vae"]["graphs"]
    assert graphs >= 1
    assert not pipe.acceleration.report().compiled["vae"]["eager"]
    entry.call(pipe, seed=1, num_images_per_prompt=2)
    assert pipe.acceleration.report().compiled["vae"]["graphs"] == graphs
    pipe.acceleration.remove()
    assert all(type(module) is stock_class(module) for module in pipe.vae.modules())
    assert torch.equal(entry.call(pipe, num_images_per_prompt=2), stock)


def test_tiles_slices_and_offload_use_the_compiled_decoder() -> None:
    entry = TINY["flux_dev"]
    pipe = entry.build()
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size, pipe.vae.tile_overlap_factor = 32, 4, 0.0
    pipe.vae.enable_slicing()
    stock = entry.call(pipe, num_images_per_prompt=2)
    accelerate_pipeline(pipe, compile=ASKED, offload="stage")
    output = entry.call(pipe, num_images_per_prompt=2)
    assert is_rounding(float((output - stock).abs().max()), entry.floor)
    assert pipe.acceleration.report().compiled["vae"]["graphs"] == 1


@pytest.mark.parametrize("name", ["qwen_image", "wan21_t2v"])
def test_a_pipeline_with_a_rewritten_vae_differs_by_rounding_and_remove_gives_stock(name: str) -> None:
    entry = TINY[name]
    pipe = accelerate_pipeline(entry.build(), compile=CompileConfig(backend="eager"))
    assert pipe.acceleration.plan["vae"].choice == "rewritten"
    assert any(type(module) is not stock_class(module) for module in pipe.vae.decoder.modules())
    output, stock = entry.call(pipe), entry.stock()
    assert is_rounding(float((output - stock).abs().max()), entry.floor)
    pipe.acceleration.remove()
    assert all(type(module) is stock_class(module) for module in pipe.vae.modules())
    assert torch.equal(entry.call(pipe), stock)


@pytest.mark.exhaustive
def test_tiles_of_a_video_of_all_sizes_share_a_graph() -> None:
    entry = TINY["hunyuan_video"]
    pipe = entry.build()
    pipe.vae.enable_tiling(32, 32, 4, 24, 24, 4)
    stock = entry.call(pipe)
    accelerate_pipeline(pipe, compile=ASKED)
    output = entry.call(pipe)
    assert is_rounding(float((output - stock).abs().max()), entry.floor)
    compiled = pipe.acceleration.report().compiled["vae"]
    assert not compiled["eager"]
    assert compiled["graphs"] <= 3


def test_a_video_vae_that_the_user_compiled_is_left_to_them_and_the_plan_says_so() -> None:
    entry = TINY["qwen_image"]
    pipe = entry.build()
    pipe.vae.decoder.mid_block = torch.compile(pipe.vae.decoder.mid_block, backend="eager")
    accelerate_pipeline(pipe, compile=CompileConfig(backend="eager"))
    assert not pipe.acceleration.plan["vae"].on
    assert torch.equal(entry.call(pipe), entry.stock())
