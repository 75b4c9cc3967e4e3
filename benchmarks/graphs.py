"""What CUDA graphs gain: one forward, stock and ours, each with and without a graph, and tuned stock.

    python -m benchmarks.graphs --output benchmarks/results [--cases flux-1024 wan-17 ...]

Weights are random at the published sizes; speed does not depend on them. Milliseconds are of a forward among many in a
row, as in a denoising loop, where the host may run ahead of the device. `launch` is the host's time to launch a forward
over the device's to run it: from 0.9 on graphs="auto" captures without a trial. `quarter` has a quarter of FLUX's
tokens at 1024x1024, as each of four ranks has, but none of the transfers. `tuned stock` is `compile_repeated_blocks` of
Diffusers. On an H100 all cases take about two minutes.
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
from diffusers import FluxTransformer2DModel, WanTransformer3DModel

from pipeboost.contract.call import open_call
from pipeboost.contract.registry import families
from pipeboost.core.config import CompileConfig
from pipeboost.core.families import Family
from pipeboost.core.hardware import detect_hardware
from pipeboost.core.ledger import Ledger
from pipeboost.features.attention.swap import swap_attention
from pipeboost.features.compile import compile_model
from pipeboost.features.graphs import capture_graphs
from pipeboost.patches import flux, wan

BF16 = torch.bfloat16
Draw = Callable[[], dict[str, Any]]
CASES: dict[str, tuple[str, Draw]] = {
    "flux-1024": ("flux", lambda: flux.forward_arguments("cuda", BF16)),
    "flux-512": ("flux", lambda: flux.forward_arguments("cuda", BF16, height=512, width=512)),
    "flux-256": ("flux", lambda: flux.forward_arguments("cuda", BF16, height=256, width=256)),
    "flux-quarter": ("flux", lambda: flux.forward_arguments("cuda", BF16, height=512, width=512, text_tokens=128)),
    "wan-1": ("wan", lambda: wan.forward_arguments("cuda", BF16, frames=1)),
    "wan-17": ("wan", lambda: wan.forward_arguments("cuda", BF16, frames=17)),
}


def main() -> None:
    """The cases that were asked for, or all; the file is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    settings = parser.parse_args()
    settings.output.mkdir(parents=True, exist_ok=True)
    hardware = detect_hardware("cuda")
    found: dict[str, Any] = {
        "hardware": str(hardware),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "date": date.today().isoformat(),
        "cases": {},
    }
    name = hardware.name.lower().replace("nvidia ", "").replace(" ", "-")
    path = settings.output / f"graphs_{name}_{found['date']}.json"
    model, built = None, ""
    for case in settings.cases:
        family_name, draw = CASES[case]
        if family_name != built:
            model = None
            torch.cuda.empty_cache()
            model, built = _model(family_name), family_name
        found["cases"][case] = _measure(model, next(each for each in families() if each.name == built), draw)
        print(case, json.dumps(found["cases"][case], default=str), flush=True)
        path.write_text(json.dumps(found, indent=2, default=str))


def _model(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    torch.set_default_dtype(BF16)
    try:
        with torch.device("cuda"):
            if family == "flux":
                model = FluxTransformer2DModel(guidance_embeds=True)
            else:
                model = WanTransformer3DModel(
                    num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30
                )
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _measure(model: Any, family: Family, draw: Draw) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for compiled in (False, True):
        with Ledger() as ledger:
            if compiled:
                swap_attention(model, "auto", ledger)
                compile_model(model, CompileConfig(graphs=False), family, ledger)
            kind = "ours" if compiled else "stock"
            row[kind] = _milliseconds(model, draw)
            fresh = [draw() for _ in range(4)]
            with open_call(None, owner=None):
                expected = [model(**inputs)[0] for inputs in fresh]
            torch.cuda.synchronize()
            ledger_of_graphs = Ledger()
            timed = capture_graphs(model, "auto", ledger_of_graphs)
            with open_call(None, owner=None):
                for inputs in fresh[:2]:
                    model(**inputs)
            row[f"{kind} launch"] = round(max(seen.launch_share for seen in timed._seen.values()), 2)
            ledger_of_graphs.undo()
            graphs = capture_graphs(model, True, ledger_of_graphs)
            with open_call(None, owner=None):
                model(**fresh[0])
                torch.cuda.synchronize()
                start = time.perf_counter()
                model(**fresh[1])
                torch.cuda.synchronize()
                row[f"{kind} capture seconds"] = round(time.perf_counter() - start, 3)
                replayed = [model(**inputs)[0] for inputs in fresh]
            row[f"{kind} identical"] = all(map(torch.equal, replayed, expected))
            row[f"{kind} + graph"] = _milliseconds(model, draw)
            row[f"{kind} bytes"] = graphs.counts.nbytes
            row[f"{kind} check milliseconds"] = _check_milliseconds(graphs)
            row[f"{kind} why not"] = {reason: count for reason, count in graphs.counts.eager.items()}
            ledger_of_graphs.undo()
            ledger.undo()
    model.compile_repeated_blocks(fullgraph=True)
    row["tuned stock"] = _milliseconds(model, draw)
    for module in model.modules():
        module._compiled_call_impl = None
    return row


def _milliseconds(model: Any, draw: Draw, rows: int = 3) -> float:
    """Of one forward among several in a row: the median of some rows."""
    inputs = draw()
    times = []
    with open_call(None, owner=None):
        for _ in range(3):
            model(**inputs)
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(**inputs)
        torch.cuda.synchronize()
        many = max(3, min(30, round(0.5 / (time.perf_counter() - start))))
        for _ in range(rows):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(many):
                model(**inputs)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / many * 1e3)
    return round(statistics.median(times), 2)


def _check_milliseconds(graphs: Any) -> float:
    """What it takes to find the model unchanged, before each replay."""
    start = time.perf_counter()
    for _ in range(20):
        assert graphs._frozen.change() is None
    return round((time.perf_counter() - start) / 20 * 1e3, 2)


if __name__ == "__main__":
    main()
