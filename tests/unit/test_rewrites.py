"""Rewrites of captured graphs: what they find, what they leave alone, and that the result is the same but for rounding.

The kernels are Triton's: on a CPU its interpreter runs them, in a process of its own, since it is chosen when Triton is
imported.
"""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeboost import CompileConfig
from pipeboost.contract.call import open_call
from pipeboost.contract.registry import family_of
from pipeboost.core.config import REWRITES
from pipeboost.core.errors import ConfigurationError
from pipeboost.core.ledger import Ledger
from pipeboost.features.compile import compile_model, rewrites
from pipeboost.features.compile.rewrites import RewritingBackend, float8_rows, gelu_gemm, modulated_norm, norm_rotary
from pipeboost.kernels.float8 import quantise_rows
from tests.floors import floor_of, is_rounding
from tests.pipelines.tiny import TINY

FOUND = {
    "flux_dev": {"norm_rotary": 4, "modulated_norm": 5, "cat_gemm": 1},
    "qwen_image": {"norm_rotary": 2, "modulated_norm": 4},
    "wan21_t2v": {"norm_rotary": 2, "modulated_norm": 3},
    "hunyuan_video": {"cat_of_slices": 2, "norm_rotary": 4, "modulated_norm": 5, "cat_gemm": 1},
}
"""What is rewritten in the graphs of a pipeline's kinds of blocks."""


def compiled(function: Callable[..., Any], *names: str) -> tuple[Callable[..., Any], RewritingBackend]:
    """A function through Dynamo, its graph rewritten and then run as it is."""
    backend = RewritingBackend(lambda graph, _: graph.forward, names)
    return torch.compile(function, backend=backend, fullgraph=True), backend


def test_settings_name_every_rewrite() -> None:
    assert set(REWRITES) == set(rewrites.REWRITES)
    assert CompileConfig(rewrites=["cat_gemm"]).rewrites == ("cat_gemm",)
    for wrong in ("cat_gemm", ("all",), 3):
        with pytest.raises(ConfigurationError, match=r"compile\.rewrites"):
            CompileConfig(rewrites=wrong)


def test_rewritten_blocks_and_the_kernels_of_gpus_give_what_stock_gives() -> None:
    pytest.importorskip("triton", reason="the kernels are Triton's")
    script = "from tests.unit import test_merge, test_rewrites, test_vae_rewrites; test_rewrites.compare_fused()\n"
    script += "for name in test_rewrites.FOUND: test_rewrites.compare(name)\n"
    script += "test_merge.compare_kernel(); test_vae_rewrites.compare_kernel()"
    settings = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=settings, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def compare(name: str) -> None:
    """All rewrites of one forward on the CPU in float32, against stock."""
    for module in (norm_rotary, modulated_norm):
        module.suits_our_kernels = lambda tensor: tensor is not None  # type: ignore[attr-defined]
    pipe = TINY[name].build()
    inputs = TINY[name].forward_inputs(pipe)
    for blocks in pipe.transformer.children():
        if isinstance(blocks, nn.ModuleList):
            del blocks[1:]  # they run on the graph of the first

    def run() -> torch.Tensor:
        return pipe.transformer(**copy.deepcopy(inputs))[0]

    stock = run()
    with Ledger() as ledger:
        settings = CompileConfig(backend=lambda graph, _: graph.forward)
        counted = compile_model(pipe.transformer, settings, family_of(pipe), ledger).counters
        with open_call(None, owner=None):
            difference = float((run() - stock).abs().max())
        ledger.undo()
    assert not counted.eager, counted
    assert counted.rewrites == FOUND[name], counted
    assert is_rounding(difference, lambda: floor_of(run, pipe.transformer, stock=stock))
    assert torch.equal(run(), stock)


X, Y, TABLE, QUERIES = torch.randn(2, 6, 48), torch.randn(2, 6, 48), torch.randn(2, 1, 48), torch.randn(2, 6, 3, 16)
WEIGHT, COS, SIN = torch.randn(16), torch.randn(6, 1, 16), torch.randn(6, 1, 16)
FREQUENCIES = torch.randn(6, 1, 8, dtype=torch.complex64)


def modulated(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], None, None, 1e-6) * (1 + scale) + shift


def normed(x: torch.Tensor, weight: torch.Tensor = WEIGHT) -> torch.Tensor:
    return torch.rms_norm(x, weight.shape, weight, 1e-6)


def rotated(x: torch.Tensor, cos: torch.Tensor = COS, sin: torch.Tensor = SIN) -> torch.Tensor:
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(3) * sin


def rotated_by_writing(x: torch.Tensor) -> torch.Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    cos, sin = COS[..., 0::2], SIN[..., 1::2]
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def rotated_as_complex(x: torch.Tensor, frequencies: torch.Tensor = FREQUENCIES) -> torch.Tensor:
    pairs = torch.view_as_complex(x.reshape(2, 6, 3, -1, 2))
    return torch.view_as_real(pairs * frequencies).flatten(3)


def written_out(x: torch.Tensor, *, keepdim: bool = True, eps: Any = 1e-3) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=keepdim) + eps) * WEIGHT


def overwritten(x: torch.Tensor) -> torch.Tensor:
    before = F.layer_norm(x, x.shape[-1:], None, None, 1e-6)
    x[:, :2] = 0
    return before * (1 + TABLE) + TABLE


def overwritten_by_method(x: torch.Tensor) -> torch.Tensor:
    total = x + Y
    x.mul_(2)
    return modulated(total, TABLE, TABLE) + x


def overwritten_by_argument(x: torch.Tensor) -> torch.Tensor:
    before = F.layer_norm(x, x.shape[-1:], None, None, 1e-6)
    F.silu(x, True)
    return before * (1 + TABLE) + TABLE


def overwritten_at_once(x: torch.Tensor) -> torch.Tensor:
    total = x + Y
    x += 1
    return modulated(total, TABLE, TABLE) + x


LEFT_ALONE = {
    "overwritten by +=": lambda: overwritten_at_once(X.clone()),
    "one sample with tables of two": lambda: modulated(X[:1], TABLE, TABLE),
    "rows without a batch": lambda: modulated(X[0], TABLE[:1], TABLE[:1]),
    "eps by name": lambda: F.layer_norm(X, (48,), Y[0, 0], Y[0, 1], eps=1.0),
    "a factor of the shift": lambda: torch.add(F.layer_norm(X, (48,)) * (1 + TABLE), TABLE, alpha=3),
    "one number for all features": lambda: modulated(X, Y[0, 0, 0], Y[0, 0, 1]),
    "a table for each token": lambda: modulated(X, Y, Y),
    "entries overwritten": lambda: overwritten(X.clone()),
    "overwritten by a method": lambda: overwritten_by_method(X.clone()),
    "overwritten by an argument": lambda: overwritten_by_argument(X.clone()),
    "tokens after heads": lambda: rotated(normed(QUERIES.transpose(1, 2)), COS[:, 0], SIN[:, 0]),
    "as many tokens as heads": lambda: rotated(normed(QUERIES[:, :3]), COS[:3, 0], SIN[:3, 0]),
    "one table for all tokens": lambda: rotated(normed(QUERIES[:, :2]), COS[0], SIN[0]),
    "one token at several places": lambda: rotated(normed(QUERIES[:, :1])),
    "a part of each head": lambda: rotated(normed(X.view(2, 6, 1, 48), X[0, 0])[:, :, :, :16]),
    "some of the heads": lambda: rotated(normed(X, X[0, 0]).unflatten(2, (3, 16))[:, :, :2]),
    "tokens parted after their norm": lambda: rotated(normed(Y[:, :, :16]).unflatten(1, (6, 1))),
    "a norm over all heads, heads while rotating": lambda: rotated_as_complex(normed(X, X[0, 0])),
    "conjugate frequencies": lambda: rotated_as_complex(normed(QUERIES), FREQUENCIES.conj()),
    "an eps that is a tensor": lambda: rotated(written_out(QUERIES, eps=WEIGHT[:1].abs())),
    "a mean of another place": lambda: rotated(
        written_out(QUERIES[0, 0, 0].expand(16, 16, 16, 16), keepdim=False), WEIGHT, WEIGHT
    ),
}
"""What looks like a norm or a rotation that one kernel computes, and is another."""


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_only_looks_like_it_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (norm_rotary, modulated_norm):
        monkeypatch.setattr(module, "suits_our_kernels", lambda tensor: tensor is not None)
    with torch.no_grad():
        run, backend = compiled(LEFT_ALONE[name], "norm_rotary", "modulated_norm")
        assert torch.equal(run(), LEFT_ALONE[name]())
    assert not backend.found


def summed_in_place() -> torch.Tensor:
    total = torch.zeros_like(X)
    total += X
    total += Y
    return modulated(total, TABLE, TABLE) * (TABLE.gt(0) & TABLE.lt(1))


FUSED = {
    "a sum in place that nothing else reads": summed_in_place,
    "a factor of the branch": lambda: modulated(torch.add(X, Y, alpha=3), TABLE, TABLE),
    "a scalar gate": lambda: modulated(X + Y[0, 0, 0] * Y, TABLE, TABLE),
    "tables with gaps": lambda: modulated(X, X.view(2, 48, 6)[:, None, :, 0], X.view(2, 48, 6)[:, None, :, 1]),
    "tables of one number a sample": lambda: modulated(X, X[:, :1, :1].expand(2, 1, 48), TABLE),
    "a weight with gaps": lambda: F.layer_norm(X, (48,), X.flatten()[:96:2], X[0, 1], 1e-6),
    "8 bits in between": lambda: modulated(X.to(torch.float8_e4m3fn).to(torch.float32) + Y, TABLE, TABLE),
    "a weight of a head with gaps": lambda: rotated(normed(QUERIES, X.flatten()[:32:2])),
    "one head a token": lambda: rotated(normed(QUERIES[:, :, 0].contiguous()[:, None].transpose(1, 2))),
    "a slice of what is rotated": lambda: rotated(normed(QUERIES))[:, :4] * 2,
    "no text": lambda: rotated(torch.cat([normed(QUERIES[:, :0]), normed(QUERIES)], dim=1)),
    "parts rotated together after another": lambda: torch.cat(
        [normed(QUERIES), rotated(torch.cat([normed(QUERIES[:, :2]), normed(QUERIES[:, 2:])], dim=1))], dim=1
    ),
    "written and used as it is": lambda: rotated_by_writing(normed(QUERIES)) * 2,
    "written and used twice": lambda: (
        lambda out: torch.cat([torch.cat([out, normed(QUERIES)], dim=1), out * 2], dim=1)
    )(rotated_by_writing(normed(QUERIES))),
}
"""What one kernel computes, wherever its inputs lie and whatever else they are used for."""


@torch.no_grad()
def compare_fused() -> None:
    """Each of `FUSED` on the CPU in float32, rewritten and as it is."""
    for module in (norm_rotary, modulated_norm):
        module.suits_our_kernels = lambda tensor: tensor is not None  # type: ignore[attr-defined]
    for name, function in FUSED.items():
        run, backend = compiled(function, "norm_rotary", "modulated_norm")
        torch.testing.assert_close(
            run(), function(), rtol=1e-3, atol=1e-4, msg=lambda told, name=name: f"{name}: {told}"
        )
        assert backend.found, name
    devices: list[torch.Tensor] = []
    guard = torch.cuda.device_of
    torch.cuda.device_of = lambda tensor: devices.append(tensor) or guard(tensor)  # type: ignore[assignment,func-returns-value,misc]
    modulated_norm.norms.modulated_norm(X, None, None, TABLE, TABLE, 1e-6, True)
    modulated_norm.norms.norm_rotary([QUERIES], [WEIGHT], [COS], [SIN], [1e-6], False)
    torch.cuda.device_of = guard  # type: ignore[misc]
    assert len(devices) == 2  # Triton launches on the current device


def test_what_gradients_are_taken_of_is_left_alone() -> None:
    linear, a = nn.Linear(24, 6), torch.randn(2, 5, 24)
    run, backend = compiled(lambda a: linear(torch.cat([a[..., :16], a[..., 16:]], dim=-1)), "cat_gemm")
    run(a).sum().backward()
    assert linear.weight.grad is not None
    assert not backend.found
    with torch.no_grad():
        run(a)
    assert backend.found == {"cat_gemm": 1}


def test_what_is_joined_has_memory_of_its_own_where_it_is_returned() -> None:
    x = torch.randn(2, 7, 3)
    run, backend = compiled(lambda x: torch.cat([x[:, :2], x[:, 2:]], dim=1).view(-1), "cat_of_slices")
    assert run(x).data_ptr() != x.data_ptr()
    assert not backend.found

    def added(x: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([x[:, :2], x[:, 2:]], dim=1)
        joined += 1
        return joined * x

    run, backend = compiled(added, "cat_of_slices")
    assert torch.equal(run(x.clone()), added(x))
    assert not backend.found


def test_slices_are_joined_only_where_they_are_all_of_it_in_order() -> None:
    x = torch.randn(2, 7, 3)
    whole, backend = compiled(lambda x: torch.cat([x[:, :2], x[:, 2:5], x[:, 5:]], dim=1) * 2, "cat_of_slices")
    assert torch.equal(whole(x), x * 2)
    assert backend.found == {"cat_of_slices": 1}
    for other in (
        lambda x: torch.cat([x[:, 2:], x[:, :2]], dim=1),
        lambda x: torch.cat([x[:, :2], x[:, 3:]], dim=1),
        lambda x: torch.cat([x[:, :2], x[:, 2:6]], dim=1),
        lambda x: torch.cat([x[:, :2], (x + 1)[:, 2:]], dim=1),
        lambda x: torch.cat([x[:, :2, 1:], x[:, 2:, 1:]], dim=1),
        lambda x: torch.cat([x[:, :4:2], x[:, 4:]], dim=1),
        lambda x: torch.cat([x[:, :-2], x[:, -2:3], x[:, 3:]], dim=1) * 2,
        lambda x: torch.cat([x[:1], x[1:]], axis=1) * 2,
    ):
        run, backend = compiled(other, "cat_of_slices")
        assert torch.equal(run(x), other(x))
        assert not backend.found


def test_a_product_of_what_is_joined_for_it_alone_is_a_sum_of_products() -> None:
    linear, a, b = nn.Linear(24, 6), torch.randn(2, 5, 16), torch.randn(2, 5, 8)
    with torch.no_grad():
        run, backend = compiled(lambda a, b: linear(torch.cat([a, b], dim=-1)), "cat_gemm")
        expected = linear.double()(torch.cat([a, b], -1).double())
        linear.float()
        assert (run(a, b) - expected).abs().max() < 24 * torch.finfo(torch.float32).eps * 4
        assert backend.found == {"cat_gemm": 1}

        def needed_twice(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            joined = torch.cat([a, b], dim=-1)
            return linear(joined).sum() + joined.sum()

        run, backend = compiled(needed_twice, "cat_gemm")
        run(a, b)
        assert not backend.found
        by_name = lambda a, b: F.linear(torch.cat([a, b], -1), bias=linear.bias, weight=linear.weight)  # noqa: E731
        run, backend = compiled(by_name, "cat_gemm")
        torch.testing.assert_close(run(a, b), by_name(a, b))
        assert backend.found == {"cat_gemm": 1}

        def lowered(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return linear(torch.cat([a, b], dim=-1))

        run, backend = compiled(lowered, "cat_gemm")
        assert run(a, b).dtype is torch.bfloat16
        assert not backend.found


def test_complex_products_are_written_in_real_numbers() -> None:
    x, angle = torch.randn(2, 5, 3, 8), torch.randn(5, 1, 4)

    def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(2, 5, 3, -1, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(3)

    run, backend = compiled(rotate, "real_rotary")
    torch.testing.assert_close(run(x, angle), rotate(x, angle))
    assert backend.found == {"real_rotary": 1}

    def back(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x) * table.conj())

    pairs, table = torch.randn(5, 4, 2), torch.randn(5, 4, dtype=torch.complex64)
    run, backend = compiled(back, "real_rotary")
    assert torch.equal(run(pairs, table), back(pairs, table))
    assert not backend.found


def test_a_gelu_moves_into_its_product_only_where_that_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = nn.Linear(16, 8), torch.randn(2, 5, 16)
    taken = lambda x: F.gelu(linear(x), approximate="tanh")  # noqa: E731
    with torch.no_grad():
        run, backend = compiled(taken, "gelu_gemm")
        assert torch.equal(run(x), taken(x))
        assert not backend.found  # on a CPU the product's GELU is another one
        monkeypatch.setattr(gelu_gemm, "suits_our_kernels", lambda tensor: True)
        torch._dynamo.reset()
        run, backend = compiled(taken, "gelu_gemm")
        assert run(x).shape == (2, 5, 8)
        assert backend.found == {"gelu_gemm": 1}
        for other in (lambda x: F.gelu(linear(x)), lambda x: (y := linear(x), F.gelu(y, approximate="tanh"))[1] + y):
            run, backend = compiled(other, "gelu_gemm")
            assert torch.equal(run(x), other(x))
            assert not backend.found


def test_rows_are_quantised_once_and_with_the_gelu_and_the_joining_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8_rows, "suits_our_kernels", lambda tensor: True)
    a, b = torch.randn(2, 5, 16), torch.randn(2, 5, 32)

    def twice(a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
        joined = torch.cat([a, F.gelu(b, approximate="tanh")], dim=-1)
        return [each.float() for _ in range(2) for each in quantise_rows([joined.reshape(-1, 48)], [False])]

    run, backend = compiled(twice, "float8_rows")
    found, expected = run(a, b), twice(a, b)
    assert all(map(torch.equal, found, expected))
    assert backend.found == {"float8_rows": 1}
    assert torch.equal(found[0], found[2])
