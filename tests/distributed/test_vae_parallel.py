"""Ranks that share the forwards of a VAE's encoder and decoder."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from pipeboost.contract.registry import families
from pipeboost.core.sharding import Autoencoder
from pipeboost.features.parallel.vae import Structure, structure_of
from tests.distributed import vae_cases
from tests.distributed.ranks import on_ranks
from tests.distributed.vae_cases import VAES, Map, Results
from tests.floors import is_rounding
from tests.parameters import exhaustive

# Higher and wider than the other, odd, and smaller than the ranks times two.
MAPS = [
    Map("decode", 7, 4),
    Map("decode", 5, 7, batch=2),
    Map("encode", 4, 7),
    Map("encode", 7, 3, batch=2, settings={"use_slicing": True}),
]
DOUBLE = Map("decode", 5, 3, batch=2, dtype=torch.float64)
TOO_SMALL = Map("decode", 1, 1)
TILES = {
    "tile_sample_min_height": 32,
    "tile_sample_min_width": 32,
    "tile_sample_stride_height": 24,
    "tile_sample_stride_width": 24,
}
ALL_TILES = {
    "flux": {"tile_sample_min_size": 32, "tile_latent_min_size": 4},
    "qwen_image": TILES,
    "hunyuan_video": {**TILES, "tile_sample_min_num_frames": 4, "tile_sample_stride_num_frames": 4},
}

# Four ranks have neighbours on both sides; what the video VAEs do about it is the same in all of them.
OFTEN = (("flux", 2), ("wan21", 2), ("hunyuan_video", 2), ("wan22", 4))  # Qwen-Image's is Wan 2.1's, of one frame
ALL_SHARED = exhaustive(*itertools.product(VAES, (2, 4)), but=OFTEN)


def _facts(name: str) -> Autoencoder:
    found = next(family for family in families() if family.name == VAES[name][0]).autoencoder
    assert found is not None
    return found


def _shared(name: str, ranks: int, maps: list[Map], *, rewritten: bool = False) -> list[Results]:
    """What ranks found; their results are those of one rank but for rounding, and the same to the bit on all ranks."""
    found = on_ranks(ranks, vae_cases.share, name, maps, rewritten)
    for index, what in enumerate(maps):
        expected, floor = vae_cases.expected(name, what)
        outputs = [result.outputs[index] for result in found]
        assert all(output.shape == expected.shape for output in outputs)
        assert all(torch.equal(output, outputs[0]) for output in outputs), "ranks differ"
        assert is_rounding((outputs[0] - expected).abs().max().item(), floor if what != TOO_SMALL else 0.0)
    return found


@pytest.mark.parametrize(("name", "ranks"), ALL_SHARED)
def test_a_shared_vae_gives_the_undivided_result_and_leaves_no_trace(name, ranks):
    found = _shared(name, ranks, [*MAPS, DOUBLE, TOO_SMALL])
    stock, _ = vae_cases.expected(name, MAPS[0])
    frames = VAES[name][2] if name.startswith("wan") else 1
    for result in found:
        forwards = [sum(counts.values()) for counts in result.counts]
        assert forwards == [frames * (2 if what.settings else 1) for what in [*MAPS, DOUBLE, TOO_SMALL]]
        assert [set(counts) for counts in result.counts] == [
            *({"decoder shared"}, {"decoder shared"}, {"encoder shared"}, {"encoder shared"}, {"decoder shared"}),
            {f"decoder whole: 1 latent rows are too few for {ranks} ranks"},
        ]
        assert not result.traces
        assert torch.equal(result.outside, stock)
        assert torch.equal(result.again, stock)


@pytest.mark.parametrize("name", ["qwen_image", *exhaustive("wan21")])
def test_ranks_share_a_rewritten_vae(name):
    for result in _shared(name, 2, MAPS, rewritten=True):
        assert [set(counts) for counts in result.counts] == [{f"{what.method}r shared"} for what in MAPS]
        assert not result.traces


@pytest.mark.parametrize("name", exhaustive(*ALL_TILES, but=("flux", "hunyuan_video")))
def test_ranks_share_each_tile_of_a_tiled_vae(name):
    settings = {"use_tiling": True, **ALL_TILES[name]}
    maps = [Map("decode", 5, 7, settings=settings), Map("encode", 7, 5, settings=settings)]
    for result in _shared(name, 2, maps):
        assert result.counts[0]["decoder shared"] > 4
        assert result.counts[1]["encoder shared"] > 4


def test_a_half_precision_vae_is_as_near_to_the_true_result_as_stock():
    what = Map("decode", 9, 6, batch=2, dtype=torch.bfloat16)
    found = on_ranks(2, vae_cases.share, "hunyuan_video", [what])
    vae = vae_cases.build("hunyuan_video")
    stock = vae_cases.result_of(vae, "hunyuan_video", what).double()
    # The same weights, rounded to bfloat16, without further rounding.
    true = vae_cases.result_of(vae, "hunyuan_video", dataclasses.replace(what, dtype=torch.float64))
    ours = found[0].outputs[0].double()
    assert found[0].outputs[0].dtype == torch.bfloat16
    assert (ours - true).square().mean() <= 1.1 * (stock - true).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rank_needs_memory_for_its_own_strip_only(dtype):
    settings = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (32,) * 4,
        "norm_num_groups": 4,
    }
    for whole, own in on_ranks(4, vae_cases.memory, settings, torch.zeros(1, 4, 16, 16, dtype=dtype)):
        assert own < 0.27 * whole


def test_a_vae_of_two_pipelines_is_shared_in_the_calls_of_those_that_hold_it():
    for found in on_ranks(2, vae_cases.share_between_two, "flux"):
        assert found == {"first": [1, 0, 0], "second": [1, 1, 0], "stranger": [0, 0, 0]}


def test_attention_that_ranks_cannot_share_is_computed_whole_with_the_reason_or_refused():
    for same, counts, said in on_ranks(2, vae_cases.share_with_other_attention, "flux"):
        assert same
        assert counts == {"decoder whole: its attention processor AttnProcessor is not known": 1}
        assert "attention in the VAE's decoder does not use torch's scaled_dot_product_attention" in said


def test_an_encoder_or_decoder_with_a_module_that_is_not_known_is_not_divided_and_the_reason_names_it():
    vae = vae_cases.build("flux")
    vae.decoder.conv_act = nn.Softmax(dim=1)
    vae.encoder.conv_out = nn.Conv2d(16, 8, 3, padding=1, padding_mode="reflect")
    assert structure_of(vae.decoder, _facts("flux")) == "Softmax is not known"
    assert structure_of(vae.encoder, _facts("flux")) == "padding 'reflect' inside a convolution"
    assert structure_of(vae_cases.build("flux").decoder, None) == "its family does not say what it is made of"
    assert structure_of(vae_cases.build("wan21").encoder, _facts("flux")) == "WanEncoder3d is not known"
    other = vae_cases.build("qwen_image")
    other.encoder.nonlinearity = nn.LayerNorm(8)
    assert structure_of(other.encoder, _facts("qwen_image")) == "LayerNorm is not known"
    assert structure_of(other.decoder, _facts("qwen_image")) == Structure(stride=1, reach=1, attention=1)
