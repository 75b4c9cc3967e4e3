"""Step schedules of the demo model: tuned on some prompts, judged on others, beside other ways to compute less.

python -m benchmarks.caching --output benchmarks/results

Each case gets a table of the held-out prompts: the tuned schedule, stock with as many forwards, tier `fast` as it is,
the settings of other engines through our cache, and cache-dit by itself. What was measured is kept, so that a run that
was stopped continues.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from diffusers import FluxPipeline

from examples.demo_model.score import is_right
from pipeboost import CacheConfig, accelerate_pipeline
from pipeboost.bench.environment import versions
from pipeboost.core.hardware import detect_hardware
from pipeboost.demo_model.prompts import DEMO_CALL, WEIGHTS, held_out_scenes
from pipeboost.quality.metrics import psnr
from pipeboost.tune.tuned import Budget, Tuned, interval

GUIDED = {"true_cfg_scale": 4.0, "negative_prompt": ""}
CASES: dict[str, tuple[dict[str, Any], str, float]] = {
    "28 steps": ({"num_inference_steps": 28}, "psnr>=30", 0.98),
    "50 steps": ({"num_inference_steps": 50}, "psnr>=35", 0.99),
    "28 steps, true CFG 4": ({"num_inference_steps": 28, **GUIDED}, "psnr>=30", 0.98),
    "50 steps, true CFG 4": ({"num_inference_steps": 50, **GUIDED}, "psnr>=35", 0.99),
}
"""Arguments of the call, budget, and the share of prompts that has to keep it."""
SETTINGS: dict[str, Any] = {
    "tier fast": "auto",
    "seed's values: Fn 3, Bn 3, threshold 0.12, mask fast, TaylorSeer": CacheConfig(
        fn=3, bn=3, threshold=0.12, step_mask="fast", taylorseer_order=1
    ),
    "seed engine's defaults: Fn 1, Bn 0, warm-up 4, threshold 0.24, 3 in a row": CacheConfig(max_continuous=3),
    "cache-dit's defaults through our cache": CacheConfig(fn=8, bn=0, warmup=8, threshold=0.08, max_continuous=1000),
}
CACHE_DIT = "cache-dit: enable_cache(pipe)"
LARGEST_PSNR = 200.0
"""What stands for equal pictures, dB."""


@dataclass
class Drawn:
    """What one way to draw made of the judging prompts.

    Attributes:
        values: PSNR to stock's own pictures, dB.
        right: whether each picture shows what its prompt says.
        forwards: for each guidance branch, on average: block calls over the number of blocks.
        seconds: of one call, median.
    """

    values: list[float]
    right: list[bool]
    forwards: float
    seconds: float

    def row(self, name: str, budget: Budget) -> str:
        """Return one line of the table."""
        kept = sum(map(budget.keeps, self.values))
        low, high = interval(kept, len(self.values))
        count, ordered = len(self.values), sorted(self.values)
        return (
            f"| {name} | {self.forwards:.1f} | {kept / count:.1%} ({low:.1%} to {high:.1%}) | {ordered[0]:.1f} | "
            f"{ordered[count // 20]:.1f} | {median(ordered):.1f} | {sum(self.right) / count:.1%} | {self.seconds:.2f} |"
        )


class Judge:
    """Draws the judging prompts in several ways, and keeps what each came to in a folder."""

    def __init__(self, prompts: Sequence[Any], first_seed: int, arguments: dict[str, Any], folder: Path) -> None:
        self._prompts, self._first_seed, self._arguments = prompts, first_seed, arguments
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._stock: list[tuple[Any, float]] = []

    def drawn(self, name: str, pipe: Any, *, steps: int | None = None) -> Drawn:
        """Draw with a pipeline as it is now, or with another number of steps, unless that was done before."""
        file = self._folder / f"{''.join(each if each.isalnum() else '_' for each in name)}.json"
        if not file.exists():
            file.write_text(json.dumps(vars(self._draw(pipe, steps))))
        return Drawn(**json.loads(file.read_text()))

    def stock(self) -> Drawn:
        """Return what stock's own pictures are."""
        file = self._folder / "stock.json"
        if not file.exists():
            right = [is_right(self._images()[index][0], prompt.scene) for index, prompt in enumerate(self._prompts)]
            seconds = median(took for _, took in self._images())
            steps = float(self._arguments["num_inference_steps"])
            file.write_text(json.dumps(vars(Drawn([LARGEST_PSNR] * len(right), right, steps, seconds))))
        return Drawn(**json.loads(file.read_text()))

    def _images(self) -> list[tuple[Any, float]]:
        if not self._stock:
            plain = stock_pipeline()
            self._stock = [self._call(plain, index, None) for index in range(len(self._prompts))]
        return self._stock

    def _draw(self, pipe: Any, steps: int | None) -> Drawn:
        stock = self._images()
        values, right, forwards, seconds = [], [], [], []
        for index, prompt in enumerate(self._prompts):
            with computed_forwards(pipe) as computed:
                image, took = self._call(pipe, index, steps)
            values.append(min(psnr(image, stock[index][0]), LARGEST_PSNR))
            right.append(is_right(image, prompt.scene))
            forwards.append(computed() / (2 if "true_cfg_scale" in self._arguments else 1))
            seconds.append(took)
        return Drawn(values, right, mean(forwards), median(seconds))

    def _call(self, pipe: Any, index: int, steps: int | None) -> tuple[Any, float]:
        arguments = {**self._arguments, **({} if steps is None else {"num_inference_steps": steps})}
        generator = torch.Generator("cpu").manual_seed(self._first_seed + index)
        started = time.perf_counter()
        image = pipe(self._prompts[index].text, generator=generator, output_type="np", **arguments).images[0]
        return image, time.perf_counter() - started


@contextmanager
def computed_forwards(pipe: Any) -> Iterator[Callable[[], float]]:
    """Inside, calls of blocks are counted; what this yields returns them over the number of blocks."""
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hooks = [block.register_forward_pre_hook(count) for block in blocks]
    try:
        yield lambda: calls / len(blocks)
    finally:
        for hook in hooks:
            hook.remove()


def stock_pipeline() -> Any:
    """Return the demo model's pipeline."""
    pipe: Any = FluxPipeline.from_pretrained(str(WEIGHTS))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def accelerated(cache: Any) -> Any:
    """Return the demo model's pipeline in tier `fast` with this cache, and nothing else that changes its results."""
    return accelerate_pipeline(stock_pipeline(), quality="fast", cache=cache, compile=None)


def drawn_by_cache_dit(judge: Judge) -> Drawn:
    """Draw with cache-dit as its README has it; it changes FluxPipeline itself, so this is for a process of its own."""
    import cache_dit

    pipe = stock_pipeline()
    cache_dit.enable_cache(pipe)
    return judge.drawn(CACHE_DIT, pipe)


def table(judge: Judge, tuned: Tuned, budget: Budget) -> list[str]:
    """Return the table of a case; each way is drawn unless it was before."""
    schedule = tuned.settings["cache"]
    forwards = tuned.best.forwards
    rows = {
        f"tuned: {tuned.best.schedule}": judge.drawn("tuned", accelerated(schedule)),
        f"stock, {forwards} steps": judge.drawn(f"stock {forwards}", stock_pipeline(), steps=forwards),
    }
    for name, cache in SETTINGS.items():
        rows[name] = judge.drawn(name, accelerated(cache))
    rows["stock"] = judge.stock()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        rows[CACHE_DIT] = process.submit(drawn_by_cache_dit, judge).result()
    return [
        f"| way | forwards | {budget} (95% interval) | worst | 5th percentile | median | drawn right | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(drawn.row(name, budget) for name, drawn in rows.items()),
    ]


def main() -> None:
    """Tune every case, and write a table and a plot of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tuning", type=int, default=100, help="prompts the search sees")
    parser.add_argument("--judging", type=int, default=200, help="prompts the result is judged on")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--work", type=Path, default=Path("caching_work"), help="keeps what was measured")
    settings = parser.parse_args()
    pipe = accelerated(None)
    prompts = held_out_scenes(settings.tuning + settings.judging)
    parts = []
    for case in settings.cases:
        given, budget, share = CASES[case]
        name = case.replace(", ", "_").replace(" ", "_").lower()
        arguments = {**DEMO_CALL, **given}
        tuned = pipe.acceleration.tune(
            [prompt.text for prompt in prompts],
            budget=budget,
            share=share,
            held_out=settings.judging,
            folder=settings.work / name,
            **arguments,
        )
        print(tuned, flush=True)
        tuned.plot(settings.output / f"caching_demo_{name}.png")
        judge = Judge(prompts[settings.tuning :], settings.tuning, arguments, settings.work / name)
        rows = table(judge, tuned, tuned.budget)
        parts.append("\n".join([f"## {case}\n", *rows, "\n```", str(tuned), "```\n"]))
        print(parts[-1], flush=True)
        head = f"# Step schedules of the demo model, {detect_hardware('cpu')}, {torch.get_num_threads()} threads\n"
        about = f"`python -m benchmarks.caching`; {json.dumps(versions())}\n"
        path = settings.output / f"caching_demo_{time.strftime('%Y-%m-%d')}.md"
        path.write_text("\n".join([head, about, *parts]))


if __name__ == "__main__":
    main()
