"""The one line on a GPU: tiny pipelines in bfloat16 and float32, compiled for real, with Diffusers' own offload."""

import pytest
import torch

from pipeboost import accelerate_pipeline
from tests.pipelines.tiny import TINY, tiny_names

pytestmark = pytest.mark.gpu
FAMILIES = ("flux", "qwen_image", "wan", "hunyuan_video")


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.float().cpu() - other.float().cpu()).abs().max().item()


@pytest.mark.parametrize("name", ["flux_dev", "qwen_image", "wan22_t2v", "hunyuan_video"])
def test_the_default_tier_changes_rounding_at_most_and_comes_off_to_the_bit(name):
    entry = TINY[name]
    pipe = entry.build().to("cuda")
    stock = entry.call(pipe)
    accelerate_pipeline(pipe)
    assert pipe.acceleration.plan["compile"].choice == "regional"
    assert _difference(entry.call(pipe), stock) < 5e-3
    pipe.acceleration.remove()
    assert _difference(entry.call(pipe), stock) == 0


@pytest.mark.parametrize("name", tiny_names(*FAMILIES))
def test_exact_is_bit_identical(name):
    entry = TINY[name]
    pipe = entry.build().to("cuda")
    stock = entry.call(pipe)
    accelerate_pipeline(pipe, quality="exact")
    assert _difference(entry.call(pipe), stock) == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_diffusers_cpu_offload_turned_on_before_or_after_works(when):
    entry = TINY["flux_dev"]
    stock = entry.build()
    stock.enable_model_cpu_offload()
    expected = entry.call(stock)
    pipe = entry.build()
    if when == "before":
        pipe.enable_model_cpu_offload()
        accelerate_pipeline(pipe)
    else:
        accelerate_pipeline(pipe.to("cuda"))
        entry.call(pipe)
        pipe.enable_model_cpu_offload()
    for _ in range(2):
        assert _difference(entry.call(pipe), expected) < 5e-3
    assert pipe.transformer.device.type == "cpu"
    pipe.acceleration.remove()
    assert _difference(entry.call(pipe), expected) == 0


def test_a_pipeline_moved_to_the_gpu_after_acceleration_is_planned_for_it():
    entry = TINY["flux_dev"]
    stock = entry.call(entry.build().to("cuda"))
    pipe = accelerate_pipeline(entry.build())
    assert pipe.acceleration.plan.hardware.device == "cpu"
    assert _difference(entry.call(pipe.to("cuda")), stock) < 5e-3
    assert pipe.acceleration.plan.hardware.device == "cuda"
    assert pipe.acceleration.plan["compile"].on


def test_a_report_times_the_device():
    entry = TINY["flux_dev"]
    pipe = accelerate_pipeline(entry.build().to("cuda"))
    for _ in range(2):
        entry.call(pipe, steps=4)
    report = pipe.acceleration.report()
    assert len(report.steps) == 4
    assert report.memory
    assert sum(report.stages.values()) == pytest.approx(report.seconds)
