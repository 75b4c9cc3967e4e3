"""Step schedules of the demo model: tuned on some prompts, judged on others, beside stock with as many forwards.

python -m benchmarks.caching --output benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline

from pipeboost import accelerate_pipeline
from pipeboost.bench.environment import versions
from pipeboost.core.hardware import detect_hardware
from pipeboost.demo_model.prompts import DEMO_CALL, WEIGHTS, held_out_scenes

CASES = ((28, "psnr>=30", 0.98), (50, "psnr>=35", 0.99))
"""Steps of stock, budget, and the share of prompts that has to keep it."""


def main() -> None:
    """Tune every case, and write a table and a plot of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tuning", type=int, default=100, help="prompts the search sees")
    parser.add_argument("--judging", type=int, default=200, help="prompts the result is judged on")
    parser.add_argument("--work", type=Path, default=Path("caching_work"), help="keeps what was measured")
    settings = parser.parse_args()
    hardware = detect_hardware("cpu")
    pipe: Any = FluxPipeline.from_pretrained(str(WEIGHTS))
    pipe.set_progress_bar_config(disable=True)
    accelerate_pipeline(pipe, quality="fast", cache=None, compile=None)
    prompts = [prompt.text for prompt in held_out_scenes(settings.tuning + settings.judging)]
    parts = []
    for steps, budget, share in CASES:
        started = time.perf_counter()
        tuned = pipe.acceleration.tune(
            prompts,
            budget=budget,
            share=share,
            held_out=settings.judging,
            folder=settings.work / f"{steps}_{budget}",
            **{**DEMO_CALL, "num_inference_steps": steps},
        )
        minutes = (time.perf_counter() - started) / 60
        parts.append(f"## {steps} steps\n\n```\n{tuned}\n```\n\nIn {minutes:.1f} minutes.\n")
        print(parts[-1], flush=True)
        tuned.plot(settings.output / f"caching_demo_{steps}_steps.png")
    head = f"# Step schedules of the demo model, {hardware}, {torch.get_num_threads()} threads\n"
    about = f"`python -m benchmarks.caching`; {json.dumps(versions())}\n"
    (settings.output / f"caching_demo_{time.strftime('%Y-%m-%d')}.md").write_text("\n".join([head, about, *parts]))


if __name__ == "__main__":
    main()
