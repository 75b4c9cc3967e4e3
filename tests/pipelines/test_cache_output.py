"""Fixed steps in which the whole transformer is skipped and its output extrapolated."""

import copy
import threading
from typing import Any

import pytest
import torch

from pipeboost import CacheConfig, accelerate_pipeline
from pipeboost.core.errors import ConfigurationError
from pipeboost.features.cache.extrapolation import OutputBranch
from tests.pipelines.tiny import OTHER_PROMPT, TINY

SOME = CacheConfig(extrapolate="output", step_mask=(0, 1, 4), steps=6, taylorseer_order=1)
PLAIN = {"quality": "fast", "compile": None, "attention": None, "reuse": None, "parallel": None}
FAMILIES = (
    "flux_dev",
    "flux_true_cfg",
    "qwen_image",
    "wan21_t2v",
    "hunyuan_video",
    "z_image",
    "ltx2",
    "flux_controlnet",
)


def reference(
    name: str, computed: tuple[int, ...], branches: int, gate: int | None = None, **call: Any
) -> torch.Tensor:
    """Stock, whose transformer is told by hand to repeat the line through what it returned in the computed steps.

    From the step `gate` on, the second branch is told to be the first one and what it last differed by.
    """
    entry = TINY[name]
    pipe = entry.build()
    forward, count = pipe.transformer.forward, 0
    given: dict[int, torch.Tensor] = {}
    known: dict[int, list[tuple[int, torch.Tensor]]] = {branch: [] for branch in range(branches)}

    def instead(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        step, branch = divmod(count, branches)
        count += 1
        if branch == 1 and gate is not None and step >= gate:
            last_step, last = known[1][-1]
            return (given[0] + last - dict(known[0])[last_step],)
        given[branch] = line(step, branch, *args, **kwargs)
        return (given[branch],)

    def line(step: int, branch: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        if step in computed:
            known[branch].append((step, forward(*args, **kwargs)[0]))
            return known[branch][-1][1]
        (last_step, last) = known[branch][-1]
        if len(known[branch]) == 1:
            return last
        (first_step, first) = known[branch][-2]
        return last + (last - first) * (step - last_step) / (last_step - first_step)

    pipe.transformer.forward = instead
    return entry.call(pipe, **call)


@pytest.mark.parametrize(
    ("name", "branches"), [("flux_dev", 1), ("flux_true_cfg", 2), ("qwen_image", 2), ("wan21_t2v", 2)]
)
def test_skipped_steps_are_on_the_line_through_the_computed_ones_of_their_branch(name: str, branches: int) -> None:
    pipe = accelerate_pipeline(TINY[name].build(), **PLAIN, cache=SOME)
    ours = TINY[name].call(pipe, steps=6)
    torch.testing.assert_close(ours, reference(name, (0, 1, 4), branches, steps=6), rtol=1e-4, atol=1e-5)
    rows = pipe.acceleration.report().cache
    assert [*rows] == [f"transformer.output branch {branch}" for branch in range(branches)]
    assert all(row == {"computed": 3, "skipped": 3} for row in rows.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mask_that_skips_nothing_changes_nothing_and_a_cached_call_repeats_to_the_bit(name: str) -> None:
    entry = TINY[name]
    pipe = entry.build()
    stock = entry.call(pipe, steps=3)
    accelerate_pipeline(pipe, **PLAIN, cache=CacheConfig(extrapolate="output", step_mask=(0, 1, 2), steps=3))
    assert torch.equal(entry.call(pipe, steps=3), stock)
    accelerate_pipeline(pipe, **PLAIN, cache=CacheConfig(extrapolate="output", step_mask="fast", taylorseer_order=1))
    cached = entry.call(pipe, steps=3)
    assert not torch.equal(cached, stock)
    entry.call(pipe, steps=5)
    assert torch.equal(entry.call(pipe, steps=3), cached)
    pipe.acceleration.remove()
    assert torch.equal(entry.call(pipe, steps=3), stock)


@pytest.mark.parametrize("name", ["flux_true_cfg", "qwen_image", "wan21_t2v", "hunyuan_video"])
@pytest.mark.parametrize("extrapolate", ["output", "blocks"])
def test_a_call_of_any_steps_size_or_batch_is_right_whatever_the_calls_before_it_were(
    name: str, extrapolate: str
) -> None:
    settings = CacheConfig(extrapolate, "fast", taylorseer_order=1, max_continuous=2)
    entry, several = TINY[name], "num_videos_per_prompt" if name[:3] in ("wan", "hun") else "num_images_per_prompt"
    calls: list[dict[str, Any]] = [
        {"steps": 8},
        {"steps": 1},
        {"steps": 3},
        {"steps": 8, "height": 96, "width": 64},
        {"steps": 8, several: 2},
        {"steps": 8},
    ]
    pipe = accelerate_pipeline(entry.build(), **PLAIN, cache=settings)
    for call in calls:
        output = entry.call(pipe, **call)
        rows = pipe.acceleration.report().cache.values()
        assert {row["computed"] + row["skipped"] for row in rows} == {call["steps"]}
        assert all(row["skipped"] > 0 for row in rows) or call["steps"] == 1
        alone = entry.call(accelerate_pipeline(entry.build(), **PLAIN, cache=settings), **call)
        # Stock Qwen-Image divides by zero in a call of one step.
        torch.testing.assert_close(output, alone, rtol=0, atol=0, equal_nan=True)


GUIDED = ("flux_true_cfg", "qwen_image", "wan21_t2v", "hunyuan_video_true_cfg", "hunyuan_video_15")


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize(("computed", "gate"), [((0, 1, 4), 3), ((0, 1, 2, 3, 4, 5), 2)])
def test_from_its_gate_on_the_second_branch_is_the_first_and_what_it_last_differed_by(
    name: str, computed: tuple[int, ...], gate: int
) -> None:
    settings = CacheConfig("output", computed, 6, taylorseer_order=1, guidance_gate=gate)
    pipe = accelerate_pipeline(TINY[name].build(), **PLAIN, cache=settings)
    forwards: list[None] = []
    pipe.transformer.register_forward_hook(lambda *_: forwards.append(None))
    ours = TINY[name].call(pipe, steps=6)
    of_both = sum(step < gate for step in computed)
    assert len(forwards) == len(computed) + of_both
    rows = pipe.acceleration.report().cache
    assert rows["transformer.output branch 0"] == {"computed": len(computed), "skipped": 6 - len(computed)}
    assert rows["transformer.output branch 1"] == {"computed": of_both, "skipped": 6 - of_both}
    # Stock with as many forwards: half a step that remains is one for stock.
    assert pipe.acceleration.report().computed_steps == (len(computed) + of_both + 1) // 2
    torch.testing.assert_close(ours, reference(name, computed, 2, gate, steps=6), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, reference(name, computed, 2, steps=6), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*GUIDED, "wan22_t2v", "flux_dev", "qwen_image_no_cfg"])
def test_a_gate_that_no_step_reaches_or_a_call_without_guidance_is_bit_identical_to_stock(name: str) -> None:
    entry = TINY[name]
    pipe = entry.build()
    stock = entry.call(pipe, steps=4)
    everything = CacheConfig("output", ([4], [1]), guidance_gate=4 if entry.branches == 2 else 1)
    accelerate_pipeline(pipe, **PLAIN, cache=everything)
    assert torch.equal(entry.call(pipe, steps=4), stock)


def test_steps_that_several_rows_of_blocks_computed_count_once() -> None:
    settings = CacheConfig(step_mask=([1, 1, 1], [1, 1, 1]))
    pipe = accelerate_pipeline(TINY["hunyuan_video"].build(), **PLAIN, cache=settings)
    TINY["hunyuan_video"].call(pipe, steps=6)
    report = pipe.acceleration.report()
    assert (len(report.cache), report.computed_steps) == (2, 3)


def test_each_expert_has_its_own_gate_and_begins_with_both_branches() -> None:
    entry = TINY["wan22_t2v"]
    settings = CacheConfig("output", ([8], [1]), guidance_gate=1, secondary=CacheConfig("output", ([8], [1])))
    pipe = accelerate_pipeline(entry.build(), **PLAIN, cache=settings)
    entry.call(pipe, steps=8)
    rows = pipe.acceleration.report().cache
    assert rows["transformer.output branch 1"]["computed"] == 1
    assert rows["transformer_2.output branch 1"]["skipped"] == 0


def test_the_gate_counts_the_steps_of_the_call_also_for_a_branch_that_a_guider_begins_later() -> None:
    entry = TINY["hunyuan_video_15"]
    pipe = entry.build()
    pipe.guider._start = 0.34
    accelerate_pipeline(pipe, **PLAIN, cache=CacheConfig("output", (0, 1, 2, 3, 4, 5), 6, guidance_gate=4))
    entry.call(pipe, steps=6)
    rows = pipe.acceleration.report().cache
    assert rows["transformer.output branch 0"] == {"computed": 6, "skipped": 0}
    assert rows["transformer.output branch 1"] == {"computed": 2, "skipped": 2}  # steps 2 and 3, 4 and 5


def test_a_step_with_another_batch_than_the_one_before_is_computed() -> None:
    """Z-Image makes one batch of two guidance branches, and ends guidance where `cfg_truncation` says."""
    pipe = accelerate_pipeline(TINY["z_image"].build(), **PLAIN, cache=CacheConfig("output", (0, 1, 2), 6))
    batches: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    output = TINY["z_image"].call(pipe, steps=6, cfg_truncation=0.5)
    assert output.shape == TINY["z_image"].stock(steps=6, cfg_truncation=0.5).shape
    assert batches == [2, 2, 2, 1]


def test_each_expert_begins_with_a_computed_step() -> None:
    entry = TINY["wan22_t2v"]
    settings = CacheConfig(extrapolate="output", step_mask="ultra", secondary=CacheConfig("output", "slow"))
    pipe = accelerate_pipeline(entry.build(), **PLAIN, cache=settings)
    entry.call(pipe, steps=8)
    rows = pipe.acceleration.report().cache
    assert {name.partition(".")[0] for name in rows} == {"transformer", "transformer_2"}
    assert sum(row["computed"] + row["skipped"] for row in rows.values()) == 16
    assert all(row["computed"] >= 1 for row in rows.values())


def test_views_in_two_threads_give_what_each_gives_alone() -> None:
    entry = TINY["flux_dev"]
    pipe = accelerate_pipeline(entry.build(), **PLAIN, cache=CacheConfig("output", "fast", taylorseer_order=2))
    alone = [entry.call(pipe, steps=6), entry.call(pipe, steps=9, prompt=OTHER_PROMPT)]
    results: dict[int, torch.Tensor] = {}

    def run(place: int, **call: Any) -> None:
        view = copy.copy(pipe)
        view.scheduler = copy.deepcopy(pipe.scheduler)
        results[place] = entry.call(view, **call)

    threads = [
        threading.Thread(target=run, args=(0,), kwargs={"steps": 6}),
        threading.Thread(target=run, args=(1,), kwargs={"steps": 9, "prompt": OTHER_PROMPT}),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results[0], alone[0])
    assert torch.equal(results[1], alone[1])


def test_a_schedule_for_other_steps_is_one_sentence_before_the_first_forward() -> None:
    pipe = accelerate_pipeline(TINY["flux_dev"].build(), **PLAIN, cache=SOME)
    forwards: list[None] = []
    pipe.transformer.register_forward_hook(lambda *_: forwards.append(None))
    with pytest.raises(ConfigurationError, match="is for 6 steps, but one transformer makes 5 in this call"):
        TINY["flux_dev"].call(pipe, steps=5)
    assert not forwards


@pytest.mark.parametrize(
    ("order", "dtype", "bound"), [(0, torch.float32, 0.0), (1, torch.float64, 1e-14), (2, torch.bfloat16, 0.05)]
)
def test_a_polynomial_of_the_order_is_continued(order: int, dtype: torch.dtype, bound: float) -> None:
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    branch = OutputBranch([1, 1, 0, 1, 0, 0, 1, 0], order)
    for step in range(8):
        wanted = (start * (1 + 0.1 * step) ** order).to(dtype)
        result = branch.run(lambda wanted=wanted: {"sample": wanted, "of": ("a name", 3)})
        assert result["of"] == ("a name", 3)
        assert result["sample"].dtype == dtype
        # The second step of order 2 is on a line through two points.
        if branch.skipped[-1] and step > order:
            assert (result["sample"].double() - wanted.double()).abs().max() <= bound
    assert branch.skipped == [False, False, True, False, True, True, False, True]
