"""What offload predicts, and what it costs and gains: FLUX.1-dev and Wan2.1-1.3B at full size, random weights.

    python -m benchmarks.residency --output benchmarks/results [--parts activations peaks resident capped wan]

Parts: `activations` measures what the stages of FLUX take on top of the weights, `wan` the same of Wan (both print the
`Activations` for `patches/`); `peaks` compares predicted and measured peaks; `resident` times "auto" with room for
everything against no policy; `capped` times stock's `enable_model_cpu_offload` and its streamed group offload against
ours with 24 GiB. Everything is measured in one run. On a machine without a GPU, `--small` goes through the motions.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading

from benchmarks.full_pipelines import flux_pipeline, wan_pipeline
from pipeboost import OffloadConfig, accelerate_pipeline
from pipeboost.bench.environment import gpu_state, versions
from pipeboost.contract.registry import family_of
from pipeboost.core.families import Activations, Linear
from pipeboost.core.hardware import detect_hardware
from pipeboost.core.seams import add_middleware, remove_middleware
from pipeboost.features.offload.budget import bytes_on, choose_policies, predict, weigh
from pipeboost.features.offload.place import placed_components

PARTS = ("activations", "peaks", "resident", "capped", "wan")
GIB = 2**30
Sizes = tuple[int, int, int]
FLUX_SIZES: tuple[Sizes, Sizes] = ((1024, 1024, 1), (768, 768, 1))
WAN_SIZES: tuple[Sizes, Sizes] = ((832, 480, 81), (832, 480, 33))
CHECKED: Sizes = (1152, 896, 1)
STAGES = ("text encoding", "denoising", "decoding")


def main() -> None:
    """Run the parts that were asked for and write what they found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--cap", type=float, default=24.0, help="GiB in the part 'capped'")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds after which no further part begins")
    parser.add_argument(
        "--small", action="store_true", help="a few parameters, small pictures: only to try this script"
    )
    settings = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    run = Run(device, settings.steps, settings.cap, settings.small)
    found: dict[str, Any] = {
        "date": date.today().isoformat(),
        "hardware": str(detect_hardware(device)),
        "gpu": gpu_state(device),
        "versions": versions(),
        "steps": settings.steps,
        "parts": {},
    }
    settings.output.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    for part in (part for part in PARTS if part in settings.parts):
        if time.perf_counter() - begun > settings.limit:
            print(f"{part}: left out, {settings.limit:.0f} s are over", flush=True)
            continue
        start = time.perf_counter()
        found["parts"][part] = getattr(run, part)()
        found["parts"][part]["took_seconds"] = round(time.perf_counter() - start, 1)
        print(part, json.dumps(found["parts"][part], indent=1), flush=True)
        _write(found, settings.output)


class Run:
    """The parts, and the pipeline that they share."""

    def __init__(self, device: torch.device, steps: int, cap: float, small: bool) -> None:
        self._device = device
        self._steps = steps
        self._cap = cap
        self._small = small
        self._flux: Any = None
        self._activations: Activations | None = None

    def activations(self) -> dict[str, Any]:
        """What the stages of FLUX take on top of the weights, at two sizes."""
        found, self._activations = self._measured(self._pipe(), FLUX_SIZES)
        return found

    def wan(self) -> dict[str, Any]:
        """The same of Wan, with guidance."""
        self._flux = None
        _free()
        return self._measured(wan_pipeline(self._device, small=self._small), WAN_SIZES)[0]

    def peaks(self) -> dict[str, Any]:
        """Predicted and measured peak of each policy, at a size that no prediction was made from."""
        if self._activations is None:
            _, self._activations = self._measured(self._pipe(), FLUX_SIZES)
        needs = replace(self._activations, width=CHECKED[0], height=CHECKED[1])
        pipe, rows = self._pipe(), {}
        weights = weigh(placed_components(pipe), family_of(pipe))
        for policy in ("resident", "stage", "layerwise"):
            expected = max(
                predict(weights, dict.fromkeys(("text_encoders", "transformers", "vae"), policy), needs).values()
            )
            accelerate_pipeline(pipe, quality="exact", reuse=None, offload=policy)
            _free()
            self._call(pipe, CHECKED, steps=2)
            _reset_peak(self._device)
            self._call(pipe, CHECKED, steps=2)
            measured = _peak(self._device)
            pipe.acceleration.remove()
            rows[policy] = {
                "predicted_gib": expected / GIB,
                "measured_gib": measured / GIB,
                "error": expected / measured - 1 if measured else None,
            }
        return {"size": CHECKED, "policies": rows}

    def resident(self) -> dict[str, Any]:
        """Seconds a call with no policy and with `"auto"`, which finds room for everything; in turns."""
        pipe = self._pipe()
        seconds: dict[str, list[float]] = {"none": [], "auto": []}
        self._call(pipe, FLUX_SIZES[0], steps=2)
        for offload in ("none", "auto") * 3:
            accelerate_pipeline(pipe, quality="exact", reuse=None, offload=None if offload == "none" else offload)
            assert not pipe.acceleration.plan["offload"].on
            self._call(pipe, FLUX_SIZES[0], steps=1)
            seconds[offload].append(self._timed(pipe))
            pipe.acceleration.remove()
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        return {"seconds": seconds, "median": medians, "auto_over_none": medians["auto"] / medians["none"]}

    def capped(self) -> dict[str, Any]:
        """Seconds a call and peak under a cap: stock's model offload, cold; ours and stock's group offload, warm."""
        pipe = self._pipe()
        rows: dict[str, Any] = {}
        pipe.to("cpu")
        with _capped(self._device, self._cap):
            if self._device.type == "cuda":
                pipe.enable_model_cpu_offload()
                rows["stock enable_model_cpu_offload"] = self._timed_with_peak(pipe)
                pipe.remove_all_hooks()
                pipe.to("cpu")
                _free()
            start = time.perf_counter()
            accelerate_pipeline(pipe, reuse=None, offload="stage")
            placed = time.perf_counter()
            self._call(pipe, FLUX_SIZES[0], steps=2)
            warm = time.perf_counter()
            rows["ours, lossless"] = {
                **self._timed_with_peak(pipe),
                "placing_seconds": placed - start,
                "warm_up_seconds": warm - placed,
                "loads": [vars(load) for load in pipe.acceleration.report().loads],
            }
            pipe.acceleration.remove()
            weights = weigh(placed_components(pipe), family_of(pipe))
            chosen = choose_policies(OffloadConfig(memory=self._cap), weights, self._activations, 0)
            if self._device.type == "cuda":
                rows["stock apply_group_offloading(use_stream=True)"] = self._group_offloaded(pipe)
        seconds = {name: row["seconds"] for name, row in rows.items()}
        ours = seconds.pop("ours, lossless")
        gains = {name: stock / ours for name, stock in seconds.items()}
        return {"cap_gib": self._cap, "rows": rows, "stock_over_ours": gains, "auto_would_choose": chosen}

    def _group_offloaded(self, pipe: Any) -> dict[str, float]:
        """Stock's streamed group offload, blocks of the transformer and leaves of the rest; there is no way back."""
        self._flux = None
        pipe.to("cpu")
        _free()
        for component in placed_components(pipe).values():
            apply_group_offloading(
                component,
                onload_device=self._device,
                offload_type="block_level" if component is pipe.transformer else "leaf_level",
                num_blocks_per_group=1,
                use_stream=True,
                record_stream=True,
            )
        self._call(pipe, FLUX_SIZES[0], steps=2)  # learns the order in which to fetch ahead
        return self._timed_with_peak(pipe)

    def _pipe(self) -> Any:
        if self._flux is None:
            self._flux = flux_pipeline(self._device, small=self._small)
        self._flux.to(self._device)
        return self._flux

    def _call(self, pipe: Any, size: Sizes, *, steps: int) -> None:
        width, height, frames = (64, 64, min(size[2], 5)) if self._small else size
        arguments: dict[str, Any] = {"width": width, "height": height, "num_inference_steps": steps}
        if size[2] > 1:
            arguments |= {"num_frames": frames, "negative_prompt": "blurry", "guidance_scale": 5.0}
        generator = torch.Generator("cpu").manual_seed(0)
        pipe(prompt="a fox in the snow", generator=generator, output_type="pt", **arguments)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _timed(self, pipe: Any) -> float:
        start = time.perf_counter()
        self._call(pipe, FLUX_SIZES[0], steps=self._steps)
        return time.perf_counter() - start

    def _timed_with_peak(self, pipe: Any) -> dict[str, float]:
        _reset_peak(self._device)
        seconds = self._timed(pipe)
        return {"seconds": seconds, "peak_gib": _peak(self._device) / GIB}

    def _measured(self, pipe: Any, sizes: tuple[Sizes, Sizes]) -> tuple[dict[str, Any], Activations]:
        """Each stage's peak on top of the weights, and the lines through two sizes."""
        weights = bytes_on(self._device, placed_components(pipe).values())
        tables = {size: self._stage_peaks(pipe, size, weights) for size in sizes}
        large, small = (tables[size] for size in sizes)
        pixels = [size[0] * size[1] * size[2] for size in sizes]

        def line(stage: str) -> Linear:
            slope = (large[stage] - small[stage]) / (pixels[0] - pixels[1])
            return Linear(round(large[stage] - slope * pixels[0]), round(slope, 3))

        width, height, frames = sizes[0]
        activations = Activations(
            denoising=line("denoising"),
            decoding=line("decoding"),
            text_encoding=max(large["text encoding"], small["text encoding"]),
            width=width,
            height=height,
            frames=frames,
            source="",
        )
        described = {f"{w}x{h}x{f}": table for (w, h, f), table in tables.items()}
        return {"weights": weights, "bytes_beside_weights": described, "declare": repr(activations)}, activations

    def _stage_peaks(self, pipe: Any, size: Sizes, weights: int) -> dict[str, int]:
        """Peak bytes on top of the weights, from one stage's start to the next one's."""
        self._call(pipe, size, steps=1)  # workspaces that stay
        peaks = dict.fromkeys(STAGES, 0)
        running = [STAGES[0]]

        def begins(stage: str) -> Callable[..., Any]:
            def layer(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
                enter(stage)
                return call_next(*args, **kwargs)

            return layer

        def enter(stage: str | None) -> None:
            peaks[running[0]] = max(peaks[running[0]], _peak(self._device) - weights, 0)
            if stage is not None and stage != running[0]:
                running[0] = stage
                _reset_peak(self._device)

        doors = [(pipe.transformer, "__call__", begins("denoising")), (pipe.vae, "decode", begins("decoding"))]
        for owner, door, layer in doors:
            add_middleware(owner, door, layer, place="component.stages")
        _free()
        _reset_peak(self._device)
        try:
            self._call(pipe, size, steps=2)
            enter(None)
        finally:
            for owner, door, layer in doors:
                remove_middleware(owner, door, layer)
        return peaks


class _capped:  # noqa: N801 - used as a function
    """Torch may allocate this many GiB inside."""

    def __init__(self, device: torch.device, gib: float) -> None:
        self._device = device
        self._gib = gib

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            _free()
            total = torch.cuda.get_device_properties(self._device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self._gib * GIB / total), self._device)

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _write(found: Mapping[str, Any], folder: Path) -> None:
    stem = folder / f"residency_{found['date']}"
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [f"# Residency, {found['date']}", "", f"{found['hardware']}; random weights at the published sizes.", ""]
    for part, result in found["parts"].items():
        lines += [f"## {part}", "", "```json", json.dumps(result, indent=1), "```", ""]
    lines += ["## Versions", "", *(f"- {name} {version}" for name, version in found["versions"].items()), ""]
    stem.with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
