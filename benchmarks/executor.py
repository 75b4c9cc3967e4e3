"""What watching a call costs, whether stage times add up, and what overlapping requests gains; at full size on a GPU.

    python -m benchmarks.executor --output benchmarks/results [--models flux wan] [--parts watching stages overlap]

Weights are random at the published sizes; speed does not depend on them. Everything in one table is one run, and each
part is written as soon as it is done. On an H100 FLUX takes 40 s to build and compile, 20 s for `watching`, 5 s for
`stages` and 90 s for `overlap`; Wan 30 s, 5 s and 120 s (`watching` is of FLUX alone).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch

from benchmarks.full_pipelines import flux_pipeline, wan_pipeline
from pipeboost import accelerate_pipeline
from pipeboost.core.hardware import detect_hardware

PARTS = ("watching", "stages", "overlap")
FLUX_CALL = {"height": 1024, "width": 1024, "num_inference_steps": 28, "guidance_scale": 3.5}
WAN_CALL = {"height": 480, "width": 832, "num_frames": 81}


def main() -> None:
    """The parts that were asked for, or both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--wan-steps", type=int, default=4)
    parser.add_argument("--wan-guidance", type=float, default=1.0, help="above 1: two branches a step")
    parser.add_argument("--models", nargs="+", choices=("flux", "wan"), default=["flux", "wan"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    settings = parser.parse_args()
    settings.output.mkdir(parents=True, exist_ok=True)
    if "flux" in settings.models:
        measure("flux.1-dev", flux_pipeline("cuda"), FLUX_CALL, settings.parts, settings.requests, settings.output)
        torch.cuda.empty_cache()
    if "wan" in settings.models:
        call = WAN_CALL | {"num_inference_steps": settings.wan_steps, "guidance_scale": settings.wan_guidance}
        parts = [part for part in settings.parts if part != "watching"]
        measure("wan2.1-1.3b", wan_pipeline("cuda"), call, parts, settings.requests, settings.output)


def measure(model: str, pipe: Any, call: dict[str, Any], parts: list[str], requests: int, folder: Path) -> None:
    """The figures of one pipeline; `watching` times stock against tier `exact`, which only watches."""
    pipe.set_progress_bar_config(disable=True)
    found: dict[str, Any] = {"call": call, "requests": requests}
    if "watching" in parts:
        found["watching"] = _cost_of_watching(pipe, call)
        print(found["watching"], flush=True)
        _write(model, folder, found)
    if "stages" not in parts and "overlap" not in parts:
        return
    accelerate_pipeline(pipe, quality="lossless")
    pipe.acceleration.warm_up(**_request(call, -1))
    if "stages" in parts:
        found |= _stages(pipe, call)
        _write(model, folder, found)
    if "overlap" in parts:
        found["overlap"] = _overlap(pipe, call, requests)
        print(found["overlap"], flush=True)
        _write(model, folder, found)
    pipe.acceleration.remove()


def _stages(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    with pipe.acceleration.profiled():
        seconds, _ = _timed(lambda: pipe(**_request(call, 0)))
    report = pipe.acceleration.report()
    total = sum(report.stages.values())
    print(report, f"\nwall {seconds:.3f} s, stages {total:.3f} s", flush=True)
    return {
        "stages": {"wall_seconds": seconds, "sum_of_stages": total, **report.stages},
        "memory": {name: vars(memory) for name, memory in report.stage_memory.items()},
        "weights": report.components,
    }


def _cost_of_watching(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Whole calls, stock and watched in turn, after one of each."""
    stock: list[float] = []
    watched: list[float] = []
    call = {**call, "num_inference_steps": 10}
    for repeat in range(4):
        seconds, _ = _timed(lambda: pipe(**_request(call, 0)))
        accelerate_pipeline(pipe, quality="exact", reuse=None)
        ours, _ = _timed(lambda: pipe(**_request(call, 0)))
        pipe.acceleration.remove()
        if repeat:
            stock.append(seconds)
            watched.append(ours)
    cost = statistics.median(watched) / statistics.median(stock) - 1
    return {"stock_seconds": stock, "watched_seconds": watched, "cost": cost}


def _overlap(pipe: Any, call: dict[str, Any], requests: int) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats()
    alone_seconds, alone = _timed(lambda: _all(pipe, call, requests, overlap=False))
    alone_peak = _peak_gib()
    list(pipe.acceleration.run_many([_request(call, -seed) for seed in range(2, 4)]))  # fills the streams' memory
    together_seconds, together = _timed(lambda: _all(pipe, call, requests, overlap=True))
    return {
        "one_by_one_seconds": alone_seconds,
        "overlapped_seconds": together_seconds,
        "throughput": alone_seconds / together_seconds,
        "identical": all(map(_same, alone, together)),
        "one_by_one_peak_gib": alone_peak,
        "overlapped_peak_gib": _peak_gib(),
    }


def _peak_gib() -> dict[str, float]:
    """The most allocated and reserved since the last time."""
    peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    torch.cuda.reset_peak_memory_stats()
    return {name: peak / 2**30 for name, peak in peaks.items()}


def _all(pipe: Any, call: dict[str, Any], requests: int, *, overlap: bool) -> list[Any]:
    listed = [_request(call, seed) for seed in range(requests)]
    return [output[0] for output in pipe.acceleration.run_many(listed, overlap=overlap)]


def _request(call: dict[str, Any], seed: int) -> dict[str, Any]:
    """A request of its own prompt, so that no embedding is reused."""
    generator = torch.Generator("cpu").manual_seed(abs(seed))
    return {**call, "prompt": f"a cat in weather number {seed}", "generator": generator}


def _same(one: Any, other: Any) -> bool:
    import numpy as np

    return bool(np.array_equal(np.asarray(one), np.asarray(other)))


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _write(model: str, folder: Path, found: dict[str, Any]) -> None:
    hardware = detect_hardware("cuda")
    found = {
        "model": model,
        "hardware": str(hardware),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "date": date.today().isoformat(),
        **found,
    }
    name = hardware.name.lower().replace("nvidia ", "").replace(" ", "-")
    path = folder / f"executor_{model}_{name}_{found['date']}.json"
    path.write_text(json.dumps(found, indent=2, default=str))
    print(f"written: {path}", flush=True)


if __name__ == "__main__":
    main()
