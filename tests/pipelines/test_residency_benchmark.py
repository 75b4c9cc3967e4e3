"""The full-size builders and the residency benchmark go through their motions at a small size on a CPU."""

import pytest
import torch

from benchmarks.full_pipelines import flux_pipeline, wan_pipeline
from benchmarks.residency import FLUX_SIZES, Run
from pipeboost import accelerate_pipeline
from pipeboost.contract.registry import family_of


@pytest.mark.parametrize(("build", "family"), [(flux_pipeline, "flux"), (wan_pipeline, "wan")])
def test_a_small_build_has_every_component_and_runs(build, family):
    pipe = build("cpu", torch.float32, small=True)
    assert family_of(pipe).name == family
    call = {"prompt": "a fox", "num_inference_steps": 1, "height": 64, "width": 64, "output_type": "pt"}
    call |= {"num_frames": 5} if family == "wan" else {}
    stock = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    accelerate_pipeline(pipe, quality="exact", offload="layerwise")
    assert torch.equal(pipe(**call, generator=torch.Generator().manual_seed(0))[0], stock)


def test_the_parts_of_the_benchmark_run():
    run = Run(torch.device("cpu"), steps=1, cap=24.0, small=True)
    assert "Activations(" in run.activations()["declare"]
    assert run._activations.width == FLUX_SIZES[0][0]
    assert run.peaks()["policies"].keys() == {"resident", "stage", "layerwise"}
    assert run.capped()["rows"]["ours, lossless"]["loads"]
