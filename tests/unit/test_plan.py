"""A plan says what is on, which choice and why, for any hardware, and refuses what cannot be."""

from dataclasses import replace

import pytest
import torch

from pipeboost.contract.model_info import ComponentSize, ModelInfo
from pipeboost.contract.registry import family_named, generic_family
from pipeboost.core.config import AccelerationConfig, CacheConfig, CompileConfig, ParallelConfig
from pipeboost.core.errors import ConfigurationError, PipeboostError, UnsupportedError
from pipeboost.core.hardware import Hardware, detect_hardware
from pipeboost.plan import make_plan

H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", (9, 0), 80 * 2**30, 1, False, True)
CPU = Hardware("cpu", "CPU with 2 cores", None, 24 * 2**30, 1, False, True)
FACTS = ModelInfo("FluxPipeline", torch.bfloat16, 33 * 2**30)
FLUX = family_named("FluxPipeline")
UNKNOWN = generic_family("SomePipeline", {"transformer": True})


def plan(hardware=H100, family=FLUX, **settings):
    return make_plan(AccelerationConfig(**settings), hardware, family, FACTS)


def test_every_feature_is_explained():
    for quality in ("exact", "lossless", "balanced", "fast"):
        for hardware in (CPU, H100):
            made = plan(hardware, quality=quality)
            text = str(made)
            for feature in ("attention", "parallel", "quantize", "cache", "compile", "offload", "reuse"):
                assert made[feature].why
                assert f"  {feature} " in text.replace("parallel  ", "parallel ")


def test_exact_turns_off_whatever_changes_rounding():
    made = plan(quality="exact")
    assert made.features == {"graphs", "reuse"}


def test_graphs_are_for_cuda_and_for_forwards_that_leave_nothing_to_the_host():
    alone = CompileConfig(scope=None, graphs=True)
    made = plan(quality="exact", compile=alone)
    assert (made["compile"].choice, made["graphs"].choice) == ("off", "on")
    assert plan()["graphs"].settings == "auto"
    assert plan(compile=CompileConfig(graphs=False))["graphs"].choice == "off"
    for off, reason in (
        (plan(CPU), "CPU"),
        (plan(quality="fast", cache=CacheConfig()), "cache"),
        (plan(offload="layerwise"), "weights come"),
    ):
        assert off["graphs"].choice == "off"
        assert reason in off["graphs"].why
    with pytest.raises(UnsupportedError, match="on the CPU"):
        plan(CPU, compile=alone)
    with pytest.raises(UnsupportedError, match="cache decides"):
        plan(quality="fast", compile=alone, cache=CacheConfig())
    assert plan(quality="fast")["graphs"].on  # whole forwards are skipped, and a graph holds one
    with pytest.raises(ConfigurationError, match="scope=None"):
        CompileConfig(scope=None)
    with pytest.raises(ConfigurationError, match="graphs"):
        CompileConfig(graphs="always")


def test_the_default_on_a_hopper_compiles_and_never_caches():
    made = plan()
    assert made["compile"].choice == "regional"
    assert made["attention"].on
    assert not made["cache"].on


def test_fast_caches_a_known_family_and_says_why_not_for_an_unknown_one():
    assert plan(quality="fast")["cache"].settings.extrapolate == "output"
    made = plan(quality="fast", family=UNKNOWN)
    assert not made["cache"].on
    assert "no family" in made["cache"].why
    assert "missing" in str(made)


@pytest.mark.parametrize(
    "pipeline", ["FluxPipeline", "QwenImagePipeline", "WanPipeline", "HunyuanVideoPipeline", "ZImagePipeline"]
)
def test_fast_skips_fixed_steps_and_says_on_what_they_were_measured(pipeline):
    facts = replace(FACTS, pipeline=pipeline)

    def cache_of(settings):
        config = AccelerationConfig(quality="fast", cache=settings)
        return make_plan(config, H100, family_named(pipeline), facts)["cache"]

    assert cache_of("auto").settings == CacheConfig("output", "fast", taylorseer_order=1)
    for settings in ("auto", CacheConfig("output", "slow")):
        assert "placed as outputs of the demo model ask for, not measured on other models" in cache_of(settings).why
    listed = CacheConfig("output", (0, 1, 4), 6)
    assert "in fixed steps (as listed)" in cache_of(listed).why
    assert f"in fixed steps (as tuned on {pipeline})" in cache_of(replace(listed, pipeline=pipeline)).why


def test_a_guidance_gate_needs_branches_that_are_forwards_of_one_rank():
    gated = CacheConfig("output", "fast", guidance_gate=9)

    def cache_of(pipeline, settings, **changed):
        facts = replace(FACTS, pipeline=pipeline, **changed)
        return make_plan(AccelerationConfig(quality="fast", cache=settings), H100, family_named(pipeline), facts)[
            "cache"
        ]

    for pipeline in ("FluxPipeline", "QwenImagePipeline", "WanPipeline", "HunyuanVideoPipeline"):
        assert "from step 9 on, the second guidance branch is the first one" in cache_of(pipeline, gated).why
        assert "guidance branch" not in cache_of(pipeline, CacheConfig("output", "fast")).why
    for pipeline in ("ZImagePipeline", "LTX2Pipeline"):
        with pytest.raises(UnsupportedError, match=f"those of {pipeline} are one batch; use guidance_gate=None"):
            cache_of(pipeline, gated)
    second = CacheConfig("output", "fast", secondary=gated)
    assert "from step None and 9 on" not in cache_of("WanPipeline", second).why
    for settings in (gated, second):
        with pytest.raises(UnsupportedError, match="without work under cfg=2; use ParallelConfig"):
            cache_of("WanPipeline", settings, ranks=2)


def test_the_plan_says_whether_padding_of_the_text_is_cut():
    assert plan(family=family_named("HunyuanVideoPipeline"))["attention"].why.endswith("padding of the text is cut")
    assert plan()["attention"].why.endswith("padding of the text, if any, stays as in stock")


def test_branches_of_one_batch_are_not_said_to_wait_but_to_gain_nothing_without_guidance():
    for pipeline, words in (("ZImagePipeline", "nothing is gained"), ("WanPipeline", "half of them wait")):
        facts = ModelInfo(pipeline, torch.bfloat16, 1, ranks=2)
        parallel = make_plan(AccelerationConfig(), H100, family_named(pipeline), facts)["parallel"]
        assert parallel.choice == "cfg=2"
        assert words in parallel.why


def test_blocks_that_may_not_be_captured_are_compiled_only_where_asked_for_and_never_with_hooks():
    def compile_of(asked, **found):
        return make_plan(AccelerationConfig(compile=asked), H100, FLUX, replace(FACTS, **found))["compile"]

    odd = compile_of("auto", odd_blocks="weights of type AffineQuantizedTensor")
    assert (odd.choice, "AffineQuantizedTensor" in odd.why) == ("off", True)
    assert compile_of("regional", odd_blocks="weights of type AffineQuantizedTensor").on
    assert "group_offloading" in compile_of("auto", hooks="a hook of Diffusers: group_offloading").why
    with pytest.raises(UnsupportedError, match="group_offloading; use compile=None"):
        compile_of("regional", hooks="a hook of Diffusers: group_offloading")


def test_the_plan_tells_of_sizes_what_the_family_declares():
    def why(pipeline, **settings):
        family = family_named(pipeline) or UNKNOWN
        return plan(family=family, compile=CompileConfig(**settings))["compile"].why

    for pipeline in ("QwenImagePipeline", "HunyuanVideoPipeline"):
        assert "text length is dynamic, the image size is not" in why(pipeline)
    for pipeline in ("FluxPipeline", "WanPipeline"):
        assert "text length" not in why(pipeline)
        assert "another image size" in why(pipeline)
    assert "size that changes" in why("SomePipeline")
    assert why("FluxPipeline", scope="full").startswith("one graph of the whole model")
    assert why("FluxPipeline", dynamic=True).endswith("for all sizes")


def test_beside_a_controlnet_whole_forwards_are_skipped_and_a_cache_of_blocks_is_refused():
    facts = ModelInfo("FluxControlNetPipeline", torch.bfloat16, 1, controlnet=True)
    assert make_plan(AccelerationConfig(quality="fast"), H100, FLUX, facts)["cache"].choice == "outputs"
    with pytest.raises(PipeboostError, match="ControlNet adds to the states"):
        make_plan(AccelerationConfig(quality="fast", cache=CacheConfig()), H100, FLUX, facts)


def test_ranks_share_weights_that_one_device_cannot_hold_whether_or_not_it_is_here():
    transformer = ComponentSize("transformer", "transformers", "transformer", 70 * 2**30, 0, 0)
    facts = ModelInfo("FluxPipeline", torch.bfloat16, transformer.nbytes, components=(transformer,), heads=24, ranks=4)
    assert make_plan(AccelerationConfig(), H100, FLUX, facts)["parallel"].choice == "ulysses=2, tensor=2"
    encoder = ComponentSize("text_encoder", "text_encoders", None, 60 * 2**30, 0, 0)
    both = replace(facts, components=(transformer, encoder))
    assert make_plan(AccelerationConfig(), H100, FLUX, both)["parallel"].choice == "tensor=4"
    roomy = replace(facts, free=100 * 2**30)
    assert make_plan(AccelerationConfig(), H100, FLUX, roomy)["parallel"].choice == "ulysses=4"
    assert make_plan(AccelerationConfig(quality="lossless"), CPU, FLUX, facts)["parallel"].choice == "ulysses=4"


def test_on_a_cpu_compile_is_off_unless_asked_for():
    assert not plan(CPU)["compile"].on
    assert plan(CPU, compile="regional")["compile"].on


@pytest.mark.parametrize(
    ("hardware", "settings", "words"),
    [
        (CPU, {"attention": "flash3"}, "flash3.* runs on cuda only"),
        (H100, {"attention": "flash4"}, r"flash4.* needs compute capability 10.0"),
        (H100, {"attention": "sage"}, "balanced"),
        (
            H100,
            {"parallel": ParallelConfig(ulysses=2)},
            r"ParallelConfig\(ulysses=2\) is for 2 ranks, and there is 1 rank",
        ),
        (H100, {"quality": "lossless", "cache": "fast"}, "needs quality='fast'"),
        (Hardware("cpu", "bare", None, 1, 1, False, False), {"compile": "regional"}, "C\\+\\+ compiler"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(hardware, settings, words):
    with pytest.raises(PipeboostError, match=words) as caught:
        plan(hardware, **settings)
    assert "\n" not in str(caught.value)


def test_this_machine_can_be_described():
    hardware = detect_hardware("cpu")
    assert hardware.device == "cpu"
    assert hardware.memory > 2**28
    assert "GiB" in str(hardware)
