"""What acceleration costs where it saves nothing: the demo model at tier `exact` against stock, call by call in turn.

    python -m benchmarks.overhead [--device cuda] [--rounds 12] [--steps 28]

Each call has a prompt of its own, so that no embedding is reused. Python calls are those of a warm call of two steps,
of all files, and the same on any machine; processor time is less disturbed by other processes than the clock is.
"""

import argparse
import functools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import transformers
from diffusers.utils import logging

from pipeboost import accelerate_pipeline


def main() -> None:
    """Print the overhead in time and in Python calls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=12, help="timed calls of each")
    parser.add_argument("--steps", type=int, default=28)
    settings = parser.parse_args()
    logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipes = {"stock": _demo_pipeline(settings.device), "exact": _demo_pipeline(settings.device)}
    accelerate_pipeline(pipes["exact"], quality="exact")

    calls = {name: python_calls(functools.partial(_call, pipe, 2)).total() for name, pipe in pipes.items()}
    print(f"Python calls: {calls['stock']} stock, {calls['exact'] - calls['stock']:+d} exact")
    clock: dict[str, list[float]] = {name: [] for name in pipes}
    processor: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(settings.rounds):
        for name, pipe in pipes.items():
            begun, busy = time.perf_counter(), time.process_time()
            _call(pipe, settings.steps)
            clock[name].append(time.perf_counter() - begun)
            processor[name].append(time.process_time() - busy)
    for what, seconds in (("clock", clock), ("processor", processor)):
        stock, exact = (statistics.median(seconds[name]) for name in ("stock", "exact"))
        print(f"{what}: {stock * 1e3:.1f} ms stock, {exact * 1e3:.1f} ms exact: {exact / stock - 1:+.1%}")


def python_calls(run: Callable[[], Any]) -> Counter[tuple[str, str]]:
    """Count the calls of Python functions that `run` makes once warm, by file and name of the function."""
    run()
    run()
    counts: Counter[tuple[str, str]] = Counter()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            counts[frame.f_code.co_filename, frame.f_code.co_name] += 1

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return counts


_prompts: Counter[int] = Counter()


def _call(pipe: Any, steps: int) -> None:
    from pipeboost.demo_model.prompts import DEMO_CALL

    _prompts[id(pipe)] += 1
    prompt = f"picture {_prompts[id(pipe)]} of a large red circle"
    pipe(prompt, **{**DEMO_CALL, "num_inference_steps": steps}, generator=torch.Generator().manual_seed(0))
    if pipe.device.type == "cuda":
        torch.cuda.synchronize()


def _demo_pipeline(device: str) -> Any:
    from diffusers import FluxPipeline

    from pipeboost.demo_model.prompts import WEIGHTS

    pipe = FluxPipeline.from_pretrained(str(WEIGHTS), local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


if __name__ == "__main__":
    main()
