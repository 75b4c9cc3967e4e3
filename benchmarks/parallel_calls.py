"""Whole calls on several GPUs, stage by stage: stock and ours on one GPU, and ours on all.

    torchrun --nproc-per-node 4 -m benchmarks.parallel_calls --output benchmarks/results --models wan [--steps 50]

Full-size pipelines with encoders and VAE, random weights (`benchmarks.full_pipelines`). Each variant makes a short call
first, which compiles and connects; then one is timed, with a new prompt, so that its text is encoded; then nine of one
step, each with a new prompt, whose encoding has a median. What runs on one GPU runs on every rank at the same time;
times are those of the first rank. Peak memory is that of each rank, on top of the weights that it holds.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_pipelines import flux_pipeline, wan_pipeline
from benchmarks.parallel import Results, everywhere, layout_of
from pipeboost import ParallelConfig, accelerate_pipeline
from pipeboost.distributed import local_device

BUILD = {"flux": flux_pipeline, "wan": wan_pipeline}
CALLS: dict[str, dict[str, Any]] = {
    "flux": {"height": 1024, "width": 1024, "num_inference_steps": 28, "guidance_scale": 3.5},
    "wan": {"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0},
}


def main() -> None:
    """Each model after another; rows are written as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["flux", "wan"], choices=tuple(BUILD))
    parser.add_argument("--layouts", nargs="+", type=layout_of, help="such as cfg=2,ulysses=2 tensor=4; default: auto")
    parser.add_argument("--steps", type=int, help="denoising steps; default: as the model's card says")
    parser.add_argument("--steps-on-one", type=int, help="of ours on one GPU, where only the time of a step is wanted")
    parser.add_argument("--small", action="store_true", help="a few thousand parameters and pixels, to try it on a CPU")
    settings = parser.parse_args()
    settings.output.mkdir(parents=True, exist_ok=True)
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    results = Results(settings.output, device, kind="parallel_calls")
    for model in settings.models:
        call = dict(CALLS[model])
        if settings.steps is not None:
            call["num_inference_steps"] = settings.steps
        if settings.small:
            call |= {"height": 64, "width": 64} | ({"num_frames": 5} if model == "wan" else {})
        _measure(model, call, settings, device, results)


def _measure(model: str, call: dict[str, Any], settings: argparse.Namespace, device: Any, results: Results) -> None:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    pipe = BUILD[model](device, dtype, small=settings.small)  # type: ignore[operator]
    _run(pipe, model, call, "stock, 1 GPU", results, device)
    for layout in (None, *(settings.layouts or ["auto"])):
        parallel = ParallelConfig(**layout) if isinstance(layout, dict) else layout
        accelerate_pipeline(pipe, parallel=parallel)
        results.tell(str(pipe.acceleration.plan))
        if layout is None:
            steps = settings.steps_on_one or call["num_inference_steps"]
            _run(pipe, model, {**call, "num_inference_steps": steps}, "ours, 1 GPU", results, device)
        else:
            choice = pipe.acceleration.plan["parallel"].choice
            _run(pipe, model, call, f"ours, {choice}", results, device)
        pipe.acceleration.remove()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _run(pipe: Any, model: str, call: dict[str, Any], variant: str, results: Results, device: torch.device) -> None:
    def run(prompt: str, **changed: Any) -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        pipe(prompt=prompt, generator=generator, output_type="pt", **{**call, **changed})

    run("a fox in the snow", num_inference_steps=4)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    run("two robots that fly over a city at night")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    report = pipe.acceleration.report() if hasattr(pipe, "acceleration") else None
    results.add(
        part=model,
        call={name: value for name, value in call.items() if isinstance(value, (int, float))},
        variant=variant,
        seconds=seconds,
        stages={} if report is None else report.stages,
        encoding_ms=None if report is None else encoding_ms(pipe, call),
        step_ms=None if report is None else 1e3 * sorted(report.steps)[len(report.steps) // 2],
        peak_gib=everywhere(peak),
        weights_gib=everywhere(
            sum(
                tensor.numel() * tensor.element_size()
                for component in pipe.components.values()
                if isinstance(component, torch.nn.Module)
                for tensor in component.parameters()
            )
            / 2**30
        ),
        graphs=None if report is None else report.graphs,
    )


def encoding_ms(pipe: Any, call: dict[str, Any], prompts: int = 9) -> float:
    """Median time of the text encoding of an accelerated pipeline, over calls of one step with prompts of their own."""
    times = []
    for number in range(prompts):
        pipe(prompt=f"{number} foxes in the snow", output_type="latent", **{**call, "num_inference_steps": 1})
        times.append(1e3 * pipe.acceleration.report().stages["text encoding"])
    return statistics.median(times)


if __name__ == "__main__":
    main()
