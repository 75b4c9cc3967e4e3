"""`pipeboost bench` on tiny transformers and a CPU: what it measures and writes, and what it does with failures."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from pipeboost.bench.benchmark import benchmark
from pipeboost.bench.benchmark_result import STOCK, TUNED, BenchmarkResult
from pipeboost.bench.full_size import build_pipeline, call_arguments, forward_inputs
from pipeboost.bench.roofline import AttentionShape, count_work
from pipeboost.cli.bench import measure_sizes, run_bench
from pipeboost.contract.call import open_call
from pipeboost.contract.registry import families
from pipeboost.core.families import FullSize
from pipeboost.patches import flux, hunyuan_video, qwen_image, wan
from pipeboost.quality.tuned_stock import require_native_default
from tests.floors import EPS

CPU = torch.device("cpu")
ROUNDING = 100 * EPS
"""Relative to the largest value, of a model in which a dozen sums of some ten terms follow each other."""
IMAGE = {"height": 64, "width": 64, "channels": 8, "text_tokens": 6, "text_width": 24}
VIDEO = {
    "height": 32,
    "width": 48,
    "frames": 9,
    "channels": 8,
    "text_tokens": 6,
    "real_text_tokens": 4,
    "text_width": 24,
}

FLUX = FullSize(
    name="flux-tiny",
    pipeline="FluxPipeline",
    transformer="FluxTransformer2DModel",
    config={
        "in_channels": 8,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 12,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
    inputs=functools.partial(flux.forward_arguments, **IMAGE, pooled_width=12),
    workload="64×64: 16 image + 6 text tokens",
)
QWEN = FullSize(
    name="qwen-tiny",
    pipeline="QwenImagePipeline",
    transformer="QwenImageTransformer2DModel",
    config={
        "in_channels": 8,
        "out_channels": 2,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    },
    inputs=functools.partial(qwen_image.forward_arguments, **IMAGE),
    workload="64×64",
)
WAN = FullSize(
    name="wan-tiny",
    pipeline="WanPipeline",
    transformer="WanTransformer3DModel",
    config={
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "text_dim": 24,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 1,
    },
    inputs=functools.partial(wan.forward_arguments, **VIDEO),
    workload="32×48, 9 frames",
)
HUNYUAN = FullSize(
    name="hunyuan-tiny",
    pipeline="HunyuanVideoPipeline",
    transformer="HunyuanVideoTransformer3DModel",
    config={
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 24,
        "pooled_projection_dim": 12,
        "rope_axes_dim": (4, 6, 6),
    },
    inputs=functools.partial(hunyuan_video.forward_arguments, **VIDEO, pooled_width=12),
    workload="32×48, 9 frames",
)


@pytest.fixture(autouse=True, scope="module")
def stock_compile() -> Iterator[dict[str, str]]:
    """Settings of stock's own compile: a backend that needs no C++ compiler, and no time."""
    settings = {"backend": "eager"}
    monkeypatch = pytest.MonkeyPatch()
    stock = diffusers.ModelMixin.compile_repeated_blocks

    def compile_repeated_blocks(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **settings, **kwargs)

    monkeypatch.setattr(diffusers.ModelMixin, "compile_repeated_blocks", compile_repeated_blocks)
    yield settings
    monkeypatch.undo()


@pytest.fixture(scope="module")
def result(stock_compile: dict[str, str]) -> BenchmarkResult:
    """FLUX, with an acceleration that multiplies the output by 1.5; stock's compile changes its rounding."""
    stock_compile["backend"] = "aot_eager"
    found = measured(accelerate=scaling(1.5))
    stock_compile["backend"] = "eager"
    return found


def scaling(factor: float, *, undone: bool = True) -> Any:
    """Stands for `accelerate_pipeline`: scales the output by `factor`, and takes that off again, or forgets to."""

    def accelerate(pipe: Any, *, quality: str) -> Any:
        weights = pipe.transformer.proj_out

        def scale(by: float) -> None:
            weights.weight.data *= by
            weights.bias.data *= by

        @contextlib.contextmanager
        def opened() -> Iterator[Any]:
            with open_call(pipe, owner=None) as call:
                yield call

        scale(factor)
        pipe.acceleration = SimpleNamespace(
            plan=f"scaled by {factor}", open=opened, remove=lambda: scale(1 / factor) if undone else None
        )
        return pipe

    return accelerate


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def measured(size: FullSize = FLUX, *, accelerate: Any = None, steps: int = 0) -> BenchmarkResult:
    return benchmark(
        size,
        accelerate=accelerate or scaling(2.0),
        tiers=("lossless",),
        repeats=5,
        steps=steps,
        device="cpu",
        report=lambda text: None,
        command="pipeboost bench flux-tiny",
    )


def variants(result: BenchmarkResult) -> dict[str, Any]:
    return {variant.name: variant for variant in result.variants}


def test_every_figure_follows_from_the_times_of_one_run(result: BenchmarkResult) -> None:
    stock, tuned, ours = result.variants
    assert [stock.name, tuned.name, ours.name] == [STOCK, TUNED, "pipeboost lossless"]
    assert result.failures == ()
    for variant in result.variants:
        assert len(variant.milliseconds) == 5
        assert min(variant.milliseconds) <= variant.median_ms <= max(variant.milliseconds)
        assert variant.speedup == pytest.approx(stock.median_ms / variant.median_ms)
        assert variant.speedup_over_tuned == pytest.approx(tuned.median_ms / variant.median_ms)
        assert variant.share_of_bound == pytest.approx(result.bound_ms / variant.median_ms)
        work = result.gemm_flops + result.attention_flops
        assert variant.tflops == pytest.approx(work / 1e12 / (variant.median_ms / 1e3))
        assert variant.cold_start_seconds > 0
        assert variant.peak_bytes is None
    bound = result.gemm_flops / result.gemm_ceiling + result.attention_flops / result.attention_ceiling
    assert result.bound_ms == pytest.approx(bound * 1e3)


def test_errors_are_relative_to_stock_and_the_noise_floor_is_that_of_stocks_compile(result: BenchmarkResult) -> None:
    found = variants(result)
    assert found["pipeboost lossless"].relative_error == pytest.approx(0.5, rel=1e-4)
    assert found["pipeboost lossless"].max_error > 0
    assert found[STOCK].relative_error == 0
    assert 0 <= result.noise_floor < ROUNDING
    assert result.noise_floor == found[TUNED].relative_error


def test_json_has_the_whole_result_and_markdown_has_a_row_for_each_variant(
    result: BenchmarkResult, tmp_path: Path
) -> None:
    json_path, markdown_path = result.write(tmp_path / "results")
    assert json_path.name == f"{result.file_name}.json"
    assert json_path.name.startswith("flux-tiny_cpu-with-")
    assert json.loads(json_path.read_text(encoding="utf-8")) == as_json(asdict(result))
    markdown = markdown_path.read_text(encoding="utf-8")
    for text in (STOCK, TUNED, "pipeboost lossless", "Noise floor", "scaled by 1.5", result.command):
        assert text in markdown
    assert f"torch: {result.versions['torch']}" in markdown


def test_what_acceleration_leaves_behind_is_seen_and_reaches_neither_tuned_stock_nor_the_process() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    result = measured(accelerate=scaling(2.0, undone=False))
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_default_dtype() == torch.float32
    require_native_default()
    assert result.failures == ()
    found = variants(result)
    assert found["pipeboost lossless"].restored is False
    assert found[TUNED].relative_error < ROUNDING
    assert "not bit-identical again after: pipeboost lossless" in result.to_markdown()


def test_an_acceleration_that_fails_is_reported_and_the_others_are_measured() -> None:
    def accelerate(pipe: Any, *, quality: str) -> Any:
        pipe.transformer.proj_out.weight.data *= 3
        raise RuntimeError("no kernel")

    result = measured(accelerate=accelerate)
    assert result.failures == ("pipeboost lossless: RuntimeError: no kernel",)
    assert variants(result)[TUNED].relative_error < ROUNDING
    assert "failed: RuntimeError: no kernel" in result.table()


def test_a_model_that_fails_does_not_lose_the_results_of_the_others(
    result: BenchmarkResult, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(size: FullSize, **options: Any) -> BenchmarkResult:
        if size is WAN:
            raise RuntimeError("out of memory")
        return result

    monkeypatch.setattr("pipeboost.cli.bench.benchmark", measure)
    code = measure_sizes([WAN, FLUX], tiers=["lossless"], steps=0, repeats=5, output=tmp_path, device="cpu")
    assert code == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md"]
    assert "failed: wan-tiny: RuntimeError: out of memory" in capsys.readouterr().err


def test_accelerate_pipeline_itself_is_measured_and_taken_off_again(tmp_path: Path) -> None:
    assert measure_sizes([FLUX], tiers=["exact"], repeats=5, steps=2, output=tmp_path, device="cpu") == 0
    result = json.loads(next(tmp_path.glob("*.json")).read_text(encoding="utf-8"))
    (ours,) = (each for each in result["variants"] if each["name"] == "pipeboost exact")
    assert ours["error"] is None
    assert ours["relative_error"] == 0
    assert ours["restored"] is True
    assert "quality='exact'" in ours["what"]
    assert ours["call_seconds"]
    assert result["command"] == "pipeboost bench flux-tiny --tier exact --steps 2 --repeats 5 --device cpu"


def test_work_equals_a_count_by_hand() -> None:
    pipe = build_pipeline(FLUX, device=CPU, dtype=torch.float32)
    inputs = forward_inputs(FLUX, device=CPU, dtype=torch.float32)
    with torch.no_grad():
        work = count_work(lambda: pipe.transformer(**inputs))
    image, text, width = 16, 6, 32
    both = image + text
    embedders = image * 8 * width + text * 24 * width
    conditioning = 2 * (256 * width + width * width) + (12 * width + width * width)
    modulation = 2 * width * 6 * width + width * 3 * width + width * 2 * width
    double = both * (4 * width * width + 2 * width * 4 * width)
    single = both * (3 * width * width + width * 4 * width + 5 * width * width)
    output = image * width * 8
    assert work.gemm_flops == 2 * (embedders + conditioning + modulation + double + single + output)
    assert work.attention == {AttentionShape(1, 2, both, both, 16): 2}
    assert work.attention_flops == 2 * 4 * 2 * both * both * 16
    assert work.flops == work.gemm_flops + work.attention_flops


@pytest.mark.parametrize("size", [FLUX, QWEN, WAN, HUNYUAN], ids=lambda size: size.name)
def test_a_pipeline_without_encoders_runs_its_own_loop_on_the_forwards_inputs(size: FullSize) -> None:
    pipe = build_pipeline(size, device=CPU, dtype=torch.bfloat16)
    inputs = forward_inputs(size, device=CPU, dtype=torch.bfloat16)
    with torch.no_grad():
        sample = pipe.transformer(**inputs)[0]
        latents = pipe(**call_arguments(pipe, inputs, steps=2))[0]
        assert torch.equal(sample, build_pipeline(size, device=CPU, dtype=torch.bfloat16).transformer(**inputs)[0])
    assert sample.shape == latents.shape == inputs["hidden_states"].shape
    assert float(sample.float().std()) > 0


def test_forward_inputs_are_what_the_pipeline_itself_passes() -> None:
    for size in (FLUX, QWEN, WAN, HUNYUAN):
        pipe = build_pipeline(size, device=CPU, dtype=torch.bfloat16)
        inputs = forward_inputs(size, device=CPU, dtype=torch.bfloat16)
        seen: dict[str, Any] = {}
        hook = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(kwargs) or None,  # noqa: B023
            with_kwargs=True,
        )
        with torch.no_grad():
            pipe(**call_arguments(pipe, inputs, steps=1))
        hook.remove()
        assert seen.keys() == inputs.keys()
        for name, value in inputs.items():
            if not isinstance(value, torch.Tensor):
                assert seen[name] == value, (size.name, name)
                continue
            assert seen[name].shape == value.shape, (size.name, name)
            if (size, name) != (WAN, "timestep"):  # the scheduler that Wan ships with counts in integers
                assert seen[name].dtype == value.dtype, (size.name, name)


def test_what_diffusers_keeps_in_fp32_is_in_fp32() -> None:
    transformer = build_pipeline(WAN, device=CPU, dtype=torch.bfloat16).transformer
    assert transformer.scale_shift_table.dtype == torch.float32
    assert transformer.blocks[0].norm2.weight.dtype == torch.float32
    assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert transformer.blocks[0].attn1.norm_q.weight.dtype == torch.bfloat16


def test_every_published_size_has_its_published_parameters_and_tokens() -> None:
    billions = {"flux.1-dev": 11.9, "qwen-image": 20.4, "wan2.1-1.3b": 1.42, "wan2.1-14b": 14.3, "hunyuan-video": 12.8}
    sizes = {size.name: size for family in families() for size in family.full_sizes}
    assert sizes.keys() == billions.keys()
    for name, size in sizes.items():
        model = getattr(diffusers, size.transformer)
        settings = {key: each.default for key, each in inspect.signature(model).parameters.items()} | size.config
        one = dict.fromkeys({"num_layers", "num_single_layers", "num_refiner_layers"} & settings.keys(), 1)

        def built(model: Any = model, config: Any = size.config | one, **depth: int) -> torch.nn.Module:
            return model(**config | depth)

        def parameters(**depth: int) -> int:
            return sum(p.numel() for p in built(**depth).parameters())

        with torch.device("meta"), torch.no_grad():
            inputs = size.inputs("meta", torch.float32)
            sample = built()(**inputs)[0]
            # Each kind of block once more, as often as there are more of it.
            total = parameters() + sum((settings[k] - 1) * (parameters(**{k: 2}) - parameters()) for k in one)
        assert total / 1e9 == pytest.approx(billions[name], rel=0.01)
        assert sample.shape == inputs["hidden_states"].shape


def test_list_prints_the_published_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench(["list"], tiers=[], steps=0, repeats=7, output=tmp_path, device="cpu") == 0
    assert "hunyuan-video    544×960, 33 frames" in capsys.readouterr().out
