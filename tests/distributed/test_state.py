"""Ranks of one sample run it with the same weights, settings and scheduler, or refuse it in one sentence."""

import pytest

from tests.distributed import state_cases as cases
from tests.distributed.ranks import on_ranks
from tests.floors import is_rounding
from tests.pipelines.tiny import TINY

LORA = {
    "load": "rank 1's transformer differs from rank 0's: adapters a against none",
    "hotswap": "other values of transformer_blocks.0.attn.to_q.lora_A.a.weight, ",
    "scale": "scaling {'a': 0.5} against {'a': 1.0}",
    "disable": "_disable_adapters True against False",
    "enable": "_disable_adapters False against True",
    "fuse": "rank 1's transformer differs from rank 0's: lora_scale 1.0 against nothing",
    "unfuse": "merged_adapters nothing against ['a']",
    "unload": "adapters none against a",
}
WEIGHTS = {
    "set_shift": "rank 1's scheduler differs from rank 0's: _shift 5.0 against 3.0; ranks",
    "data": "rank 1's transformer differs from rank 0's: other values of proj_out.weight, ",
    "dtype": "dtype ['torch.float64'] against ['torch.float32']",
}
VAE = {
    "vae weights": "rank 1's vae differs from rank 0's: other values of decoder.conv_out.bias, ",
    "vae dtype": "rank 1's vae differs from rank 0's: dtype ['torch.float64'] against ['torch.float32']",
    "slicing": "rank 1's vae differs from rank 0's: use_slicing True against False; ranks",
    "tiling": "use_tiling True against False",
    "tile size": "rank 1's vae differs from rank 0's: tile_overlap_factor 0.5 against 0.25; ranks",
    "tiling off": "rank 1's vae differs from rank 0's: use_tiling False against True; ranks",
}
SCHEDULER = {
    "weights": "other values of x_embedder.bias, ",
    "merge": "rank 1's transformer differs from rank 0's: other values of ",
    "scheduler": "rank 1's scheduler differs from rank 0's: base_shift 2.0 against 0.5",
}


@pytest.mark.parametrize(
    ("name", "layout", "expected"),
    [
        ("flux_dev", {"ulysses": 2}, LORA),
        ("flux_true_cfg", {"cfg": 2}, WEIGHTS | SCHEDULER | {"load": LORA["load"]}),
        ("flux_dev", {"ulysses": 2}, VAE),
        ("flux_dev", {"tensor": 2}, SCHEDULER | WEIGHTS),
        (
            "wan22_t2v",
            {"cfg": 2},
            {
                "boundary": "rank 1's pipeline differs from rank 0's: boundary_ratio 0.2 against ",
                "flow shift": "rank 1's scheduler differs from rank 0's: flow_shift 7.0 against ",
                "scheduler class": "class diffusers.schedulers.scheduling_flow_match",
            },
        ),
        ("flux_ip_adapter", {"ulysses": 2}, {"ip scale": "attn.processor.scale [0.3] against [0.8]"}),
    ],
    ids=["lora", "cfg", "vae", "tensor", "wan", "ip adapter"],
)
def test_what_one_rank_changes_is_refused_in_a_sentence_on_all_and_what_all_change_is_right(name, layout, expected):
    first, second = on_ranks(2, cases.changes, name, layout, list(expected), limit=400)
    for kind, one, other in zip(expected, first, second, strict=True):
        assert one.alone == other.alone, kind
        assert expected[kind] in one.alone, kind
        differences = max(one.back, other.back, one.all, other.all)
        assert is_rounding(differences, lambda: TINY[name].floor(steps=1, output_type=cases.output_of(expected))), kind


def test_a_change_before_the_first_call_is_refused_too():
    for found in on_ranks(2, cases.changes, "flux_dev", {"ulysses": 2}, ["slicing", "data"], called_before=False):
        assert "use_slicing True against False" in found[0].alone
        assert "other values of proj_out.weight" in found[1].alone


def test_components_count_where_all_ranks_run_them():
    for opened, of_main_rank, of_all, decoder_of_main_rank in on_ranks(2, cases.other_places):
        assert "other values of proj_out.weight" in opened
        assert of_main_rank == decoder_of_main_rank == ""
        assert "rank 1's text_encoder differs from rank 0's: other values of " in of_all


def test_what_a_broken_call_has_left_in_a_scheduler_does_not_count():
    assert is_rounding(max(on_ranks(2, cases.after_a_failure)), TINY["wan21_t2v"].floor)
