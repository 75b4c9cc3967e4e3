"""The kernels that rewrites of captured graphs call, against plain torch in float64, and compiled blocks with them."""

import pytest
import torch
from torch.nn import functional as F

from pipeboost import CompileConfig, accelerate_pipeline
from pipeboost.core.config import REWRITES
from tests.pipelines.tiny import TINY

if torch.cuda.is_available():
    from pipeboost.kernels.float8 import modulated_norm_float8, quantise_rows
    from pipeboost.kernels.norms import modulated_norm, norm_rotary
    from pipeboost.kernels.products import linear_of_parts

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [(1, 512, 24, 128), (2, 333, 12, 64), (1, 4097, 3, 128)]
"""Batch, tokens, heads, numbers a head: none of the second is a multiple of any tile."""


@pytest.fixture(autouse=True)
def _poisoned():
    """What kernels leave unwritten is NaN."""
    torch.manual_seed(0)
    torch.full((64 * 2**20,), torch.nan, device="cuda")


def randn(*shape, dtype, scale=1.0):
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def near(found, expected, *, of=None):
    """Whether it is the expected but for the rounding of the result, and of a partial result `of` this size."""
    assert torch.isfinite(found.float()).all()
    size = expected.abs() if of is None else expected.abs() + of.abs()
    error = (found.double() - expected).abs()
    allowed = torch.finfo(found.dtype).eps * size.clamp_min(1e-2 * size.max())
    assert bool((error <= allowed).all()), float((error / allowed).max())


def normed(x, weight, eps, across):
    x = x.double().flatten(2) if across else x.double()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight.double()


def rotated(x, cos, sin):
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosines, sines = (table.double()[None, :, None].unflatten(-1, (-1, 2)).unbind(-1) for table in (cos, sin))
    pair = (even * cosines[0] - odd * sines[0], odd * cosines[1] + even * sines[1])
    return torch.stack(pair, -1).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_norm_and_rotation_are_those_of_float64(shape, dtype, across, scale):
    batch, tokens, heads, dim = shape
    text, image = randn(batch, 7, heads, dim, dtype=dtype, scale=scale), randn(*shape, dtype=dtype, scale=scale)
    weight = randn(heads * dim if across else dim, dtype=dtype)
    angle = torch.randn(tokens, dim, device="cuda")
    cos, sin = angle.cos(), angle.sin()
    tables = [None, cos[None, :, None]], [None, sin[None, :, None]]
    found = norm_rotary([text, image], [weight, None], *tables, [1e-6, 1e-5], across)
    expected = [normed(text, weight, 1e-6, across), normed(image, None, 1e-5, across)]
    expected = [each.unflatten(2, (heads, dim)) if across else each for each in expected]
    near(found, torch.cat([expected[0], rotated(expected[1], cos, sin)], 1))
    half = norm_rotary([image], [weight], [cos[:, : dim // 2]], [sin[:, None, : dim // 2]], [1e-6], across)
    expected = normed(image, weight, 1e-6, across)
    expected = expected.unflatten(2, (heads, dim)) if across else expected
    twice = [table[:, : dim // 2].repeat_interleave(2, 1) for table in (cos, sin)]
    near(half, rotated(expected, *twice))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 512, 3072), (2, 333, 1536), (1, 4097, 200)])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_a_modulated_norm_is_that_of_float64(batch, tokens, width, dtype, scale):
    x, branch = (randn(batch, tokens, width, dtype=dtype, scale=scale) for _ in range(2))
    gate, by, shift = (each[:, None] for each in randn(batch, 6 * width, dtype=dtype).chunk(6, 1)[1:4])
    total, found = modulated_norm(x, branch, gate, by, shift, 1e-6, True)
    near(total, x.double() + gate.double() * branch.double())
    plain = F.layer_norm(total.double(), (width,), None, None, 1e-6)
    near(found, plain * (1 + by.double()) + shift.double())
    weight, bias = torch.randn(2, width, device="cuda")
    affine = modulated_norm(x, None, None, weight, bias, 1e-6, False)[1]
    near(affine, F.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-6))
    again, rows, scales = modulated_norm_float8(x, branch, gate, by, shift, 1e-6, True)
    assert torch.equal(again, total)
    in_8_bits(rows, scales, (plain * (1 + by.double()) + shift.double()).flatten(0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "widths"), [(512, (3072, 12288)), (4097, (200, 1000)), (333, (12288,))])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_rows_are_quantised_as_in_float64(rows, widths, dtype, scale):
    parts = [randn(rows, width, dtype=dtype, scale=scale) for width in widths]
    gelu = [place == len(parts) - 1 for place in range(len(parts))]
    taken = [
        F.gelu(part.double(), approximate="tanh") if own else part.double()
        for part, own in zip(parts, gelu, strict=True)
    ]
    in_8_bits(*quantise_rows(parts, gelu), torch.cat(taken, 1))


def in_8_bits(rows, scales, expected):
    """Whether these are the expected, to half a step of float8_e4m3fn: an eighth, or a 512th below the normal ones."""
    torch.testing.assert_close(scales.double(), expected.abs().amax(1, keepdim=True) / 448, rtol=1e-5, atol=0)
    error = (rows.double() * scales.double() - expected).abs() / scales
    assert bool((error <= (expected / scales).abs() / 16 * 1.001 + 2**-10 * 1.001).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "widths"), [(512, (3072, 12288)), (4097, (64, 256)), (333, (128, 8))])
def test_a_product_of_parts_is_that_of_their_concatenation(rows, widths, dtype):
    parts = [randn(rows, width, dtype=dtype) for width in widths]
    weight, bias = randn(256, sum(widths), dtype=dtype, scale=sum(widths) ** -0.5), randn(256, dtype=dtype)
    first, second = (part.double() @ own.double().T for part, own in zip(parts, weight.split(widths, 1), strict=True))
    near(linear_of_parts(parts, weight, bias), first + second + bias.double(), of=first + bias.double())


@pytest.mark.parametrize("name", ["flux_dev", "qwen_image", "wan21_t2v", "hunyuan_video"])
@pytest.mark.parametrize("quality", ["lossless", "balanced"])
def test_rewritten_graphs_give_what_others_give(name, quality):
    entry = TINY[name]
    pipe = entry.build().to("cuda", torch.bfloat16)
    stock = entry.call(pipe).float()

    def run(rewrites):
        accelerate_pipeline(pipe, quality=quality, compile=CompileConfig(rewrites=rewrites, graphs=False))
        found, report = entry.call(pipe).float(), pipe.acceleration.report().compiled
        pipe.acceleration.remove()
        return (found - stock).abs().mean().item(), report

    (plain, _), (rewritten, report) = run(()), run(REWRITES)
    counted = next(iter(report.values()))
    assert not counted["eager"], counted
    assert {"norm_rotary", "modulated_norm"} <= set(counted["rewrites"]), counted
    assert rewritten <= 2 * plain + 1e-3
    assert torch.equal(entry.call(pipe).float(), stock)
