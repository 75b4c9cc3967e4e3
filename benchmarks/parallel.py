"""One denoising step on several GPUs: stock, stock's own context parallelism with compile, and ours; and the VAE.

    torchrun --nproc-per-node 2 -m benchmarks.parallel --output benchmarks/results [--parts smoke flux qwen vae]
    torchrun --nproc-per-node 2 -m benchmarks.parallel --output benchmarks/results --parts flux --stock-parallel

Weights are random at the published sizes; speed does not depend on them. A step is one forward, or, where the family
uses guidance, what a step with both branches adds to a loop: `STEPS` has the two lengths that are compared. What runs
on one GPU runs on every rank at the same time. Diffusers' own parallelism has no inverse, so it runs by itself. Rows
are added to those that the day's file has. Times are medians of seven (of three loops; of Wan 14B one), of the slowest
rank. `smoke` runs tiny pipelines on the GPUs in every layout first, and compares their pictures with one GPU's.
"""

import argparse
import contextlib
import copy
import gc
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist

from pipeboost import CompileConfig, ParallelConfig, accelerate_pipeline
from pipeboost.bench.full_size import build_pipeline, call_arguments, forward_inputs, full_size_named
from pipeboost.core.families import FullSize
from pipeboost.core.hardware import detect_hardware
from pipeboost.distributed import local_device, world
from pipeboost.quality.timing import time_runs

MODELS = {
    "flux": "flux.1-dev",
    "qwen": "qwen-image",
    "wan": "wan2.1-1.3b",
    "wan14": "wan2.1-14b",
    "hunyuan": "hunyuan-video",
}
STEPS = {"qwen": (4, 12), "wan": (2, 6), "wan14": (1, 3)}
"""Of two loops with guidance, whose difference is that of the steps; a step of Wan takes long."""


def main() -> None:
    """The parts that were asked for, one after another; each is written as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--parts", nargs="+", default=["smoke", "flux", "qwen", "vae"], choices=("smoke", "vae", *MODELS)
    )
    parser.add_argument(
        "--stock-parallel", action="store_true", help="Diffusers' context parallelism, and nothing else"
    )
    parser.add_argument("--without-graphs", action="store_true", help="ours without CUDA graphs, too")
    parser.add_argument(
        "--layouts", nargs="+", type=layout_of, help="such as cfg=2,ulysses=2 ring=4; default: by model"
    )
    settings = parser.parse_args()
    settings.output.mkdir(parents=True, exist_ok=True)
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    results = Results(settings.output, device)
    for part in settings.parts:
        began = time.perf_counter()
        if part == "smoke":
            smoke(device, results)
        elif part == "vae":
            vae(device, results)
        else:
            graphs = (False, "auto") if settings.without_graphs else ("auto",)
            denoiser(part, device, results, settings.layouts, graphs, stock_parallel=settings.stock_parallel)
        results.tell(f"{part} took {time.perf_counter() - began:.0f} s")
        gc.collect()
        torch.cuda.empty_cache()


class Results:
    """Rows of one run, written by the first rank as they come."""

    def __init__(self, folder: Path, device: torch.device, *, kind: str = "parallel") -> None:
        everyone = world()
        self.ranks, self._first = everyone.size, everyone.rank == 0
        hardware = detect_hardware(device)
        self._content: dict[str, Any] = {
            "hardware": str(hardware),
            "ranks": everyone.size,
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
            "date": date.today().isoformat(),
            "rows": [],
        }
        name = hardware.name.lower().replace("nvidia ", "").replace(" ", "-")
        self._path = folder / f"{kind}_{everyone.size}x{name}_{self._content['date']}.json"
        if self._path.exists():
            self._content["rows"] = json.loads(self._path.read_text())["rows"]

    def add(self, **row: Any) -> None:
        """Note one row."""
        self._content["rows"].append(row)
        if self._first:
            self._path.write_text(json.dumps(self._content, indent=2))
            print(row, flush=True)

    def tell(self, text: str) -> None:
        """Say something once."""
        if self._first:
            print(text, flush=True)


def smoke(device: torch.device, results: Results) -> None:
    """Tiny pipelines, whole calls in bfloat16's place float32, in every layout of this number of ranks."""
    from tests.pipelines.tiny import TINY

    layouts = [{"ulysses": results.ranks}, {"ring": results.ranks}, {"tensor": 2}, {"cfg": 2}]
    if results.ranks == 4:
        layouts = [{"ulysses": 4}, {"ring": 4}, {"ulysses": 2, "ring": 2}, {"cfg": 2, "ulysses": 2}, {"tensor": 4}]
    for name in ("qwen_image", "wan22_t2v"):
        entry = TINY[name]
        pipe = entry.build().to(device)
        with torch.no_grad():
            stock = entry.call(pipe, output_type="pt")
            for layout in layouts:
                accelerate_pipeline(pipe, parallel=ParallelConfig(**layout), reuse=None, compile=None)
                shared = entry.call(pipe, output_type="pt")
                pipe.acceleration.remove()
                after = entry.call(pipe, output_type="pt")
                results.add(
                    part="smoke",
                    pipeline=name,
                    layout=layout,
                    difference=float((shared - stock).abs().max()),
                    removed=float((after - stock).abs().max()),
                )


def layout_of(text: str) -> dict[str, int]:
    """`"cfg=2,ulysses=2"` as degrees."""
    return {axis: int(degree) for axis, degree in (part.split("=") for part in text.split(","))}


def denoiser(
    part: str,
    device: torch.device,
    results: Results,
    layouts: Sequence[Mapping[str, int]] | None,
    graphs: Sequence[bool | str],
    *,
    stock_parallel: bool,
) -> None:
    """A step of one model: stock and ours on one GPU, ours in each layout; or stock's own parallelism alone."""
    size: FullSize = full_size_named(MODELS[part])
    pipe = build_pipeline(size, device=device, dtype=torch.bfloat16)
    inputs = forward_inputs(size, device=device, dtype=torch.bfloat16)
    branches = 2 if part in STEPS else 1
    count = results.ranks
    if layouts is None and branches == 2:
        layouts = [{"cfg": 2} if count == 2 else {"cfg": 2, "ulysses": count // 2}]
    elif layouts is None:
        layouts = [{"ulysses": count}, {"ring": count}]

    counts = STEPS.get(part, ())
    loops = {steps: call_arguments(pipe, inputs, steps=steps) for steps in counts}

    def forward() -> Any:
        return pipe.transformer(**inputs)[0]

    def timed() -> tuple[float, float, Any]:
        """Milliseconds of a step, those that a loop takes outside its steps, and an output."""
        if branches == 1:
            timing, output = time_runs(forward, device, repeats=7, warm_ups=4)
            return max(everywhere(timing.median)), 0.0, output
        totals = []
        for arguments in loops.values():
            timing, output = time_runs(
                lambda given=arguments: pipe(**given)[0], device, repeats=1 if part == "wan14" else 3, warm_ups=0
            )
            totals.append(max(everywhere(timing.median)))
        step = (totals[1] - totals[0]) / (counts[1] - counts[0])
        return step, totals[0] - counts[0] * step, output

    def add(variant: str, reference: torch.Tensor | None = None) -> torch.Tensor:
        began = time.perf_counter()
        forward() if branches == 1 else pipe(**loops[counts[0]])
        cold = time.perf_counter() - began
        if branches == 2:
            pipe(**loops[counts[1]])
        step, beside, output = timed()
        error = None if reference is None else float((output - reference).norm() / reference.norm())
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        results.add(
            part=part,
            model=size.name,
            workload=size.workload,
            variant=variant,
            step_ms=step,
            beside_steps_ms=beside,
            peak_gib=peak,
            error_to_stock=error,
            cold_s=cold,
        )
        return output

    with torch.no_grad():
        if stock_parallel:
            with _default_group():
                pipe.transformer.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=count))
                pipe.transformer.compile_repeated_blocks(fullgraph=True)
                add(f"stock, ulysses={count} and compile")
            return
        stock = add("stock, 1 GPU").clone()
        with accelerated(pipe, None, opened=branches == 1):
            add("ours, 1 GPU", stock)
        for layout, wanted in itertools.product(layouts, graphs):
            named = ", ".join(f"{axis}={degree}" for axis, degree in layout.items())
            with accelerated(pipe, layout, opened=branches == 1, graphs=wanted):
                add(f"ours, {named}{' and CUDA graphs' if wanted else ''}", stock)


def vae(device: torch.device, results: Results) -> None:
    """Wan's VAE: 81 frames of 480 times 832, decoded by one GPU and by all."""
    from pipeboost.contract.call import open_call
    from pipeboost.contract.registry import families
    from pipeboost.core.ledger import Ledger
    from pipeboost.distributed import Mesh
    from pipeboost.features.parallel.vae import parallelize_vae

    family = next(family for family in families() if family.name == "wan")
    with torch.device(device):
        autoencoder = diffusers.AutoencoderKLWan().to(torch.bfloat16).eval()
    latents = torch.randn(1, 16, 21, 60, 104, device=device, dtype=torch.bfloat16)
    mesh = Mesh({"ulysses": results.ranks}, device=device)
    if results.ranks > 1:
        mesh.group("ulysses").broadcast(latents, 0)
        for parameter in autoencoder.parameters():
            mesh.group("ulysses").broadcast(parameter.data, 0)

    def decode() -> torch.Tensor:
        return autoencoder.decode(latents, return_dict=False)[0]

    with torch.no_grad(), Ledger() as ledger:
        timing, stock = time_runs(decode, device, repeats=3, warm_ups=1)
        stock_peak = _peak(device)
        exact = copy.deepcopy(autoencoder).float().decode(latents.float(), return_dict=False)[0].cpu()

        def error(output: torch.Tensor) -> float:
            return float((output.float().cpu() - exact).norm() / exact.norm())

        results.add(
            part="vae",
            variant="stock, 1 GPU",
            ms=max(everywhere(timing.median)),
            peak_gib=stock_peak,
            error_to_fp32=error(stock),
        )
        parallelize_vae(autoencoder, family.autoencoder, ledger)
        with open_call(None, owner=None, mesh=mesh, device=device):
            timing, shared = time_runs(decode, device, repeats=3, warm_ups=1)
        results.add(
            part="vae",
            variant=f"ours, {results.ranks} GPUs",
            ms=max(everywhere(timing.median)),
            peak_gib=_peak(device),
            error_to_fp32=error(shared),
        )
        ledger.undo()
    mesh.close()


@contextlib.contextmanager
def accelerated(
    pipe: Any, layout: Mapping[str, int] | None, *, opened: bool, graphs: bool | str = "auto"
) -> Iterator[None]:
    """Inside, the pipeline is accelerated; `opened`, its transformer can be called by itself."""
    parallel = None if layout is None else ParallelConfig(**layout)
    accelerate_pipeline(pipe, parallel=parallel, compile=CompileConfig(graphs=graphs))
    try:
        with pipe.acceleration.open() if opened else contextlib.nullcontext():
            yield
    finally:
        pipe.acceleration.remove()
        gc.collect()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _default_group() -> Iterator[None]:
    dist.init_process_group("nccl", device_id=local_device())
    try:
        yield
    finally:
        dist.destroy_process_group()


def everywhere(value: float) -> list[float]:
    """The values of all ranks."""
    from pipeboost.distributed import Group

    everyone = world()
    group = Group(range(everyone.size), "cpu")
    values: list[float] = group.all_gather_objects(value)
    group.close()
    return values


def _peak(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


if __name__ == "__main__":
    main()
