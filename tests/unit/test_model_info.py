"""What one of several ranks has of a pipeline's weights, and what its stages take."""

from dataclasses import replace

import accelerate
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_group_offloading

from pipeboost import CompileConfig, accelerate_pipeline
from pipeboost.contract.model_info import ComponentSize, ModelInfo, Split
from pipeboost.contract.registry import family_named, family_of
from pipeboost.core.config import ParallelConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.seams import stock_class
from pipeboost.features.parallel.rank_share import activations_of_one_rank, of_one_rank, splits_of
from pipeboost.model_reader import model_info
from tests.pipelines.tiny import TINY

CPU = torch.device("cpu")
FLUX = family_named("FluxPipeline")
COMPONENTS = (
    ComponentSize("vae", "vae", None, 100, 0, 0),
    ComponentSize("text_encoder", "text_encoders", None, 1000, 800, 80),
    ComponentSize("transformer", "transformers", "transformer", 10_000, 8000, 800),
)
FACTS = ModelInfo("FluxPipeline", torch.bfloat16, 11_100, components=COMPONENTS)


def weights(facts):
    return [component.nbytes for component in facts.components]


def test_a_rank_has_its_part_of_what_is_split_and_all_of_the_rest():
    splits = {"text_encoder": Split(900, (2,)), "transformer": Split(9600, (2, 4))}
    facts = replace(FACTS, splits=splits)
    two = of_one_rank(facts, ParallelConfig(tensor=2))
    assert weights(two) == [100, 550, 5200]
    assert two.weights == 5850
    assert two.components[2].largest_block == 800 * 5200 // 10_000
    # The encoder cannot be split into four.
    assert weights(of_one_rank(facts, ParallelConfig(tensor=4))) == [100, 1000, 2800]
    assert weights(of_one_rank(facts, ParallelConfig(tensor=2, text_encoder=False))) == [100, 1000, 5200]
    assert weights(of_one_rank(replace(facts, splits={}), ParallelConfig(tensor=2))) == weights(facts)


def test_of_a_model_nobody_has_looked_at_a_rank_counts_an_even_part():
    assert weights(of_one_rank(FACTS, ParallelConfig(tensor=2))) == [100, 500, 5000]


@pytest.mark.parametrize("layout", [ParallelConfig(), ParallelConfig(cfg=2, ulysses=2)])
def test_weights_that_nobody_splits_are_whole_on_every_rank(layout):
    assert of_one_rank(FACTS, layout) is FACTS


def test_degrees_are_those_that_all_transformers_allow_which_are_there():
    experts = ("transformer", "transformer_2")
    second = replace(COMPONENTS[2], path="transformer_2")
    splits = {"transformer": Split(1, (2, 4)), "transformer_2": Split(1, (2, 8))}
    both = replace(FACTS, components=(*COMPONENTS, second), splits=splits)
    assert both.degrees(experts) == (2,)
    assert replace(FACTS, splits=splits).degrees(experts) == (2, 4)  # Wan 2.1 has one of Wan's two
    assert replace(both, splits={"transformer": splits["transformer"]}).degrees(experts) == ()
    assert replace(both, splits=None).degrees(experts) is None


def test_what_can_be_split_is_read_off_transformers_and_text_encoders():
    pipe = TINY["flux_dev"].build()
    modules = {name: each for name, each in pipe.components.items() if isinstance(each, torch.nn.Module)}
    found = splits_of(modules, FLUX)
    assert set(found) == {"transformer", "text_encoder", "text_encoder_2"}
    for path, split in found.items():
        whole = sum(each.numel() * each.element_size() for each in modules[path].parameters())
        assert whole / 2 < split.nbytes <= whole
        assert 2 in split.degrees
    pipe.transformer.fuse_qkv_projections()  # which tensor parallelism cannot split
    assert set(splits_of(modules, FLUX)) == {"text_encoder", "text_encoder_2"}


@pytest.mark.parametrize(
    ("layout", "tier", "denoising", "decoding"),
    [
        (ParallelConfig(ulysses=2), "lossless", 0.6, 0.6),
        (ParallelConfig(ring=2, cfg=2), "lossless", 0.6, 0.4),
        (ParallelConfig(tensor=4), "lossless", 1.0, 0.4),
        (ParallelConfig(cfg=2), "exact", 1.0, 1.0),  # in which the VAE is not shared
        (ParallelConfig(ulysses=2, vae=False), "lossless", 0.6, 1.0),
    ],
)
def test_activations_shrink_with_the_ranks_that_share_a_stage(layout, tier, denoising, decoding):
    whole = FLUX.activations
    found = activations_of_one_rank(whole, layout, tier)
    for part, of, share in (
        (found.denoising, whole.denoising, denoising),
        (found.decoding, whole.decoding, decoding),
    ):
        assert part.at(1024, 1024, 1) == pytest.approx(share * of.at(1024, 1024, 1), rel=1e-6)
    assert found.text_encoding == whole.text_encoding
    assert activations_of_one_rank(None, layout, tier) is None


HOOKS = {
    "group_offloading": lambda t: apply_group_offloading(t, CPU, CPU, offload_type="leaf_level"),
    "layerwise_casting": lambda t: t.enable_layerwise_casting(torch.bfloat16, torch.float32),
    "fbc_leader": lambda t: t.enable_cache(FirstBlockCacheConfig(threshold=0.1)),
    "hook of accelerate": lambda t: accelerate.cpu_offload(t, execution_device="cpu"),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", ["flux_dev", "qwen_image"])
def test_hooks_in_the_blocks_are_found_and_an_explicit_compile_is_refused_before_any_change(name, kind):
    pipe = TINY[name].build()
    assert model_info(pipe, family_of(pipe), CPU).hooks is None
    HOOKS[kind](pipe.transformer)
    assert kind in model_info(pipe, family_of(pipe), CPU).hooks
    with pytest.raises(UnsupportedError, match=kind):
        accelerate_pipeline(pipe, compile=CompileConfig(backend="eager"))
    assert not hasattr(pipe, "acceleration")
    assert type(pipe) is stock_class(pipe)


def test_weights_that_are_no_plain_tensors_are_found():
    class Packed(torch.nn.Parameter):
        pass

    pipe = TINY["flux_dev"].build()
    assert model_info(pipe, family_of(pipe), CPU).odd_blocks is None
    linear = pipe.transformer.transformer_blocks[0].attn.to_q
    linear.weight = Packed(linear.weight.data)
    assert model_info(pipe, family_of(pipe), CPU).odd_blocks == "weights of type Packed"
