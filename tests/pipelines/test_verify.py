"""What `verify` finds beyond the verdict: floors, metrics, blocks, JSON and the contact sheet."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image

from pipeboost import CacheConfig, CompileConfig, accelerate_pipeline
from pipeboost.contract.call import current_call
from pipeboost.core.seams import add_middleware
from pipeboost.demo_model.prompts import DEMO_CALL, DEMO_PROMPTS, WEIGHTS
from pipeboost.quality import psnr
from tests.pipelines.tiny import TINY

EXACT = {"quality": "exact"}
SKIPS = CacheConfig(extrapolate="output", step_mask=[0, 1], steps=4)


def call_of(name: str, **overrides: Any) -> dict[str, Any]:
    return {key: value for key, value in TINY[name].call_kwargs(**overrides).items() if key != "generator"}


def test_a_film_is_judged_beside_stock_run_again_and_stock_with_as_many_forwards(tmp_path):
    pipe = accelerate_pipeline(TINY["wan21_t2v"].build(), quality="fast", cache=SKIPS)
    result = pipe.acceleration.verify(**call_of("wan21_t2v", steps=4))
    assert result.metrics.keys() == {"psnr", "ssim", "flicker"}
    assert list(result.metrics["psnr"]) == ["ours", "stock, fewer steps", "stock again"]
    assert result.metrics["psnr"]["ours"] == result.psnr < math.inf
    assert result.metrics["psnr"]["stock again"] == math.inf
    assert result.rival == (2, result.metrics["psnr"]["stock, fewer steps"])
    assert result.metrics["ssim"]["stock again"] == pytest.approx(1.0)
    assert result.metrics["ssim"]["ours"] < 0.99
    flicker = result.metrics["flicker"]
    assert flicker["stock"] == flicker["stock again"] != flicker["ours"]
    assert "lpips needs" in result.left_out["lpips"]
    assert "not measured: lpips needs" in str(result)
    with pipe.acceleration.paused():
        stock = TINY["wan21_t2v"].call(pipe, steps=2)
        again = TINY["wan21_t2v"].call(pipe, steps=4)
    assert psnr(stock.numpy(), again.numpy()) == pytest.approx(result.rival[1], rel=1e-6)
    result.save(tmp_path)
    written = json.loads((tmp_path / "verification.json").read_text())
    assert written["psnr"] == result.psnr
    assert written["metrics"]["psnr"]["stock again"] == "inf"
    assert written["rival"] == list(result.rival)
    sheet = np.asarray(Image.open(tmp_path / "contact_sheet.png"))
    assert sheet.shape[0] > 3 * 150
    assert sheet.std() > 10


def test_latents_have_no_pictures_to_judge(tmp_path):
    pipe = accelerate_pipeline(TINY["flux_dev"].build(), **EXACT)
    result = pipe.acceleration.verify(**call_of("flux_dev", output_type="latent"))
    assert result.metrics.keys() == {"psnr"}
    assert result.contact_sheet is None
    result.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["verification.json"]


@pytest.mark.parametrize("name", ["flux_dev", "ltx2"])
def test_per_block_names_the_block_that_an_error_comes_from(name):
    pipe = accelerate_pipeline(TINY[name].build(), **EXACT)

    def spoil(call_next, owner, *args, **kwargs):
        first, *others = call_next(*args, **kwargs)
        return (first if current_call() is None else first * 1.5, *others)

    add_middleware(pipe.transformer.transformer_blocks[1], "__call__", spoil, place="block.compile")
    result = pipe.acceleration.verify(per_block=True, **call_of(name))
    assert not result.passed
    assert result.block_errors.pop("transformer.transformer_blocks.1") == pytest.approx(0.5, rel=1e-3)
    assert set(result.block_errors.values()) == {0.0}
    assert {path.rpartition(".")[0] for path in result.block_errors} >= {"transformer.transformer_blocks"}
    assert "transformer.transformer_blocks.1: relative error 0.5" not in str(pipe.acceleration.verify(**call_of(name)))


def test_per_block_looks_into_a_row_of_cached_blocks():
    cache = CacheConfig(extrapolate="blocks", warmup=1, threshold=0.9)
    pipe = accelerate_pipeline(TINY["flux_dev"].build(), quality="fast", cache=cache)
    result = pipe.acceleration.verify(per_block=True, **call_of("flux_dev", steps=4))
    blocks = len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
    assert list(result.block_errors.values()) == [0.0] * blocks
    assert f"blocks on stock's inputs: 0 of {blocks} differ" in str(result)
    assert not any("blocks" in name for name in result.left_out)


def test_blocks_that_get_other_inputs_than_in_stock_are_left_out_and_named():
    pipe = accelerate_pipeline(TINY["hunyuan_video"].build(), quality="balanced", compile=None)
    result = pipe.acceleration.verify(per_block=True, **call_of("hunyuan_video"))
    (why,) = (why for name, why in result.left_out.items() if name == "blocks of transformer")
    assert "they get other inputs than in stock" in why
    assert why in str(result)


def test_stock_compiled_is_measured_where_the_acceleration_compiles(monkeypatch):
    pipe = accelerate_pipeline(TINY["flux_dev"].build(), quality="fast", compile=CompileConfig(backend="eager"))
    compiled = pipe.transformer.compile_repeated_blocks
    asked = []
    pipe.transformer.compile_repeated_blocks = lambda **options: asked.append(options) or compiled(backend="eager")
    result = pipe.acceleration.verify(**call_of("flux_dev", steps=4))
    assert asked == [{"fullgraph": True}]
    assert result.metrics["psnr"]["stock compiled"] == math.inf
    monkeypatch.setattr(FluxTransformer2DModel, "_repeated_blocks", [])
    result = pipe.acceleration.verify(**call_of("flux_dev", steps=4))
    assert "stock compiled" not in result.metrics["psnr"]
    assert "names no repeated blocks" in result.left_out["stock compiled"]


def test_pictures_of_the_demo_model_are_read():
    pipe = FluxPipeline.from_pretrained(str(WEIGHTS))
    pipe.set_progress_bar_config(disable=True)
    accelerate_pipeline(pipe, quality="fast", cache=CacheConfig(extrapolate="output", step_mask=[0, 1], steps=8))

    def spoil(call_next, owner, *args, **kwargs):
        (output,) = call_next(*args, **kwargs)
        return (output if current_call() is None else torch.zeros_like(output),)

    call = {**DEMO_CALL, "num_inference_steps": 8, "prompt": DEMO_PROMPTS[3].text}
    assert pipe.acceleration.verify(**call).metrics["drawn"]["ours"] == 1.0
    add_middleware(pipe.transformer, "__call__", spoil, place="component.stages")
    result = pipe.acceleration.verify(**call, generator=torch.Generator().manual_seed(0))
    assert not result.passed
    assert result.metrics["drawn"] == {"stock": 1.0, "ours": 0.0, "stock, fewer steps": 1.0, "stock again": 1.0}
