"""What a VAE gains: decoding and encoding, stock and with each technique, in the same precision.

    python -m benchmarks.vae --output benchmarks/results [--cases flux-decode wan-81 ...] [--seconds 230]

Weights are random at the published sizes; speed does not depend on them. The variants of a case take turns (A B C A B C
…), each runs once a round, and the median counts. `first` is a variant's first run, compiling included. `error` is the
relative error of a result in bfloat16 to that of the same weights in float32; stock's own is the floor. `peak` is
device memory beyond weights and input. A variant that fails is printed with the reason; one for whose first run there
is no time left, by what it takes elsewhere, is left out and named.

`--tiny` tries all of it on a CPU with small models.
"""

import argparse
import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, AutoencoderKLQwenImage, AutoencoderKLWan
from torch import nn

from benchmarks.full_pipelines import FLUX_VAE, random_weights
from pipeboost.contract.call import open_call
from pipeboost.contract.registry import families
from pipeboost.core.config import CompileConfig
from pipeboost.core.families import Family
from pipeboost.core.hardware import detect_hardware
from pipeboost.core.ledger import Ledger
from pipeboost.features.compile.vae import REWRITES, rewrite_vae
from pipeboost.features.compile.vae.apply import CompiledVae, compile_vae
from pipeboost.features.compile.vae.decide import VaeSettings

ROUNDS, ROUNDS_OF_LONG_RUNS, LONG = 5, 3, 1.0
"""How often each variant is timed; less often where stock takes more than so many seconds."""
TurnOn = Callable[[nn.Module, contextlib.ExitStack], None]


@dataclass(frozen=True)
class Variant:
    """A technique, or several.

    Attributes:
        turn_on: puts it on a VAE; the stack takes what takes it off.
        seconds: what its first run takes, about, beyond one of stock.
    """

    turn_on: TurnOn
    seconds: float = 1.0


@dataclass(frozen=True)
class Case:
    """One operation of one VAE.

    Attributes:
        family: the model family.
        build: makes the VAE; small ones where its argument says so.
        shape: of the input.
        tiny: the same for small models.
        variants: which are measured, by name.
        decodes: whether it decodes; else it encodes.
        tiled: whether tiling is on.
    """

    family: str
    build: Callable[[bool], nn.Module]
    shape: tuple[int, ...]
    tiny: tuple[int, ...]
    variants: tuple[str, ...]
    decodes: bool = True
    tiled: bool = False


def flux_vae(small: bool) -> nn.Module:
    """The 16-channel VAE of FLUX.1."""
    widths, layers = ((8, 8, 8, 8), 1) if small else ((128, 256, 512, 512), 2)
    sizes = {"block_out_channels": widths, "layers_per_block": layers, "norm_num_groups": min(32, widths[0])}
    return AutoencoderKL(**{**FLUX_VAE, **sizes})


_SMALL_VIDEO: dict[str, Any] = {"base_dim": 8, "num_res_blocks": 1}
_SMALL_HUNYUAN: dict[str, Any] = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
VIDEO = (
    "stock",
    "weights channels_last",
    "causal_conv",
    "causal_conv + channels_last",
    "causal_conv + channels_last + nearest",
    "all rewrites",
    "all rewrites but channels_last",
)
CASES: dict[str, Case] = {
    "flux-decode": Case(
        "flux",
        flux_vae,
        (1, 16, 128, 128),
        (1, 16, 8, 8),
        ("stock", "weights channels_last", "ours compiled"),
    ),
    "flux-encode": Case(
        "flux", flux_vae, (1, 3, 1024, 1024), (1, 3, 64, 64), ("stock", "ours compiled"), decodes=False
    ),
    "qwen-decode": Case(
        "qwen_image",
        lambda small: AutoencoderKLQwenImage(**(_SMALL_VIDEO if small else {})),
        (1, 16, 1, 128, 128),
        (1, 16, 1, 8, 8),
        (*VIDEO, "compiled decoder"),
    ),
    "qwen-encode": Case(
        "qwen_image",
        lambda small: AutoencoderKLQwenImage(**(_SMALL_VIDEO if small else {})),
        (1, 3, 1, 1024, 1024),
        (1, 3, 1, 64, 64),
        ("stock", "all rewrites"),
        decodes=False,
    ),
    "wan-33": Case(
        "wan",
        lambda small: AutoencoderKLWan(**(_SMALL_VIDEO if small else {})),
        (1, 16, 9, 60, 104),
        (1, 16, 3, 4, 6),
        VIDEO,
    ),
    "wan-81": Case(
        "wan",
        lambda small: AutoencoderKLWan(**(_SMALL_VIDEO if small else {})),
        (1, 16, 21, 60, 104),
        (1, 16, 4, 4, 6),
        ("stock", "weights channels_last", "all rewrites"),
    ),
    "hunyuan-33": Case(
        "hunyuan_video",
        lambda small: AutoencoderKLHunyuanVideo(**(_SMALL_HUNYUAN if small else {})),
        (1, 16, 9, 68, 120),
        (1, 16, 2, 34, 34),
        (
            "stock",
            "weights channels_last",
            "ours compiled",
            "compiled blocks",
            "compiled blocks + weights channels_last",
        ),
        tiled=True,
    ),
}


def main() -> None:
    """The cases that were asked for, or all; the files are written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases", "--models", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--variants", nargs="+", help="of each case, those of these names; stock always")
    parser.add_argument("--seconds", type=float, default=230.0, help="for all cases")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--tiny", action="store_true")
    settings = parser.parse_args()
    settings.output.mkdir(parents=True, exist_ok=True)
    device = "cpu" if settings.tiny else "cuda"
    hardware = detect_hardware(device)
    torch._dynamo.config.recompile_limit = 64
    found: dict[str, Any] = {
        "hardware": str(hardware),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "date": date.today().isoformat(),
        "cases": {},
    }
    name = hardware.name.lower().replace("nvidia ", "").replace(" ", "-")
    path = settings.output / f"vae_{name}_{found['date']}.json"
    ends = time.perf_counter() + settings.seconds
    for number, case in enumerate(settings.cases):
        left = (ends - time.perf_counter()) / (len(settings.cases) - number)
        found["cases"][case] = _measure(CASES[case], device, settings, time.perf_counter() + max(left, 20.0))
        path.write_text(json.dumps(found, indent=2))
        table = _table(case, found["cases"][case])
        print(table, flush=True)
        path.with_suffix(".md").write_text(
            f"VAEs on {found['hardware']}, {found['versions']}, {found['date']}, bfloat16\n\n"
            + "\n\n".join(_table(each, rows) for each, rows in found["cases"].items())
            + "\n"
        )


@torch.no_grad()
def _measure(case: Case, device: str, settings: Any, ends: float) -> dict[str, dict[str, Any]]:
    family = next(each for each in families() if each.name == case.family)
    with random_weights(device, torch.bfloat16) as built:
        vae = built(lambda: case.build(settings.tiny))
    if case.tiled:
        vae.enable_tiling()
    states = torch.randn(case.tiny if settings.tiny else case.shape, device=device, dtype=torch.bfloat16)
    exact = _in_float32(case, vae, states)
    rows: dict[str, dict[str, Any]] = {}
    variants = _variants(family, case, settings.backend)
    names = [each for each in case.variants if not settings.variants or each in ("stock", *settings.variants)]
    for name in names:
        seconds = rows["stock"]["first"] if "stock" in rows else 0.0
        if name != "stock" and time.perf_counter() + variants[name].seconds + 4 * seconds > ends:
            rows[name] = {"failure": "left out, no time"}
            continue
        try:
            rows[name] = _first(case, vae, states, exact, variants[name])
        except Exception as error:
            rows[name] = {"failure": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
            if name == "stock":
                raise
        print(f"  {name}: {json.dumps(rows[name])}", flush=True)
    times: dict[str, list[float]] = {name: [] for name, row in rows.items() if "failure" not in row}
    rounds = ROUNDS if rows["stock"]["second"] < LONG else ROUNDS_OF_LONG_RUNS
    for number in range(rounds):
        if number > 1 and time.perf_counter() > ends + 15:
            break
        for name in times:
            with contextlib.ExitStack() as stack:
                variants[name].turn_on(vae, stack)
                times[name].append(_timed(case, vae, states)[0])
    for name, taken in times.items():
        rows[name] |= {"ms": [1000 * each for each in taken], "median": 1000 * statistics.median(taken)}
    return rows


def _first(case: Case, vae: nn.Module, states: torch.Tensor, exact: torch.Tensor, variant: Variant) -> dict[str, Any]:
    """The first two runs of a variant: the seconds they take, and of the second the memory and the error."""
    with contextlib.ExitStack() as stack:
        variant.turn_on(vae, stack)
        first, _ = _timed(case, vae, states)
        before = torch.cuda.memory_allocated() if states.is_cuda else 0
        if states.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        second, result = _timed(case, vae, states)
        peak = torch.cuda.max_memory_allocated() - before if states.is_cuda else 0
    return {"first": first, "second": second, "peak": peak / 2**30, "error": _relative(result, exact)}


def _timed(case: Case, vae: Any, states: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Seconds of one run in a call of ours, and its result."""
    if states.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with open_call(None, owner=None):
        result = _run(case, vae, states)
    if states.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _run(case: Case, vae: Any, states: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = vae.decode(states).sample if case.decodes else vae.encode(states).latent_dist.parameters
    return result


def _in_float32(case: Case, vae: nn.Module, states: torch.Tensor) -> torch.Tensor:
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return _run(case, copy.deepcopy(vae).float(), states.float())
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def _relative(result: torch.Tensor, exact: torch.Tensor) -> float:
    """‖result − exact‖ / ‖exact‖, a frame at a time."""
    assert result.isfinite().all(), "the result is not finite"
    pairs = list(zip(result.flatten(0, 1), exact.flatten(0, 1), strict=True))
    difference = sum(float((ours.double() - true.double()).square().sum()) for ours, true in pairs)
    return float((difference / sum(float(true.double().square().sum()) for _, true in pairs)) ** 0.5)


def _variants(family: Family, case: Case, backend: str) -> Mapping[str, Variant]:
    part = "decoder" if case.decodes else "encoder"

    def rewritten(*rewrites: str) -> Variant:
        def turn_on(vae: nn.Module, stack: contextlib.ExitStack) -> None:
            ledger = Ledger()
            stack.callback(ledger.undo)
            rewrite_vae(vae, family.autoencoder, ledger, rewrites=rewrites)

        return Variant(turn_on, 3.0)

    ours = _kept_compiled(family, backend)
    blocks = _compiled(lambda vae: [vae.decoder.mid_block, *vae.decoder.up_blocks], backend, dynamic=True)
    whole = _compiled(lambda vae: [getattr(vae, part)], backend, dynamic=case.tiled)
    return {
        "stock": Variant(lambda vae, stack: None),
        "weights channels_last": Variant(_channels_last_weights),
        "causal_conv": rewritten("causal_conv"),
        "causal_conv + channels_last": rewritten("causal_conv", "channels_last"),
        "causal_conv + channels_last + nearest": rewritten("causal_conv", "channels_last", "nearest"),
        "all rewrites": rewritten(*REWRITES),
        "all rewrites but channels_last": rewritten(*(each for each in REWRITES if each != "channels_last")),
        "ours compiled": Variant(ours, 60.0 if case.tiled else 12.0),
        "compiled blocks": Variant(blocks, 40.0),
        "compiled blocks + weights channels_last": Variant(_both(_channels_last_weights, blocks), 40.0),
        "compiled decoder": Variant(whole, 40.0),
        "compiled decoder + weights channels_last": Variant(_both(_channels_last_weights, whole), 60.0),
    }


def _both(*turn_on: TurnOn) -> TurnOn:
    def turn_all_on(vae: nn.Module, stack: contextlib.ExitStack) -> None:
        for each in turn_on:
            each(vae, stack)

    return turn_all_on


def _channels_last_weights(vae: nn.Module, stack: contextlib.ExitStack) -> None:
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            layout = torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d
            stack.callback(setattr, module.weight, "data", module.weight.data)
            module.weight.data = module.weight.data.contiguous(memory_format=layout)


def _kept_compiled(family: Family, backend: str) -> TurnOn:
    """As `CompileConfig(vae=True)` does; the graphs stay from one turn to the next."""
    compiled: dict[nn.Module, CompiledVae] = {}
    settings = VaeSettings(compiled=CompileConfig(scope="full", graphs=False, backend=backend))

    def turn_on(vae: nn.Module, stack: contextlib.ExitStack) -> None:
        if vae not in compiled:
            compiled[vae] = compile_vae(vae, settings, family, "a benchmark's", Ledger())
        stack.callback(_refuse_eager, compiled[vae])
        for model in compiled[vae].parts:
            model.every_call = True
            stack.callback(setattr, model, "every_call", False)

    return turn_on


def _refuse_eager(compiled: CompiledVae) -> None:
    eager = compiled.summary()["eager"]
    if eager:
        raise RuntimeError(f"ran eager: {eager}")


def _compiled(select: Callable[[Any], Iterable[nn.Module]], backend: str, *, dynamic: bool) -> TurnOn:
    """torch.compile of modules; what was compiled stays from one turn to the next."""
    made: dict[nn.Module, Any] = {}

    def turn_on(vae: nn.Module, stack: contextlib.ExitStack) -> None:
        for module in select(vae):
            if module not in made:
                module.compile(backend=backend, dynamic=dynamic or None)
                made[module] = module._compiled_call_impl
            module._compiled_call_impl = made[module]
            stack.callback(setattr, module, "_compiled_call_impl", None)

    return turn_on


def _table(case: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        f"| {case} | ms median (min–max) | over stock | first run s | peak GiB | error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        if "failure" in row:
            lines.append(f"| {name} | {row['failure']} | | | | |")
            continue
        span = f"{row['median']:.1f} ({min(row['ms']):.1f}–{max(row['ms']):.1f})"
        gain = rows["stock"]["median"] / row["median"]
        lines.append(f"| {name} | {span} | {gain:.2f}x | {row['first']:.1f} | {row['peak']:.2f} | {row['error']:.2e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
