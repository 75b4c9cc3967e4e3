"""A VAE on a GPU: its kernel against plain torch, and what is rewritten or compiled against the same in float32."""

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pipeboost import CompileConfig, accelerate_pipeline
from pipeboost.contract.call import open_call
from pipeboost.contract.registry import families
from pipeboost.core.ledger import Ledger
from pipeboost.features.compile.vae import rewrite_vae
from pipeboost.kernels.channel_norm import channel_norm
from tests.pipelines import tiny_parts as parts
from tests.pipelines.tiny import TINY

pytestmark = pytest.mark.gpu
HALF = (torch.bfloat16, torch.float16)


def poison() -> None:
    """Fill the memory that the next results will lie in."""
    for size in (2**12, 2**16, 2**20, 2**24):
        torch.full((size,), float("nan"), device="cuda")


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 96, 1, 17, 33), (2, 192, 3, 5, 9), (1, 384, 4, 60, 104), (2, 12, 7, 7)])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("activate", [False, True])
def test_the_kernel_norms_and_activates_in_both_layouts(shape: tuple[int, ...], dtype: Any, activate: bool) -> None:
    torch.manual_seed(0)
    states = (torch.randn(shape, device="cuda") * 100).to(dtype)
    states[..., 0] = 0
    gamma = torch.randn(shape[1], *[1] * (len(shape) - 2), device="cuda").to(dtype)
    scale = shape[1] ** 0.5
    exact = F.normalize(states.double(), dim=1) * scale * gamma.double()
    exact = F.silu(exact) if activate else exact
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    for each in (states, states.contiguous(memory_format=layout)):
        poison()
        ours = channel_norm(each, gamma, scale, activate=activate)
        assert ours.stride() == each.stride()
        rtol = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), exact, rtol=rtol, atol=rtol)


@torch.no_grad()
@pytest.mark.parametrize(("name", "frames"), [("qwen_image", 1), ("wan", 1), ("wan", 4)])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_rewritten_vae_is_as_near_to_float32_as_stock(name: str, frames: int, dtype: Any, batch: int) -> None:
    vae: Any = parts.randomised(parts.qwen_vae() if name == "qwen_image" else parts.wan_vae()).to("cuda", dtype)
    latents = 0.3 * torch.randn(batch, 4, frames, 13, 22, device="cuda", dtype=dtype)
    exact = copy.deepcopy(vae).float().decode(latents.float()).sample
    stock = vae.decode(latents).sample
    autoencoder = next(each for each in families() if each.name == name).autoencoder
    ledger = Ledger()
    rewrite_vae(vae, autoencoder, ledger)
    with open_call(None, owner=None):
        poison()
        ours = vae.decode(latents).sample
    assert float((ours - exact).norm()) <= 1.2 * float((stock - exact).norm())
    ledger.undo()
    assert torch.equal(vae.decode(latents).sample, stock)


@pytest.mark.parametrize("name", ["flux_dev", "hunyuan_video"])
def test_a_compiled_vae_is_as_near_to_float32_as_stock(name: str) -> None:
    entry = TINY[name]
    exact = entry.build().to("cuda")
    pipe = entry.build().to("cuda")
    pipe.vae.to(torch.bfloat16)
    accelerate_pipeline(pipe, compile=CompileConfig(vae=True))
    with torch.no_grad():
        latents = 0.3 * torch.randn(1, 4, *([3] if name == "hunyuan_video" else []), 8, 12, device="cuda")
        true = exact.vae.decode(latents).sample
        stock = pipe.vae.decode(latents.bfloat16()).sample
        with pipe.acceleration.open():
            ours = pipe.vae.decode(latents.bfloat16()).sample
    assert float((ours - true).norm()) <= 1.2 * float((stock - true).norm())
    assert not torch.equal(ours, stock)
