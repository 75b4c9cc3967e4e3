"""The executor on a GPU: device times, memory of each stage, overlap on streams."""

import time

import pytest
import torch

from pipeboost import accelerate_pipeline
from tests.pipelines.tiny import OTHER_PROMPT, PROMPT, TINY, tiny_names

pytestmark = pytest.mark.gpu
FAMILIES = ("flux", "qwen_image", "wan", "hunyuan_video")


@pytest.mark.parametrize("name", ["flux_dev", "wan21_t2v"])
def test_stage_times_add_up_to_the_calls_wall_time(name):
    entry = TINY[name]
    pipe = accelerate_pipeline(entry.build().to("cuda"), quality="exact", reuse=None)
    entry.call(pipe)
    torch.cuda.synchronize()
    start = time.perf_counter()
    entry.call(pipe, steps=20)
    torch.cuda.synchronize()
    wall = time.perf_counter() - start
    report = pipe.acceleration.report()
    assert sum(report.stages.values()) == pytest.approx(report.seconds)
    assert report.seconds == pytest.approx(wall, rel=0.05)


def test_a_profiled_call_knows_each_stages_peak():
    entry = TINY["flux_dev"]
    pipe = accelerate_pipeline(entry.build().to("cuda"), quality="exact", reuse=None)
    with pipe.acceleration.profiled():
        entry.call(pipe)
    memory = pipe.acceleration.report().stage_memory
    assert {"text encoding", "denoising", "decoding"} <= memory.keys()
    for stage in memory.values():
        assert stage.peak is not None
        assert stage.peak >= max(stage.before, stage.after) > 0
    assert memory["decoding"].peak > memory["timestep preparation"].peak


def test_an_ordinary_call_leaves_the_users_peak_counter_alone():
    entry = TINY["flux_dev"]
    pipe = accelerate_pipeline(entry.build().to("cuda"), quality="exact")
    big = torch.empty(2**28, device="cuda")
    peak = torch.cuda.max_memory_allocated()
    del big
    entry.call(pipe)
    assert torch.cuda.max_memory_allocated() == peak


@pytest.mark.parametrize("quality", ["exact", "lossless"])
@pytest.mark.parametrize(
    "name", [n for n in tiny_names(*FAMILIES) if n in ("flux_true_cfg", "wan22_i2v", "qwen_image")]
)
def test_overlapped_requests_give_what_they_give_one_by_one(name, quality):
    entry = TINY[name]
    pipe = accelerate_pipeline(entry.build().to("cuda"), quality=quality, reuse=None)

    def requests():
        prompts = [PROMPT, OTHER_PROMPT]
        return [entry.call_kwargs(seed=seed, prompt=prompts[seed % 2], steps=3) for seed in range(8)]

    alone = [torch.as_tensor(pipe(**request)[0]) for request in requests()]
    together = [torch.as_tensor(output[0]) for output in pipe.acceleration.run_many(requests())]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)
