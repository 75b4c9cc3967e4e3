"""What each technique adds to one forward: switched on in order, and each left out of all.

    python -m benchmarks.ablation --output benchmarks/results --models flux.1-dev [qwen-image wan2.1-1.3b hunyuan-video]

Weights are random at the published sizes; speed does not depend on them. Every variant is timed twice, the second time
in reverse order, since the GPU's clock falls as it warms up; times are medians of rows of forwards, in milliseconds.
`change` is the relative change of the output against stock. `--profile balanced` adds the kernels that take
longest in that tier, without CUDA graphs.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

from pipeboost import CompileConfig, accelerate_pipeline
from pipeboost.bench.environment import versions
from pipeboost.bench.full_size import build_pipeline, forward_inputs, full_size_named
from pipeboost.core.config import REWRITES
from pipeboost.core.hardware import detect_hardware

OFF: dict[str, Any] = {"attention": None, "compile": None, "quantize": None, "cache": None, "offload": None}
DEVICE = torch.device("cuda", 0)


def variants(chosen: list[str]) -> dict[str, dict[str, Any] | str]:
    """The settings of each variant, by name; a word for stock and tuned stock."""

    def compiled(*rewrites: str, graphs: Any = True) -> dict[str, Any]:
        return {"compile": CompileConfig(rewrites=rewrites, graphs=graphs)}

    found: dict[str, dict[str, Any] | str] = {
        "stock": "stock",
        "tuned stock": "tuned",
        "attention": {**OFF, "attention": "auto"},
        "+ compile": compiled(graphs=False),
        "+ graphs": compiled(),
        "+ all rewrites": compiled(*REWRITES),
        "all but graphs": compiled(*REWRITES, graphs=False),
        **{f"all but {name}": compiled(*(each for each in REWRITES if each != name)) for name in REWRITES},
        "lossless": {},
        "balanced": {"quality": "balanced"},
        "balanced linears": {"quality": "balanced", "attention": "flash3"},
    }
    return {name: settings for name, settings in found.items() if not chosen or name in chosen}


@torch.no_grad()
def main() -> None:
    """The models that were asked for; the file is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["flux.1-dev"])
    parser.add_argument("--variants", nargs="*", default=[])
    parser.add_argument("--once", action="store_true", help="time each variant once")
    parser.add_argument("--profile", metavar="QUALITY", help="the tier whose kernels are listed")
    settings = parser.parse_args()
    settings.output.mkdir(parents=True, exist_ok=True)
    hardware = detect_hardware(DEVICE)
    name = hardware.name.lower().replace("nvidia ", "").replace(" ", "-")
    path = settings.output / f"ablation_{name}_{date.today().isoformat()}.json"
    found: dict[str, Any] = {"hardware": str(hardware), "versions": versions(), "models": {}}
    for model in settings.models:
        found["models"][model] = _measure(model, variants(settings.variants), settings.once)
        if settings.profile:
            (settings.output / f"profile_{model}.txt").write_text(_profile(model, settings.profile))
        path.write_text(json.dumps(found, indent=2, default=str))
        torch.cuda.empty_cache()


def _measure(model: str, chosen: dict[str, dict[str, Any] | str], once: bool) -> dict[str, Any]:
    size = full_size_named(model)
    pipe = build_pipeline(size, device=DEVICE, dtype=torch.bfloat16)
    inputs = forward_inputs(size, device=DEVICE, dtype=torch.bfloat16)
    reference = pipe.transformer(**inputs)[0].float()
    rows: dict[str, dict[str, Any]] = {name: {"ms": []} for name in chosen}
    for name in [*chosen] if once else [*chosen, *reversed(chosen)]:
        row = rows[name]
        start = time.perf_counter()
        try:
            with _applied(pipe, chosen[name]):
                output = pipe.transformer(**inputs)[0].float()
                row.setdefault("first seconds", round(time.perf_counter() - start, 1))
                row["change"] = float((output - reference).norm() / reference.norm())
                torch.cuda.reset_peak_memory_stats()  # of the forwards that are timed, not of getting there
                row["ms"].append(_milliseconds(pipe.transformer, inputs))
                row["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:400]
        print(model, name, json.dumps(row), flush=True)
    if not torch.equal(pipe.transformer(**inputs)[0].float(), reference):
        print(model, "IS NOT STOCK AGAIN", flush=True)
    return rows


@contextlib.contextmanager
def _applied(pipe: Any, settings: dict[str, Any] | str) -> Iterator[None]:
    if settings == "tuned":
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    try:
        if isinstance(settings, str):
            yield
            return
        accelerate_pipeline(pipe, **settings)
        try:
            with pipe.acceleration.open():
                yield
        finally:
            pipe.acceleration.remove()
    finally:
        for module in pipe.transformer.modules():
            module._compiled_call_impl = None


def _milliseconds(model: Any, inputs: dict[str, Any], rows: int = 3) -> float:
    """Of one forward among several in a row, once a trial of graphs is over: the median of some rows."""
    seconds = 0.0
    for warm_up in range(17):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(**inputs)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if warm_up > 3 and seconds > 0.3:
            break
    many = max(2, min(30, round(0.8 / seconds)))
    times = []
    for _ in range(rows):
        start = time.perf_counter()
        for _ in range(many):
            model(**inputs)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / many * 1e3)
    return round(statistics.median(times), 2)


def _profile(model: str, quality: str) -> str:
    size = full_size_named(model)
    pipe = build_pipeline(size, device=DEVICE, dtype=torch.bfloat16)
    inputs = forward_inputs(size, device=DEVICE, dtype=torch.bfloat16)
    accelerate_pipeline(pipe, quality=quality, cache=None, compile=CompileConfig(graphs=False))
    with pipe.acceleration.open():
        for _ in range(3):
            pipe.transformer(**inputs)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            pipe.transformer(**inputs)
            torch.cuda.synchronize()
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
    total = sum(row.self_device_time_total for row in rows)
    lines = [f"{model} {quality}: {total / 1e3:.2f} ms of kernels"]
    lines += [
        f"{row.self_device_time_total / 1e3:8.2f} ms {row.count:5d} x {row.self_device_time_total / row.count:8.1f} us"
        f"  {row.key[:150]}"
        for row in rows[:40]
    ]
    print("\n".join(lines[:26]), flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
