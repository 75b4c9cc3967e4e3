"""Pipelines shared by several ranks: the same latents as on one, whatever the layout, and stock again afterwards."""

import itertools
import os
import shutil

import pytest

from tests.distributed import layout_cases
from tests.distributed.layout_cases import is_as_near
from tests.distributed.layouts import FAMILIES, LAYOUTS, ranks_of
from tests.distributed.ranks import on_ranks
from tests.floors import is_rounding, once
from tests.parameters import exhaustive
from tests.pipelines.tiny import FRAMES, TINY

SEVERAL = ("ulysses 2", "ring 2", "cfg 2 × ulysses 2", "ulysses 2 × ring 2")
VARIANTS = tuple(name for name in TINY if TINY[name].family in ("flux", "qwen_image", "wan", "hunyuan_video"))
# With whom a layout is tried often; with all by `make test-distributed`. In the layouts that are not here are variants,
# batches and odd sizes.
ONCE = {
    "cfg 2": ["flux_true_cfg"],
    "ulysses 2": ["flux_true_cfg", "hunyuan_video_true_cfg"],
    "ring 2": ["qwen_image", "wan22_t2v"],
    "tensor 2": ["qwen_image", "hunyuan_video_true_cfg"],
    "tensor 4": ["flux_true_cfg"],
    "cfg 2 × ulysses 2": ["flux_true_cfg"],
    "ulysses 2 × tensor 2": ["qwen_image"],
    "cfg 2 × tensor 2": ["wan22_t2v"],
    "ring 2 × tensor 2": ["hunyuan_video_true_cfg"],
}
ODD = {"ulysses 4": ["flux_true_cfg"], "ring 4": ["wan22_t2v"]}
BATCHED = {"ring 2": ["hunyuan_video_true_cfg"], "cfg 2 × ulysses 2": ["qwen_image"]}
CACHED = {"cfg 2 × ulysses 2": ["qwen_image"]}
INDUCTOR = [  # a minute of a C++ compiler each
    pytest.mark.exhaustive,
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"),
]


@once
def check(name, layout, *, several=False, **overrides):
    degrees, overrides = LAYOUTS[layout], {**overrides, "several": several}
    expected = layout_cases.reference(name, **overrides)
    results = on_ranks(ranks_of(degrees), layout_cases.differences, name, degrees, expected, **overrides)
    call = {key: value for key, value in overrides.items() if key not in ("quality", "cache", "several")}
    for found in results:
        assert is_as_near(found["shared"], degrees, name, **call)
        assert found["left"] == []
        if several:
            # Of another prompt, whose rounding was not measured.
            assert is_as_near(found["other"] / 2, degrees, name, **call)
            assert found["again"] == found["removed"] == 0.0
    return results


def is_near_stock(difference, name, **call):
    return is_rounding(difference, lambda: TINY[name].floor(output_type="latent", **call))


def each_in_each(names, layouts, often):
    """Try every name in every layout, with the names that `often` gives for a layout in every run of the tests."""
    usual = [(name, layout) for layout, some in often.items() for name in some]
    return pytest.mark.parametrize(("name", "layout"), exhaustive(*itertools.product(names, layouts), but=usual))


@each_in_each(FAMILIES, LAYOUTS, ONCE)
def test_a_layout_gives_the_latents_of_one_rank(name, layout):
    entry, degrees = TINY[name], LAYOUTS[layout]
    several = ranks_of(degrees) == 2
    results, alone = check(name, layout, several=several), layout_cases.reference(name, several=several)
    shards = degrees.get("ulysses", 1) * degrees.get("ring", 1)
    assert [found["tokens"] for found in results] == [alone.tokens // shards] * len(results)
    branches = entry.branches // degrees.get("cfg", 1)
    assert {found["forwards"] for found in results} == {entry.steps * branches}
    assert {found["carrier"] for found in results} == {"gloo" if "ulysses" in degrees else ""}


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_in_every_layout(name, layout):
    check(name, layout, several=True)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("flux_controlnet", "ulysses 2 × ring 2"),
        ("flux_ip_adapter", "ring 2"),
        ("flux_kontext", "ulysses 2"),
        ("qwen_image_edit_plus", "ring 2"),
        ("wan21_i2v", "cfg 2 × ring 2"),
        ("wan22_ti2v_image", "ulysses 2"),
        ("hunyuan_video_i2v_token_replace", "ulysses 2"),
    ],
)
def test_variants_with_more_than_a_prompt(name, layout):
    check(name, layout)


@pytest.mark.parametrize("name", FAMILIES)
def test_cfg_parallel_is_exact_in_the_exact_tier(name):
    check(name, "cfg 2", quality="exact")


@pytest.mark.parametrize("name", ["qwen_image_no_cfg", "flux_dev"])
def test_cfg_parallel_is_right_without_guidance(name):
    check(name, "cfg 2", quality="exact")


@each_in_each(FAMILIES, ["ulysses 4", "ring 4"], ODD)
def test_tokens_that_do_not_divide(name, layout):
    frames = {"num_frames": FRAMES} if TINY[name].family in ("wan", "hunyuan_video") else {}
    results = check(name, layout, height=80, width=48, **frames)
    assert len({found["tokens"] for found in results}) == 2


@pytest.mark.parametrize("layout", ["ulysses 4", "ring 4"])
def test_fewer_text_tokens_than_ranks(layout):
    check("qwen_image", layout, prompt="a", negative_prompt="b")


@pytest.mark.parametrize("layout", [*exhaustive("ulysses 4", "ring 4"), "ulysses 2 × ring 2"])
def test_two_real_text_tokens_of_eight(layout):
    call = layout_cases.two_of_eight_text_tokens()
    expected = layout_cases.reference("hunyuan_video", **call)
    for found in on_ranks(4, layout_cases.differences, "hunyuan_video", LAYOUTS[layout], expected, **call):
        assert is_near_stock(found["shared"], "hunyuan_video", **call)


@each_in_each(["qwen_image", "hunyuan_video_true_cfg"], SEVERAL, BATCHED)
def test_a_batch_of_prompts_of_unequal_length(name, layout):
    check(name, layout, **layout_cases.BATCH)


@pytest.mark.parametrize("layout", ["ulysses 2", *exhaustive("ring 2")])
def test_two_pipelines_with_two_layouts_and_a_view(layout):
    for found in on_ranks(2, layout_cases.views_and_batches, LAYOUTS[layout]):
        assert is_near_stock(found["batch"], "qwen_image", **layout_cases.BATCH)
        assert is_near_stock(found["second"], "wan21_t2v")
        assert found["view"] == 0.0
        assert found["second after the first was removed"] == 0.0


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=INDUCTOR)])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen_image", "ulysses 2"),
        ("qwen_image", "ring 2"),
        # Compiled in `test_tensor_parallel` and with Ulysses too, but not with these arguments.
        *exhaustive(("wan21_t2v", "tensor 2"), ("hunyuan_video", "ulysses 2")),
    ],
)
def test_compiled_blocks_run_in_a_layout_and_new_prompts_compile_nothing(name, layout, backend):
    for found in on_ranks(2, layout_cases.compiled, name, LAYOUTS[layout], backend, limit=240.0):
        assert is_near_stock(found["shared"], name)
        # A rank whose prompt leaves it one token of text has a graph for that.
        assert found["graphs"] <= 3
        assert found["more"] == 0


@each_in_each(["qwen_image", "wan22_t2v"], ["cfg 2 × ulysses 2", "ulysses 2 × ring 2"], CACHED)
def test_ranks_that_share_tokens_skip_the_same_steps(name, layout):
    from pipeboost import CacheConfig

    cache = CacheConfig(fn=1, warmup=2, threshold=0.95, max_continuous=2)
    results = check(name, layout, quality="fast", cache=cache, steps=8)
    for found in results:
        assert sum(counts["skipped"] for counts in found["cache"].values()) > 0
    assert results[0]["cache"] == results[1]["cache"]


def test_replicas_work_on_prompts_of_their_own():
    for found in on_ranks(4, layout_cases.replicas):
        assert is_near_stock(found, "qwen_image")


@pytest.mark.parametrize(
    ("name", "layout", "settings", "sentence"),
    [
        ("flux_dev", {"ulysses": 3}, {}, "ParallelConfig(ulysses=3) is for 3 ranks, and there are 2 ranks; use"),
        ("flux_dev", {"ulysses": 2}, {"quality": "exact"}, "changes rounding, which quality='exact' does not allow"),
        ("flux_dev", {"ring": 2}, {"attention": None}, "not attention=None"),
        ("sd3", {"ulysses": 2}, {}, "is not known to be possible for SD3Transformer2DModel"),
        ("flux_dev", {"ulysses": 2}, {"compile": "full"}, "compile='full' does not have; use 'regional'"),
        ("wan21_t2v", {"tensor": 2}, {"offload": "stage"}, "would move; use offload=None"),
        ("flux_dev", {"ulysses": 2, "text_encoder": True}, {}, "is for tensor ranks"),
        ("flux_dev", {"cfg": 2, "vae": True}, {"quality": "exact"}, "parallel.vae=True changes rounding"),
    ],
)
def test_what_cannot_be_shared_is_refused_in_a_sentence(name, layout, settings, sentence):
    for told in on_ranks(2, layout_cases.refused, name, layout, **settings):
        assert sentence in told
        assert told.count("\n") == 0


@pytest.mark.parametrize(
    ("name", "ranks", "settings", "choice"),
    [
        ("wan21_t2v", 2, {}, "cfg=2"),
        ("wan21_t2v", 4, {}, "cfg=2, ulysses=2"),
        ("flux_dev", 4, {}, "ulysses=4"),
        ("qwen_image", 2, {"quality": "exact"}, "cfg=2"),
        ("sd3", 2, {}, "off"),
        ("flux_dev", 2, {"parallel": None}, "off"),
    ],
)
def test_auto_chooses_guidance_then_heads(name, ranks, settings, choice):
    plans = on_ranks(ranks, layout_cases.planned, name, **settings)
    assert {plan.split(":")[0] for plan in plans} == {choice}


@pytest.mark.parametrize("layout", ["ulysses 2", "ring 2"])
def test_a_forward_may_run_its_blocks_twice(layout):
    for difference in on_ranks(2, layout_cases.run_twice_inside, LAYOUTS[layout]):
        assert is_near_stock(difference, "flux_dev")


def test_one_rank_shows_the_progress_and_all_report_who_decoded():
    first, second = on_ranks(2, layout_cases.told, LAYOUTS["ulysses 2"])
    assert (first["bar"], second["bar"]) == (True, False)
    assert first["vae"] == second["vae"] == {"decoder shared": 1}
    assert not first["left"]
    assert not second["left"]


def test_ranks_that_drift_apart_are_found_out_after_the_first_step():
    for told in on_ranks(2, layout_cases.drifting):
        assert "the latents of rank 1 are not those of rank 0" in told


@pytest.mark.parametrize("layout", ["cfg 2", "ulysses 2"])
def test_linears_in_8_bits_on_ranks_are_those_of_one(layout):
    settings = {"quality": "balanced", "quantize": "fp8", "several": True}
    expected = layout_cases.reference("flux_true_cfg", **settings)
    # Rounding sends what lies on the edge between two values of 8 bits to either, and so what follows.
    bound = 0.0 if layout == "cfg 2" else 1.5 * float((expected.alone - expected.stock).abs().max())
    for found in on_ranks(2, layout_cases.differences, "flux_true_cfg", LAYOUTS[layout], expected, **settings):
        assert found["shared"] <= bound
        assert found["removed"] == 0.0
        assert found["left"] == []
