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


def test_rewritten_blocks_give_what_stock_gives() -> None:
    pytest.importorskip("triton", reason="the kernels are Triton's")
    script = "from tests.unit.test_rewrites import FOUND, compare; [compare(name) for name in FOUND]"
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


def test_complex_products_are_written_in_real_numbers() -> None:
    x, angle = torch.randn(2, 5, 3, 8), torch.randn(5, 1, 4)

    def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(2, 5, 3, -1, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(3)

    run, backend = compiled(rotate, "real_rotary")
    torch.testing.assert_close(run(x, angle), rotate(x, angle))
    assert backend.found == {"real_rotary": 1}


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
