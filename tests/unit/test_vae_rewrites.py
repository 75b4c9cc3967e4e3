"""A rewritten video VAE sums the same terms as stock, inside our calls alone, and leaves no trace."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from torch import nn
from torch.nn import functional as F

from pipeboost.contract.call import open_call
from pipeboost.contract.context import Component
from pipeboost.contract.registry import families
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import stock_class
from pipeboost.features.compile.rewrites import RewritingBackend, conv_layout
from pipeboost.features.compile.vae import is_rewritable, rewrite_vae
from pipeboost.features.compile.vae.apply import rebind
from pipeboost.features.compile.vae.causal_conv import convolve_causally, is_causal
from pipeboost.kernels.channel_norm import channel_norm
from tests.distributed.vae_cases import wan22_vae
from tests.floors import floor_of, is_rounding
from tests.pipelines import tiny_parts as parts

Q, W = "qwen_image", "wan"
# Family, how to build its VAE, frames of its latents, pixels a latent, batch, whether it is tiled.
CASES: dict[str, tuple[str, Callable[[], Any], int, int, int, bool]] = {
    "an image": (Q, parts.qwen_vae, 1, 8, 1, False),
    "two images": (Q, parts.qwen_vae, 1, 8, 2, False),
    "tiles of an image": (Q, parts.qwen_vae, 1, 8, 1, True),
    "one frame": (W, parts.wan_vae, 1, 8, 1, False),
    "four latent frames": (W, parts.wan_vae, 4, 8, 1, False),
    "tiles of a video": (W, parts.wan_vae, 2, 8, 1, True),
    "Wan 2.2": (W, wan22_vae, 3, 16, 1, False),
}


def autoencoder(family: str) -> Any:
    return next(each for each in families() if each.name == family).autoencoder


@torch.no_grad()
def both_ways(vae: Any, latents: torch.Tensor, picture: torch.Tensor) -> list[torch.Tensor]:
    return [vae.decode(latents).sample, vae.encode(picture).latent_dist.parameters]


def inputs_of(name: str, dtype: torch.dtype) -> tuple[Any, torch.Tensor, torch.Tensor]:
    _, build, frames, pixels, batch, tiled = CASES[name]
    vae = parts.randomised(build()).to(dtype)
    if tiled:
        vae.enable_tiling(32, 32, 24, 24)
    generator = torch.Generator().manual_seed(1)
    rows, columns = (5, 6) if not tiled else (5, 7)
    latents = torch.randn((batch, 4, frames, rows, columns), generator=generator)
    # Beyond one the decoder's output is cut off, which hides differences.
    picture = torch.randn((batch, 3, 1 + 4 * (frames - 1), rows * pixels, columns * pixels), generator=generator)
    return vae, (0.3 * latents).to(dtype), picture.to(dtype)


@pytest.mark.parametrize("name", CASES)
def test_a_rewritten_vae_equals_stock_in_calls_and_is_stock_outside_them(name: str) -> None:
    vae, latents, picture = inputs_of(name, torch.float64)
    stock = both_ways(vae, latents, picture)
    with Ledger() as ledger:
        rewrite_vae(vae, autoencoder(CASES[name][0]), ledger)
        assert all(map(torch.equal, both_ways(vae, latents, picture), stock))
        with open_call(None, owner=None):
            ours = both_ways(vae, latents, picture)
        assert any(type(module) is not stock_class(module) for module in vae.modules())
        for mine, theirs in zip(ours, stock, strict=True):
            assert float((mine - theirs).abs().max()) <= 1e-12
        ledger.undo()
    assert all(type(module) is stock_class(module) for module in vae.modules())
    assert all(map(torch.equal, both_ways(vae, latents, picture), stock))


@pytest.mark.parametrize("name", ["an image", "four latent frames"])
def test_in_float32_the_difference_is_rounding(name: str) -> None:
    vae, latents, picture = inputs_of(name, torch.float32)
    plain = copy.deepcopy(vae)
    run = functools.partial(both_ways, plain, latents, picture)
    rewrite_vae(vae, autoencoder(CASES[name][0]), Ledger())
    with open_call(None, owner=None):
        ours = both_ways(vae, latents, picture)
    difference = max(float((mine - theirs).abs().max()) for mine, theirs in zip(ours, run(), strict=True))
    assert is_rounding(difference, floor_of(run, plain))


@pytest.mark.parametrize("name", ["an image", "four latent frames"])
def test_in_16_bits_it_is_as_near_to_the_true_result_as_stock(name: str) -> None:
    vae, latents, picture = inputs_of(name, torch.bfloat16)
    exact = both_ways(copy.deepcopy(vae).float(), latents.float(), picture.float())
    stock = both_ways(vae, latents, picture)
    rewrite_vae(vae, autoencoder(CASES[name][0]), Ledger())
    with open_call(None, owner=None):
        ours = both_ways(vae, latents, picture)
    for mine, theirs, true in zip(ours, stock, exact, strict=True):
        assert float((mine - true).norm()) <= 1.2 * float((theirs - true).norm())


def test_calls_of_another_acceleration_stay_stock_and_the_last_holder_takes_the_rewrites_off() -> None:
    vae, latents, picture = inputs_of("an image", torch.float32)
    stock = both_ways(vae, latents, picture)
    owners, ledgers = [nn.Identity(), nn.Identity()], [Ledger(), Ledger()]
    rewrite_vae(vae, autoencoder(Q), ledgers[0], owner=owners[0])
    with open_call(None, owner=owners[1]):
        assert all(map(torch.equal, both_ways(vae, latents, picture), stock))
    rewrite_vae(vae, autoencoder(Q), ledgers[1], owner=owners[1])
    ledgers[0].undo()
    with open_call(None, owner=owners[0]):
        assert all(map(torch.equal, both_ways(vae, latents, picture), stock))
    with open_call(None, owner=owners[1]):
        assert not all(map(torch.equal, both_ways(vae, latents, picture), stock))
    ledgers[1].undo()
    assert all(type(module) is stock_class(module) for module in vae.modules())


def test_only_a_video_vae_is_rewritten_and_what_it_holds_is_found_by_structure() -> None:
    assert not is_rewritable(parts.image_vae())
    assert not is_rewritable(parts.hunyuan_video_vae())
    vae = parts.qwen_vae()
    assert is_rewritable(vae)
    with Ledger() as ledger:
        rewrite_vae(vae, autoencoder(Q), ledger)
        kinds = {"CausalConv3d", "RMS_norm", "Upsample"}
        ours = [module for module in vae.modules() if type(module) is not stock_class(module)]
        wanted = [each for each in vae.modules() if any(stock_class(each).__name__.endswith(kind) for kind in kinds)]
        assert {*wanted} <= {*ours}
        ledger.undo()
    with Ledger() as ledger:  # where no family says which activation follows, the norm is rewritten alone
        rewrite_vae(vae, None, ledger)
        assert not any(isinstance(each, nn.SiLU) and type(each) is not nn.SiLU for each in vae.modules())
        ledger.undo()


def test_a_vae_that_the_user_compiles_afterwards_is_left_to_them() -> None:
    vae = parts.qwen_vae()
    rewrite_vae(vae, autoencoder(Q), Ledger())
    vae.decoder.compile(backend="eager")
    rebind(Component("vae", vae, False), None, None)  # type: ignore[arg-type]
    assert all(type(module) is stock_class(module) for module in vae.modules())


def test_a_convolution_over_one_frame_uses_weights_that_changed() -> None:
    conv = next(module for module in parts.randomised(parts.qwen_vae()).decoder.modules() if is_causal(module))
    states = torch.randn(1, conv.in_channels, 1, 5, 6)
    with torch.no_grad():
        for factor in (1.0, 3.0):
            conv.weight.mul_(factor)
            for channels_last in (False, True):
                ours = convolve_causally(conv, states, None, channels_last=channels_last)
                torch.testing.assert_close(ours, conv(states))


def compare_kernel() -> None:
    """Kernel against reference, run by `test_rewrites.py`: odd sizes, both layouts, zeros, large values, 16 bits."""
    from pipeboost.kernels.channel_norm_triton import normalise

    for shape in ((1, 96, 1, 3, 5), (2, 12, 2, 7, 9), (2, 8, 6, 1), (1, 3, 1, 1, 1)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            torch.manual_seed(shape[1])
            states, gamma = torch.randn(shape) * 30, torch.randn(shape[1])
            states[..., 0] = 0
            states, gamma = states.to(dtype), gamma.to(dtype)
            layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
            for each in (states, states.contiguous(memory_format=layout)):
                for activate in (False, True):
                    scale = shape[1] ** 0.5
                    exact = F.normalize(states.double(), dim=1) * scale * gamma.double().view(-1, *[1] * len(shape[2:]))
                    exact = F.silu(exact) if activate else exact
                    ours = normalise(each, gamma, scale, 1e-12, activate=activate)
                    assert ours.stride() == each.stride()
                    assert not ours.isnan().any()
                    rtol = 4 * torch.finfo(dtype).eps
                    torch.testing.assert_close(ours.double(), exact, rtol=rtol, atol=rtol)
                    own = channel_norm(each, gamma.view(-1, *[1] * len(shape[2:])), scale, activate=activate)
                    torch.testing.assert_close(own.double(), exact, rtol=4 * rtol, atol=4 * rtol)


def test_convolutions_over_frames_are_laid_out_in_a_captured_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_layout, "suits_our_kernels", lambda tensor: tensor is not None)
    conv, states = nn.Conv3d(3, 4, 3), torch.randn(1, 3, 4, 5, 6)
    backend = RewritingBackend("eager", ["conv_layout"])
    with torch.no_grad():
        ours = torch.compile(conv, backend=backend)(states)
        torch.testing.assert_close(ours, conv(states))
    assert backend.found == {"conv_layout": 1}


@pytest.mark.parametrize("how", ["decoder.compile", "torch.compile(decoder)", "torch.compile(decode)"])
def test_what_the_user_compiles_runs_before_the_next_call_of_the_pipeline(how: str) -> None:
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True])
    latents = torch.randn(1, 4, 1, 5, 6)
    with torch.no_grad():
        stock = vae.decode(latents).sample
    rewrite_vae(vae, autoencoder(Q), Ledger())
    assert any(type(module) is not stock_class(module) for module in vae.modules())
    if how == "decoder.compile":
        vae.decoder.compile(backend="eager")
    elif how == "torch.compile(decoder)":
        vae.decoder = torch.compile(vae.decoder, backend="eager")
    else:
        vae.decode = torch.compile(vae.decode, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(latents).sample, stock)
    assert not any(type(module) is not stock_class(module) for module in vae.modules())


def test_a_hook_between_a_norm_and_its_activation_sees_and_replaces_what_it_does_in_stock() -> None:
    vae, latents, picture = inputs_of("an image", torch.float32)
    for module in vae.modules():
        if hasattr(module, "gamma"):
            module.register_forward_hook(lambda _, args, output: output * 1.01)
        elif isinstance(module, nn.SiLU):
            module.register_forward_pre_hook(lambda _, args: (args[0] * 1.01,))
    stock = both_ways(vae, latents, picture)
    rewrite_vae(vae, autoencoder(Q), Ledger())
    with open_call(None, owner=None):
        ours = both_ways(vae, latents, picture)
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
