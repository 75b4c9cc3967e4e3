"""`pipeboost bench`: full-size models with random weights, stock against tuned stock against ours, in one run."""

from __future__ import annotations

import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pipeboost.acceleration import accelerate_pipeline
from pipeboost.bench.benchmark import benchmark, check_counts
from pipeboost.bench.full_size import full_size_named, full_sizes, parameter_count
from pipeboost.cli.flags import Device
from pipeboost.core.config import TIERS
from pipeboost.core.errors import ConfigurationError, not_one_of
from pipeboost.core.families import FullSize
from pipeboost.core.hardware import detect_hardware, device_type
from pipeboost.core.user_files import make_folder, user_path
from pipeboost.quality.tuned_stock import forget_compiled


def run_bench(
    models: Annotated[list[str], typer.Argument(help="published sizes, such as flux.1-dev; `pipeboost bench list`")],
    tiers: Annotated[
        list[str] | None, typer.Option("--tier", help="quality tier to measure; may be given several times")
    ] = None,
    steps: Annotated[int, typer.Option(help="also time a denoising loop of this many steps; 0: not")] = 0,
    repeats: Annotated[int, typer.Option(help="timed forwards per variant")] = 7,
    output: Annotated[Path, typer.Option(help="folder for the JSON and Markdown results")] = Path("benchmarks/results"),
    device: Device = "auto",
) -> int:
    """Full-size random weights: stock, tuned stock and ours in one run, with errors and shares of the bound."""
    if set(models) == {"list"}:
        for size in full_sizes().values():
            print(f"{size.name:<16} {size.workload}")
        return 0
    if "list" in models:
        others = " ".join(name for name in models if name != "list")
        raise ConfigurationError(f"`pipeboost bench list` takes no other name; to measure: `pipeboost bench {others}`")
    sizes = [full_size_named(name) for name in dict.fromkeys(models)]
    for tier in (tiers := tiers or ["lossless"]):
        if tier not in TIERS:
            raise not_one_of("tier", tier, TIERS)
    check_counts(repeats=repeats, steps=steps)
    hardware = detect_hardware(device_type(device))
    dtype, itemsize = ("bf16", 2) if hardware.device == "cuda" else ("fp32", 4)
    for size in sizes:
        if (needed := itemsize * parameter_count(size)) > hardware.memory:
            raise ConfigurationError(
                f"{size.name} has {needed / 2**30:.0f} GiB of weights in {dtype}, more than {hardware} holds; use a "
                "smaller size of `pipeboost bench list` or a device with more memory"
            )
    output, tiers, device = user_path(output, "--output"), [*dict.fromkeys(tiers)], hardware.device
    make_folder(output, f"--output {output}")
    return measure_sizes(sizes, tiers=tiers, steps=steps, repeats=repeats, output=output, device=device)


def measure_sizes(
    sizes: Sequence[FullSize], *, tiers: Sequence[str], steps: int, repeats: int, output: Path, device: str
) -> int:
    """Measure each size with `accelerate_pipeline`, and write its files as soon as it is done.

    Returns:
        0 where everything could be measured, else 1; what could not is printed and does not stop the rest.
    """
    failures: list[str] = []
    start = time.perf_counter()
    for size in sizes:
        words = ["pipeboost", "bench", size.name, *(word for tier in tiers for word in ("--tier", tier))]
        words += ["--steps", str(steps), "--repeats", str(repeats), "--device", device]
        try:
            result = benchmark(
                size,
                accelerate=accelerate_pipeline,
                tiers=tiers,
                repeats=repeats,
                steps=steps,
                device=device,
                report=lambda text: _log(f"[{time.perf_counter() - start:6.1f} s] {text}"),
                command=shlex.join(words),
            )
        except Exception as error:
            failures.append(f"{size.name}: {type(error).__name__}: {error}")
            traceback.print_exc()
            continue
        finally:
            forget_compiled()
        paths = result.write(output)
        failures += [f"{size.name}: {failure}" for failure in result.failures]
        print(f"\n{size.name} on {result.hardware}, {size.workload}\n\n{result.table()}\n")
        print("written: " + ", ".join(str(path) for path in paths) + "\n", flush=True)
    for failure in failures:
        _log(f"failed: {failure}")
    return 1 if failures else 0


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
