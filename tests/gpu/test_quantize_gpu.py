"""Linears in 8 bits on a GPU: products against plain torch, compiled and replayed pipelines, adapters between calls."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeboost import CompileConfig, QuantizeConfig, accelerate_pipeline
from pipeboost.features.quantize.linear import Float8Linear
from pipeboost.kernels.float8 import FLOAT8
from pipeboost.quality.metrics import relative_error
from pipeboost.quality.tuned_stock import stock_compile
from tests.pipelines.tiny import TINY, lora_state_dict

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs 8-bit tensor cores"
    ),
]
SHAPES = ((4096, 3072, 9216), (4097, 3072, 3072), (517, 256, 1040))
"""Rows, width of the features, width of the product; 4097 and 517 are multiples of no tile."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()  # which counts the graphs of one method over all of its objects
    with torch.no_grad():
        yield


def linear_of(columns: int, out: int, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(columns, out, device="cuda")
    nn.init.normal_(linear.weight, std=columns**-0.5)
    return linear.to(dtype)


def reference(ours: Float8Linear, features: torch.Tensor, *, activations: bool) -> torch.Tensor:
    """The product of what 8 bits leave of the operands, in float32 by plain torch."""
    rows = features.float()
    if activations:
        scale = rows.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
        rows = (rows / scale).to(FLOAT8).float() * scale
    assert ours.bias is not None
    return F.linear(rows, ours.weight.float() * ours.weight_scale, ours.bias.float())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_that_of_rows_in_8_bits(shape, batch, dtype, compiled):
    rows, columns, out = shape
    linear = linear_of(columns, out, dtype)
    ours = Float8Linear(linear)
    run = torch.compile(ours, fullgraph=True) if compiled else ours
    features = torch.randn(batch, rows, columns, device="cuda", dtype=dtype)
    features[:, 1] *= 3000 / features[:, 1].abs().amax()  # large activations
    features[:, 2, 5] = 500  # an outlier
    features[:, 3] = 0
    poison = torch.full((batch * rows, out), torch.nan, device="cuda", dtype=dtype)
    del poison  # the product may get its memory
    product = run(features)
    assert product.dtype == dtype
    assert bool(product.isfinite().all())
    right = reference(ours, features, activations=True)
    # What fast accumulation and bfloat16 leave of a product; 8 bits themselves are three times as far from stock.
    assert relative_error(product, right) < 1.2e-2
    plain = [row for row in range(rows) if row not in (1, 2)]
    assert relative_error(product[:, plain], right[:, plain]) < 1.2e-2
    assert relative_error(product[:, plain], linear(features)[:, plain]) < 0.05


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("widths", [(3072, 18432), (3072, 9216), (272, 1040)])
def test_a_few_rows_keep_their_precision(widths, rows, dtype, compiled):
    ours = Float8Linear(linear_of(*widths, dtype))

    def run(features: torch.Tensor) -> torch.Tensor:
        return ours(F.silu(features))

    features = torch.randn(rows, widths[0], device="cuda", dtype=dtype)
    features[0, 3] = 200
    product = (torch.compile(run, fullgraph=True) if compiled else run)(features)
    assert relative_error(product, reference(ours, F.silu(features), activations=False)) < 8e-3


def accelerated(name: str, **settings):
    pipe = TINY[name].build().to("cuda", torch.bfloat16)
    return accelerate_pipeline(pipe, **{"quality": "balanced", "quantize": "fp8", "attention": "sdpa", **settings})


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", ["flux_dev", "qwen_image", "wan21_t2v"])
def test_a_compiled_pipeline_in_8_bits_is_near_to_eager_and_stock_comes_back(name, graphs):
    entry = TINY[name]
    stock = entry.call(TINY[name].build().to("cuda", torch.bfloat16), steps=4)
    eager = accelerated(name, compile=None)
    of_eager = entry.call(eager, steps=4)
    pipe = accelerated(name, compile=CompileConfig(graphs=graphs))
    for _ in range(2):
        ours = entry.call(pipe, steps=4)
    assert relative_error(ours, of_eager) < 0.1
    compiled = pipe.acceleration.report().compiled["transformer"]
    assert compiled["eager"] == {}
    assert compiled["graphs"] == len(pipe.acceleration.plan.family.blocks)
    if graphs:
        assert pipe.acceleration.report().graphs["transformer"]["replayed"] >= 4
    with pipe.acceleration.paused():
        assert torch.equal(entry.call(pipe, steps=4), stock)
    again = entry.call(pipe, steps=4)
    assert torch.equal(again, ours)
    pipe.acceleration.remove()
    assert torch.equal(entry.call(pipe, steps=4), stock)


@pytest.mark.parametrize("graphs", [False, True])
def test_adapters_come_and_go_between_calls(graphs):
    entry = TINY["flux_dev"]
    stock = entry.build().to("cuda", torch.bfloat16)
    pipe = accelerated("flux_dev", compile=CompileConfig(scope=None, graphs=True) if graphs else None)
    adapter = lora_state_dict(stock.transformer, rank=4)
    entry.call(pipe, steps=4)
    for step in (
        lambda each: each.load_lora_weights(dict(adapter), adapter_name="tiny"),
        lambda each: each.set_adapters("tiny", 0.5),
        lambda each: each.fuse_lora(),
        lambda each: each.unfuse_lora(),
        lambda each: each.unload_lora_weights(),
    ):
        step(stock)
        step(pipe)
        right = entry.call(stock, steps=4)
        for _ in range(2):
            assert relative_error(entry.call(pipe, steps=4), right) < 0.2
    pipe.acceleration.remove()
    assert torch.equal(entry.call(pipe, steps=4), entry.call(stock, steps=4))


def test_quantising_never_takes_more_memory_and_the_weights_wait_in_pinned_memory():
    linears = [nn.Linear(4096, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    pipe = TINY["flux_dev"].build().to("cuda", torch.bfloat16)
    for index, linear in enumerate(linears):
        pipe.transformer.transformer_blocks[0].register_module(f"ballast_{index}", linear)
    before, originals = torch.cuda.memory_allocated(), [linear.weight.clone() for linear in linears[:2]]
    torch.cuda.reset_peak_memory_stats()
    accelerate_pipeline(pipe, quality="balanced", quantize="fp8", compile=None)
    assert torch.cuda.max_memory_allocated() < before + 9 * linears[0].weight.nbytes
    ballast = 8 * linears[0].weight.nbytes
    assert torch.cuda.memory_allocated() < before + 2 * linears[0].weight.nbytes - 0.45 * ballast
    assert all(linear.weight.is_pinned() for linear in linears)
    pipe.acceleration.remove()
    for linear, original in zip(linears, originals, strict=False):
        assert linear.weight.is_cuda
        assert torch.equal(linear.weight, original)


def test_weights_that_are_not_kept_are_freed():
    pipe = TINY["flux_dev"].build().to("cuda", torch.bfloat16)
    linear = nn.Linear(4096, 8192, device="cuda", dtype=torch.bfloat16)
    size = linear.weight.nbytes
    pipe.transformer.transformer_blocks[0].register_module("ballast", linear)
    del linear
    before = torch.cuda.memory_allocated()
    accelerate_pipeline(pipe, quality="balanced", quantize=QuantizeConfig(reversible=False), compile=None)
    gc.collect()
    assert torch.cuda.memory_allocated() < before - 0.4 * size


def test_one_forward_is_within_two_and_a_half_times_the_noise_floor_of_stocks_own_compile():
    from diffusers import FluxTransformer2DModel

    from pipeboost.contract.call import open_call
    from pipeboost.contract.registry import family_named
    from pipeboost.core.ledger import Ledger
    from pipeboost.features.quantize.model import quantise_model

    family = family_named("FluxPipeline")
    assert family is not None
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = FluxTransformer2DModel(guidance_embeds=True).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    inputs = family.full_sizes[0].inputs("cuda", torch.bfloat16)
    stock = model(**inputs)[0]
    with stock_compile(model, fullgraph=True):
        floor = relative_error(model(**inputs)[0], stock)
    with Ledger() as ledger:
        quantise_model(model, QuantizeConfig(), family, ledger)
        with open_call(None, owner=None):
            error = relative_error(model(**inputs)[0], stock)
        ledger.undo()
    assert torch.equal(model(**inputs)[0], stock)
    assert error < 2.5 * floor, (error, floor)
