"""A folder's plan is the plan of the pipeline that is loaded from it: one function reads both, and no weights."""

import functools

import pytest
import torch

from pipeboost.cli.plan import _without_weights, plan_of
from pipeboost.contract.registry import family_of
from pipeboost.core.config import AccelerationConfig
from pipeboost.core.hardware import Hardware
from pipeboost.model_reader import model_info
from pipeboost.plan import make_plan
from tests.pipelines.tiny import TINY

CPU = Hardware("cpu", "CPU with 2 cores", None, 24 * 2**30, 1, False, True)
H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", (9, 0), 80 * 2**30, 1, False, True)
# One of each family, a ControlNet, experts, processors that call their kernel themselves, and no family.
NAMES = ("flux_controlnet", "qwen_image", "wan22_t2v", "hunyuan_video", "hunyuan_video_15", "z_image", "ltx2", "sd3")
TIERS = ("exact", "lossless", "balanced", "fast")


@pytest.mark.parametrize("name", [*NAMES, "pixart_sigma"])
def test_a_folder_has_the_plan_of_its_loaded_pipeline_line_by_line(name, tmp_path, monkeypatch):
    pipe = TINY[name].build()
    pipe.save_pretrained(tmp_path)
    family = family_of(pipe)
    monkeypatch.setattr("pipeboost.model_reader.has_cuda", lambda: False)
    monkeypatch.setattr("pipeboost.cli.plan._without_weights", functools.cache(_without_weights))
    for hardware in (CPU, H100):
        for ranks in (1, 2):
            info = model_info(pipe, family, torch.device(hardware.device), ranks=ranks)
            for quality in TIERS if ranks == 1 else ("lossless",):
                loaded = str(make_plan(AccelerationConfig(quality=quality), hardware, family, info))
                stored = str(plan_of(str(tmp_path), quality=quality, hardware=hardware, ranks=ranks))
                assert stored.splitlines() == loaded.splitlines()
