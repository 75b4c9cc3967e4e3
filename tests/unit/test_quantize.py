"""Linears in 8 bits: what they compute, how they move and are copied, which they are, and when a plan has them."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeboost.contract.model_info import ComponentSize, ModelInfo, Quantizable
from pipeboost.contract.registry import family_named, generic_family
from pipeboost.core.config import AccelerationConfig, ParallelConfig, QuantizeConfig
from pipeboost.core.errors import ConfigurationError, PipeboostError, UnsupportedError
from pipeboost.core.families import Blocks
from pipeboost.core.hardware import Hardware
from pipeboost.features.quantize.linear import Float8Linear, dequantised_linear
from pipeboost.features.quantize.select import linears_of
from pipeboost.kernels.float8 import FLOAT8, to_float8
from pipeboost.plan import make_plan
from pipeboost.quality.metrics import relative_error
from tests.floors import is_rounding

H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", (9, 0), 80 * 2**30, 1, False, True)
A100 = Hardware("cuda", "NVIDIA A100 80GB", (8, 0), 80 * 2**30, 1, False, True)
CPU = Hardware("cpu", "CPU with 2 cores", None, 24 * 2**30, 1, False, True)
FLUX = family_named("FluxPipeline")
FACTS = ModelInfo(
    "FluxPipeline",
    torch.bfloat16,
    30 * 2**30,
    components=(ComponentSize("transformer", "transformers", "transformer", 24 * 2**30, 20 * 2**30, 2**29),),
    quantizable={
        "transformer": Quantizable(500, 20 * 2**30, 10 * 2**30, {"with a width that is no multiple of 16": 3})
    },
)


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 160)


def reference(linear: nn.Linear, features: torch.Tensor, *, activations: bool = True) -> torch.Tensor:
    """The product of the rounded operands in float64, by plain torch."""

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        scale = rows.double().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
        return (rows.double() / scale).float().to(FLOAT8).double() * scale

    return F.linear(
        rounded(features) if activations else features.double(), rounded(linear.weight), linear.bias.double()
    )


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 33, 96), (2, 40, 96), (70, 96), (2, 3, 5, 96)])
def test_a_product_is_that_of_rows_in_8_bits(linear, shape):
    features = torch.randn(shape)
    features[..., 0, :] *= 1000  # an outlier costs one row alone
    features[..., 1, :] = 0
    product = Float8Linear(linear)(features)
    assert product.shape == (*shape[:-1], 160)
    for ours, right in zip(product.flatten(0, -2), reference(linear, features).flatten(0, -2), strict=True):
        # Two roundings of a value that lies between two others may differ, as the last bit of its scale does.
        assert relative_error(ours, right) < 2e-3


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_a_few_rows_keep_their_precision(linear, rows):
    features = torch.randn(rows, 96)
    floor = float((F.linear(features, linear.weight, linear.bias) - reference_of_stock(linear, features)).abs().max())
    difference = float((Float8Linear(linear)(features) - reference(linear, features, activations=False)).abs().max())
    assert is_rounding(difference, floor)


def reference_of_stock(linear: nn.Linear, features: torch.Tensor) -> torch.Tensor:
    return F.linear(features.double(), linear.weight.double(), linear.bias.double())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_has_the_dtype_of_the_features(dtype, bias):
    linear = nn.Linear(32, 48, bias=bias, dtype=dtype)
    for shape in ((1, 96, 32), (2, 32), (1, 0, 32)):
        features = torch.randn(shape, dtype=dtype)
        ours, stock = Float8Linear(linear)(features), linear(features)
        assert (ours.dtype, ours.shape) == (stock.dtype, stock.shape)
        assert not ours.numel() or relative_error(ours, stock) < 0.06


def test_what_is_not_finite_shows():
    features = torch.ones(1, 80, 32)
    features[0, 3, 5] = torch.inf
    product = Float8Linear(nn.Linear(32, 32))(features)
    assert not bool(product[0, 3].isfinite().any())
    assert bool(product[0, 4].isfinite().all())


@torch.no_grad()
def test_compiled_it_computes_what_it_does_eager(linear):
    quantised = Float8Linear(linear)
    compiled = torch.compile(quantised, backend="aot_eager", fullgraph=True)
    for features in (torch.randn(1, 80, 96), torch.randn(1, 96), torch.randn(2, 96)):
        assert relative_error(compiled(features), quantised(features)) < 1e-6


def test_conversions_leave_8_bits_alone_and_devices_do_not(linear):
    quantised = Float8Linear(linear)
    before = quantised.weight.clone()
    for convert in (nn.Module.half, nn.Module.double, lambda module: module.to(torch.bfloat16)):
        convert(quantised)
        assert (quantised.weight.dtype, quantised.weight_scale.dtype) == (FLOAT8, torch.float32)
        assert torch.equal(quantised.weight.view(torch.uint8), before.view(torch.uint8))
    assert quantised.bias.dtype == torch.bfloat16
    assert quantised.to("meta").weight.is_meta
    assert [name for name, _ in quantised.named_parameters()] == ["bias"]


def test_a_copy_and_a_pickle_are_linears_as_they_were(linear):
    quantised = nn.Sequential(Float8Linear(linear))
    file = io.BytesIO()
    torch.save(quantised, file)
    file.seek(0)
    for twin in (copy.deepcopy(quantised), torch.load(file, weights_only=False)):
        assert type(twin[0]) is nn.Linear
        assert torch.equal(twin[0].weight, linear.weight)
        assert torch.equal(twin[0].bias, linear.bias)
        assert twin[0].bias is not linear.bias
    with pytest.raises(UnsupportedError, match="reversible=False"):
        copy.deepcopy(Float8Linear(linear, reversible=False))


def test_hooks_are_those_of_the_linear_and_their_handles_work(linear):
    seen = []
    first = linear.register_forward_hook(lambda *_: seen.append("first"))
    quantised = Float8Linear(linear)
    quantised.register_forward_pre_hook(lambda *_: seen.append("second"))
    quantised(torch.randn(1, 96))
    first.remove()
    linear(torch.randn(1, 96))
    assert seen == ["second", "first", "second"]


@torch.no_grad()
def test_what_is_left_of_the_weight_is_the_nearest_that_8_bits_have(linear):
    left = dequantised_linear(Float8Linear(linear, reversible=False))
    quantised, scale = to_float8(linear.weight)
    assert type(left) is nn.Linear
    assert torch.equal(left.weight, quantised.float() * scale)
    assert relative_error(left.weight, linear.weight) < 0.04


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        block = nn.ModuleDict({"wide": nn.Linear(32, 48), "odd": nn.Linear(32, 40), "first": nn.Linear(32, 32)})
        self.blocks = nn.ModuleList([block, copy.deepcopy(block)])
        self.proj_out = nn.Linear(32, 32)

    @property
    def dtype(self):
        return self.proj_out.weight.dtype


def test_linears_of_the_blocks_are_found_and_the_others_have_a_reason():
    model = Model()
    family = replace(FLUX, blocks=(Blocks("blocks", "image", {}),), keep_precision=("blocks.0.first",))
    linears, left = linears_of(model, family)
    assert [place.path for place, _ in linears] == ["blocks.0.wide", "blocks.1.wide", "blocks.1.first"]
    assert left == {"with a width that is no multiple of 16": 2, "kept as they are by the family": 1}
    model.blocks[1]["wide"].weight = model.blocks[0]["wide"].weight
    model.blocks[1]["first"].double()
    _, left = linears_of(model, replace(family, keep_precision=()))
    assert left == {"with a width that is no multiple of 16": 2, "that share their weight": 2, "in float64": 1}


def plan(hardware=H100, family=FLUX, facts=FACTS, quality="balanced", **settings):
    return make_plan(AccelerationConfig(quality=quality, **settings), hardware, family, facts)


def test_balanced_has_8_bits_where_the_gpu_has_and_the_plan_says_what_they_cost():
    made = plan()["quantize"]
    assert made.choice == "fp8"
    assert "500 linears" in made.why
    assert "20.00 GiB of the host's memory" in made.why
    assert made.considered == ("3 linears with a width that is no multiple of 16: keep their precision",)
    assert plan(quality="fast")["quantize"].on
    assert "does not bring them back" in plan(quantize=QuantizeConfig(reversible=False))["quantize"].why


def test_what_comes_after_sees_the_smaller_weights():
    assert plan().model.weights == 20 * 2**30
    assert plan().model.components[0].nbytes == 14 * 2**30
    small = replace(FACTS, free=22 * 2**30)
    assert not plan(facts=small)["offload"].on
    assert plan(facts=small, quantize=None)["offload"].on


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hardware": A100}, "needs compute capability 8.9, and NVIDIA A100 80GB has 8.0"),
        ({"facts": replace(FACTS, dtype=torch.float32)}, "is in float32"),
        ({"facts": replace(FACTS, offloaded=True)}, "offload of Diffusers"),
        ({"facts": replace(FACTS, hooks="a hook of Diffusers")}, "a hook of Diffusers"),
        ({"facts": replace(FACTS, quantizable={"transformer": Quantizable(0, 0, 0, already=True)})}, "left as it is"),
        ({"facts": replace(FACTS, quantizable={"transformer": Quantizable(0, 0, 0)})}, "no linears in blocks"),
        ({"facts": replace(FACTS, ranks=2), "parallel": ParallelConfig(tensor=2)}, "tensor=2"),
    ],
)
def test_what_is_not_possible_is_off_with_a_reason_and_refused_where_it_is_asked_for(changes, words):
    assert words in plan(**changes)["quantize"].why
    with pytest.raises(UnsupportedError, match=words) as caught:
        plan(**changes, quantize="fp8")
    assert "use quantize=None" in str(caught.value)


def test_8_bits_are_asked_for_on_a_cpu_and_where_no_family_names_blocks():
    unknown = generic_family("SomePipeline", {"transformer": True})
    for made, words in ((plan(CPU), "no faster"), (plan(family=unknown), "nobody has said")):
        assert not made["quantize"].on
        assert words in made["quantize"].why
    assert plan(CPU, quantize="fp8")["quantize"].on
    assert plan(family=unknown, quantize="fp8")["quantize"].on
    assert plan(quantize=None)["quantize"].why == "turned off"


@pytest.mark.parametrize("quality", ["exact", "lossless"])
def test_stricter_tiers_refuse_8_bits(quality):
    assert quality in plan(quality=quality)["quantize"].why
    with pytest.raises(ConfigurationError, match="needs quality='balanced'"):
        plan(quality=quality, quantize="fp8")


def test_settings_are_checked():
    with pytest.raises(PipeboostError, match="reversible"):
        QuantizeConfig(reversible=1)
    with pytest.raises(PipeboostError, match="quantize='int3'"):
        AccelerationConfig(quantize="int3")
