"""The tuner on a tiny pipeline: what it says is what calls with its schedule give, and it goes on where it stopped."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeboost import accelerate_pipeline
from pipeboost.core.errors import ConfigurationError, MissingPackageError, UnsupportedError
from pipeboost.quality.call_metrics import METRICS, Made
from pipeboost.quality.metrics import outputs_on_host, psnr
from pipeboost.tune import Tuned
from pipeboost.tune.search import Schedule
from pipeboost.tune.tuned import Budget, Judged
from tests.pipelines.tiny import TINY

PLAIN = {"quality": "fast", "cache": None, "compile": None, "reuse": None}
PROMPTS = ["a cat", "a dog", "two boats", "a red house", "a tree", "rain"]


def pipeline(name: str = "flux_dev") -> Any:
    return accelerate_pipeline(TINY[name].build(), **PLAIN)


def call_of(name: str = "flux_dev") -> dict[str, Any]:
    call = TINY[name].call_kwargs(steps=4)
    return {key: value for key, value in call.items() if key not in ("prompt", "generator")}


def tuned(folder: Path | None = None, progress: Any = None, **changed: Any) -> Tuned:
    arguments = {**call_of(), "budget": "psnr>=25", "share": 1.0, "held_out": 2, **changed}
    pipe = pipeline()
    return pipe.acceleration.tune(PROMPTS, folder=folder, progress=progress, **arguments)


def test_what_it_judged_is_what_calls_with_its_schedule_give(tmp_path: Path) -> None:
    result = tuned()
    assert result.steps == 4
    assert 1 <= result.best.forwards <= 4
    assert result.rival.forwards == result.best.forwards
    result.save(tmp_path / "schedule.yaml")
    pipe = TINY["flux_dev"].build()
    for seed, value in zip((4, 5), result.best.values, strict=True):
        call = {**call_of(), "prompt": PROMPTS[seed]}
        stock = outputs_on_host(pipe(**call, generator=torch.Generator().manual_seed(seed)))
        accelerate_pipeline(pipe, config=tmp_path / "schedule.yaml", compile=None)
        ours = outputs_on_host(pipe(**call, generator=torch.Generator().manual_seed(seed)))
        (row,) = pipe.acceleration.report().cache.values()
        assert row["computed"] == result.best.forwards
        pipe.acceleration.remove()
        assert psnr(ours["images"].numpy(), stock["images"].numpy()) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("name", ["flux_true_cfg", "wan21_t2v"])
def test_where_a_step_makes_two_branches_it_tries_a_gate_and_counts_the_forwards_of_both(
    name: str, tmp_path: Path
) -> None:
    pipe, call = pipeline(name), call_of(name)
    result = pipe.acceleration.tune(PROMPTS[:5], budget="psnr>=400", held_out=1, folder=tmp_path, **call)
    tried = (tmp_path / "values.jsonl").read_text()
    assert "(0, 1, 2, 3) 2" in tried  # three forwards: four of the first branch, and two of the second
    assert result.best.forwards == 4
    accelerate_pipeline(pipe, **{**PLAIN, "cache": Schedule((0, 1, 3), 1, gate=2).settings(4)})
    forwards: list[None] = []
    pipe.transformer.register_forward_hook(lambda *_: forwards.append(None))
    TINY[name].call(pipe, steps=4)
    assert len(forwards) == 2 * Schedule((0, 1, 3), 1, gate=2).forwards


def test_a_schedule_that_was_tuned_on_another_pipeline_or_size_is_refused(tmp_path: Path) -> None:
    result = tuned()
    result.save(tmp_path / "schedule.yaml")
    other = TINY["flux_img2img"].build()
    with pytest.raises(
        ConfigurationError, match=r"cache.pipeline='FluxPipeline' is what .* this is FluxImg2ImgPipeline"
    ):
        accelerate_pipeline(other, config=tmp_path / "schedule.yaml", compile=None)
    pipe = accelerate_pipeline(TINY["flux_dev"].build(), config=tmp_path / "schedule.yaml", compile=None)
    latents = result.settings["cache"]["latents"]
    for size, elements in (({"height": 144}, latents * 9 // 4), ({"height": 32, "width": 64}, latents // 3)):
        with pytest.raises(ConfigurationError, match=f"cache.latents={latents} is the size .* has {elements}, less"):
            TINY["flux_dev"].call(pipe, steps=4, **size)
    for size in ({"height": 128}, {"height": 32}, {"num_images_per_prompt": 2}):
        TINY["flux_dev"].call(pipe, steps=4, **size)


def test_a_budget_that_stock_alone_keeps_computes_every_step() -> None:
    result = tuned(budget="psnr>=900")
    assert result.best.forwards == 4
    assert result.kept
    assert set(result.best.values) == {float("inf")}


def test_it_continues_where_it_was_stopped_and_gives_the_same_answer(tmp_path: Path) -> None:
    calls: list[int] = []
    whole = tuned(progress=calls.append)
    total = calls[-1]

    def stop(made: int) -> None:
        if made == total - 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path, stop)
    again: list[int] = []
    assert str(tuned(tmp_path, again.append)) == str(whole)
    assert again[-1] < total
    (tmp_path / "plot.png").unlink(missing_ok=True)
    whole.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_what_was_measured_for_other_prompts_does_not_count(tmp_path: Path) -> None:
    tuned(tmp_path)
    with (tmp_path / "values.jsonl").open("a") as file:
        file.write('{"trial": "cut o')
    pipe = pipeline()
    others = [f"{prompt} at night" for prompt in PROMPTS]
    arguments = {**call_of(), "budget": "psnr>=25", "share": 1.0, "held_out": 2}
    kept = pipe.acceleration.tune(others, folder=tmp_path, **arguments)
    assert kept.best.values == pipe.acceleration.tune(others, **arguments).best.values


def test_the_pipeline_is_as_it_was_afterwards() -> None:
    pipe = pipeline()
    before = TINY["flux_dev"].call(pipe)
    changes = len(pipe.acceleration._ledger.changes)
    pipe.acceleration.tune(PROMPTS, held_out=2, **call_of())
    assert len(pipe.acceleration._ledger.changes) == changes
    assert torch.equal(TINY["flux_dev"].call(pipe), before)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"budget": "psnr<=30"}, ConfigurationError, "budget='psnr<=30' must be one of 'psnr>=', 'ssim>=', 'lpips<='"),
        ({"budget": "clip>=30"}, ConfigurationError, "budget='clip>=30' must be one of"),
        ({"budget": "ssim>=0.9", "output_type": "latent"}, UnsupportedError, "'ssim>=0.9' judges pictures, and the ca"),
        ({"share": 1.2}, ConfigurationError, "share=1.2 must be a share of the prompts"),
        ({"held_out": 3}, ConfigurationError, "tune got 6 prompts, of which 3 are held out; it needs at least 4"),
        ({"held_out": 0}, ConfigurationError, "of which 0 are held out"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tuned(**changed)


def test_a_budget_whose_package_is_missing_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    made: list[int] = []
    for name, budget in (("lpips", "lpips<=0.1"), ("ssim", "ssim>=0.9")):
        with pytest.raises(MissingPackageError, match=f"{name} needs"):
            tuned(budget=budget, progress=made.append)
    assert not made


def test_a_budget_of_ssim_is_kept_by_the_ssim_of_calls_with_its_schedule() -> None:
    result = tuned(budget="ssim>=0.5")
    assert str(result.budget) == "ssim>=0.5"
    assert all(-1 <= value <= 1 for value in (*result.best.values, *result.rival.values))
    assert result.best.kept(result.budget) == sum(value >= 0.5 for value in result.best.values)
    pipe = TINY["flux_dev"].build()
    call = {**call_of(), "prompt": PROMPTS[4]}
    stock = Made.of(pipe(**call, generator=torch.Generator().manual_seed(4)), call)
    accelerate_pipeline(pipe, **result.settings, compile=None)
    ours = Made.of(pipe(**call, generator=torch.Generator().manual_seed(4)), call)
    assert METRICS["ssim"].make()(ours, stock) == pytest.approx(result.best.values[0], rel=1e-6)


def test_a_distance_keeps_its_budget_from_below() -> None:
    budget = Budget("lpips", 0.1, lambda ours, stock: 0.0)
    judged = Judged("stock", 4, None, (0.05, 0.1, 0.3))
    assert judged.kept(budget) == 2
    assert "kept 2/3" in judged.row(budget)
    assert "worst 0.3000  median 0.1000" in judged.row(budget)
    assert str(budget) == "lpips<=0.1"


def test_pipelines_it_cannot_search_are_refused() -> None:
    pipe = pipeline("wan22_t2v")
    with pytest.raises(UnsupportedError, match="one denoiser, on one rank; give CacheConfig"):
        pipe.acceleration.tune(PROMPTS)
    cached = accelerate_pipeline(TINY["flux_dev"].build(), quality="fast", compile=None)
    with pytest.raises(ConfigurationError, match="accelerate with cache=None first"):
        cached.acceleration.tune(PROMPTS)
