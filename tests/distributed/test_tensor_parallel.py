"""Weights split over ranks give what the whole ones give, and come together again to the bit."""

import re

import diffusers
import pytest
import torch

from pipeboost.contract.registry import families, family_of, text_encoder_sharding
from pipeboost.core.errors import ConfigurationError, UnsupportedError
from pipeboost.core.sharding import TensorSharding
from pipeboost.features.parallel.tensor import _reload, split_of
from pipeboost.features.parallel.tensor_layout import layout_of
from tests.distributed import tensor_cases
from tests.distributed.ranks import on_ranks
from tests.floors import is_rounding
from tests.parameters import exhaustive
from tests.pipelines import tiny_parts
from tests.pipelines.tiny import TINY, tiny_names

FAMILIES = ("flux", "qwen_image", "wan", "hunyuan_video")
# One variant for each set of layers; the others are split by `make test-distributed`.
OFTEN = (
    *("flux_dev", "flux_ip_adapter", "flux_controlnet", "qwen_image", "wan21_i2v", "wan22_t2v"),
    "hunyuan_video_i2v_token_replace",
)
OFTEN_ON_FOUR = ("qwen_image", "wan21_i2v")
ON_FOUR = (*OFTEN_ON_FOUR, "flux_dev", "flux_ip_adapter", "wan22_t2v", "hunyuan_video_i2v_token_replace")
# What Wan's attention takes for text is the last 512 tokens; what comes before is the picture.
ARGUMENTS = {"wan21_i2v": {"max_sequence_length": 512}}
BATCHES = ("flux_dev", "qwen_image", "wan21_t2v", "hunyuan_video")
ENCODERS = ("t5_encoder", "umt5_encoder", "clip_text_encoder", "llama", "llava", "qwen_vl")


def _check(result):
    assert 0.5 < result["size"] < 20
    assert is_rounding(result["difference"], result["floor"])
    assert result["same_on_ranks"]
    assert result["own"] == result["predicted"] < result["whole"]
    assert result["left_in_place"]
    assert result["restored"]
    assert result["classes"]
    assert result["again"] == 0.0
    assert not result["changes"]


@pytest.mark.parametrize("name", exhaustive(*tiny_names(*FAMILIES), but=OFTEN))
def test_a_split_transformer_computes_what_the_whole_one_does_but_for_rounding_and_is_restored_to_the_bit(name):
    for ranks in on_ranks(2, tensor_cases.transformers, name, 2, **ARGUMENTS.get(name, {})):
        for result in ranks:
            _check(result)
            # What stays whole are embedders and norms, which weigh more in a model this small.
            assert result["own"] < 0.63 * result["whole"]


@pytest.mark.parametrize("name", exhaustive(*ON_FOUR, but=OFTEN_ON_FOUR))
def test_four_ranks_split_a_transformer_too(name):
    for ranks in on_ranks(4, tensor_cases.transformers, name, 4, **ARGUMENTS.get(name, {})):
        for result in ranks:
            _check(result)
            own, whole = result["shares"]
            assert own * 4 == whole


def test_two_groups_of_two_among_four_ranks_split_independently():
    for ranks in on_ranks(4, tensor_cases.transformers, "wan21_t2v", 2):
        _check(ranks[0])


@pytest.mark.parametrize("name", exhaustive(*BATCHES, but=("qwen_image", "hunyuan_video")))
def test_a_batch_of_two_prompts_of_different_length_with_masks(name):
    for ranks in on_ranks(2, tensor_cases.transformers, name, 2, batch=2):
        _check(ranks[0])


@pytest.mark.parametrize("name", exhaustive(*BATCHES, but=("flux_dev", "wan21_t2v")))
def test_in_bfloat16_the_difference_is_of_the_size_of_its_rounding(name):
    for ranks in on_ranks(2, tensor_cases.transformers, name, 2, dtype="bfloat16"):
        _check(ranks[0])


@pytest.mark.parametrize("backend", ["eager", *exhaustive("aot_eager")])
@pytest.mark.parametrize("name", ["flux_dev", "wan21_t2v"])
def test_split_blocks_compile_with_fullgraph_into_one_graph_a_class(name, backend):
    for result in on_ranks(2, tensor_cases.compiled, name, backend):
        assert is_rounding(result["difference"], result["floor"])
        assert result["repeated"] == 0.0
        assert result["graphs"] == result["classes"]
        assert result["again"] == 0.0


@pytest.mark.parametrize("builder", ENCODERS)
def test_a_split_text_encoder_gives_the_same_hidden_states_but_for_rounding(builder):
    for result in on_ranks(2, tensor_cases.text_encoder, builder, 2):
        _check(result)


@pytest.mark.parametrize("builder", ["t5_encoder", *exhaustive("umt5_encoder", "clip_text_encoder")])
def test_four_ranks_split_a_text_encoder_too(builder):
    for result in on_ranks(4, tensor_cases.text_encoder, builder, 4):
        _check(result)
        assert result["own"] < 0.31 * result["whole"]


def test_what_split_weights_cannot_do_raises_one_sentence_with_the_way_out_and_changes_nothing():
    for said in on_ranks(2, tensor_cases.refusals):
        assert set(said) == {
            *("call", "state_dict", "save", "load", "copy", "pickle", "fuse", "save pipeline"),
            *("lora", "lora of the model", "ip_adapter", "ip_adapter of the model"),
        }
        for name, sentence in said.items():
            assert "split over" in sentence, name
            assert "remove()" in sentence, name
        assert "pipe.acceleration.open()" in said["call"]
        assert "before accelerate_pipeline()" in said["lora"]


def test_a_pipeline_is_accelerated_again_while_its_weights_are_split():
    for found in on_ranks(2, tensor_cases.accelerated_again, "qwen_image"):
        *shared, removed = found["differences"]
        assert is_rounding(max(shared), TINY["qwen_image"].floor)
        assert removed == 0.0
        assert len(set(found["weights"])) == 1
        assert found["components"] == [found["components"][0]] * 3


def test_a_lora_is_refused_before_anything_is_changed_and_works_once_fused():
    for result in on_ranks(2, tensor_cases.lora, "loaded"):
        assert re.search(r"attn\.to_q of FluxTransformer2DModel has a LoRA.*pipe\.fuse_lora\(\)", result["said"])
        assert result["class"]
        assert result["again"] == 0.0
    for state in ("fused", "unloaded"):
        for result in on_ranks(2, tensor_cases.lora, state):
            _check(result)


def test_what_the_user_changed_while_weights_were_split_stays():
    for result in on_ranks(2, tensor_cases.changed_meanwhile):
        assert all(result.values()), result


def test_pipelines_that_share_a_transformer_share_the_split_and_the_last_one_joins_it():
    for result in on_ranks(2, tensor_cases.shared):
        split = result["sizes"][0]
        assert result["sizes"] == [split, split, result["whole"]]
        assert split < result["whole"]
        assert result["same"]
        assert (
            "QwenImageTransformer2DModel is shared with another accelerated pipeline that has split its weights"
            in result["said"]
        )


def test_a_pipeline_that_is_dropped_frees_its_shares():
    assert on_ranks(2, tensor_cases.dropped) == [(0, 0), (0, 0)]


def test_weights_that_cannot_be_joined_any_more_are_said_so_and_the_model_goes_on_to_raise():
    for undone, called in on_ranks(2, tensor_cases.broken_off):
        assert "cannot be joined" in undone
        assert "load the model again" in undone
        assert "split over 2 ranks" in called


def test_ranks_with_different_weights_are_told_so_on_every_rank():
    for said, untouched in on_ranks(2, tensor_cases.different_weights):
        assert "different weights of FluxTransformer2DModel (proj_out.weight)" in said
        assert untouched


def test_tied_weights_stay_tied_and_a_weight_tied_to_a_whole_layer_stays_whole():
    for result in on_ranks(2, tensor_cases.tied):
        _check(result)
        assert result["tied"]
        assert {f"blocks.{block}.attn1.to_q" for block in range(4)} - result["split"] == {"blocks.2.attn1.to_q"}


def test_a_degree_that_does_not_divide_names_those_that_do():
    pipe = TINY["flux_dev"].build()
    with pytest.raises(
        ConfigurationError, match="tensor=3 does not divide the 4 heads of FluxTransformer2DModel; use 2, 4"
    ):
        layout_of(pipe.transformer, family_of(pipe).tensor).check(3)
    assert split_of(pipe.transformer, family_of(pipe).tensor).degrees == (2, 4)
    llama = tiny_parts.llama()
    with pytest.raises(ConfigurationError, match=r"tensor=4 does not divide the 2 heads of layers\.0.*k_proj.*; use 2"):
        layout_of(llama, text_encoder_sharding(llama)).check(4)


def test_fused_quantised_offloaded_and_unknown_layers_are_refused():
    def refusal(change, match):
        pipe = TINY["flux_dev"].build()
        change(pipe)
        with pytest.raises(UnsupportedError, match=match):
            layout_of(pipe.transformer, family_of(pipe).tensor)

    def quantise(pipe):
        linear = pipe.transformer.transformer_blocks[1].ff.net[2]
        linear.weight = torch.nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)

    refusal(lambda pipe: pipe.transformer.fuse_qkv_projections(), r"unfuse_qkv_projections\(\)")
    refusal(quantise, r"transformer_blocks\.1\.ff\.net\.2 .*float8_e4m3fn.*without quantisation")
    refusal(lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"), "is offloaded")
    pipe = TINY["flux_dev"].build()
    with pytest.raises(UnsupportedError, match="none of the layers"):
        layout_of(pipe.transformer, TensorSharding(layers=()))
    assert text_encoder_sharding(pipe.vae) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_that_a_family_declares_is_split_in_one_of_its_models(family):
    found, declared = set(), set()
    for name in tiny_names(family):
        pipe = TINY[name].build()
        sharding = family_of(pipe).tensor
        for model in family_of(pipe).models(pipe).values():
            found |= {re.sub(r"\.\d+\.", ".*.", layer.path, count=1) for layer in layout_of(model, sharding).layers}
        declared |= {
            f"{layers.path}.{member}"
            for layers in sharding.layers
            for members in (layers.columns, layers.rows, layers.packed_rows, layers.gathered, layers.norms)
            for member in members
        }
    assert found == declared


def test_published_sizes_keep_a_few_hundredths_whole():
    for family in families():
        for size in family.full_sizes:
            with torch.device("meta"):
                model = getattr(diffusers, size.transformer)(**size.config)
            whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
            assert family.tensor is not None
            assert split_of(model, family.tensor).nbytes > 0.95 * whole, size.name


def test_where_weights_cannot_be_joined_the_sentence_says_how_to_load_them_again(tmp_path):
    built = TINY["flux_dev"].build().transformer
    assert _reload(built) == "load the model again"
    built.save_pretrained(tmp_path)
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
    code = _reload(loaded).removeprefix("load the model again, from where it was loaded: ")
    again = eval(code, {**vars(diffusers), "torch": torch, type(loaded).__name__: type(loaded)})
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), built.parameters(), strict=True))
