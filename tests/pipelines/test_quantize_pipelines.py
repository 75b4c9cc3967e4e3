"""Pipelines whose linears run in 8 bits: how near to stock they stay, and that weights come back whenever needed."""

import contextlib
import copy
import gc
import threading
import weakref

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxTransformer2DModel
from torch import nn
from torch.nn import functional as F

from pipeboost import CompileConfig, QuantizeConfig, accelerate_pipeline
from pipeboost.core.errors import UnsupportedError
from pipeboost.features.quantize.linear import Float8Linear
from pipeboost.kernels.float8 import to_float8
from pipeboost.quality.metrics import relative_error
from tests.pipelines.tiny import PROMPT, TINY, load_tiny_lora, lora_state_dict

ENTRY = TINY["flux_dev"]
SETTINGS = {"quality": "balanced", "quantize": "fp8"}
SHORT = {"steps": 1, "output_type": "latent"}


def accelerated(entry=ENTRY, **settings):
    return accelerate_pipeline(entry.build(), **{**SETTINGS, **settings})


def in_8_bits(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Float8Linear)]


def call(pipe):
    return ENTRY.call(pipe, **SHORT)


def counts(pipe):
    return pipe.acceleration.report().quantised["transformer"]


@contextlib.contextmanager
def emulated(model: nn.Module, names: list[str]):
    """Inside, linears multiply what 8 bits leave of their operands, in float32 and by plain torch."""

    def rounded(rows):
        quantised, scale = to_float8(rows)
        return quantised.float() * scale

    def multiply(linear, args, _):
        features = args[0]
        return F.linear(features if features.ndim < 3 else rounded(features), rounded(linear.weight), linear.bias)

    hooks = [model.get_submodule(name).register_forward_hook(multiply) for name in names]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    "name", ["flux_dev", "qwen_image", "wan22_t2v", "hunyuan_video", "hunyuan_video_15", "z_image", "ltx2"]
)
def test_a_forward_is_stocks_with_linears_in_8_bits_and_nothing_else_and_stock_comes_back(name):
    entry = TINY[name]
    pipe = entry.build()
    inputs = entry.forward_inputs(pipe)

    def forward():
        output = pipe.transformer(**copy.deepcopy(inputs))[0]
        return output if isinstance(output, torch.Tensor) else torch.cat([each.flatten() for each in output])

    with torch.no_grad():
        stock, weights = forward(), copy.deepcopy(pipe.transformer.state_dict())
        accelerate_pipeline(pipe, **SETTINGS)
        names, dtype = in_8_bits(pipe.transformer), pipe.transformer.dtype
        with pipe.acceleration.open():
            ours = forward()
        assert torch.equal(forward(), stock)
        pipe.acceleration.remove()
        with emulated(pipe.transformer, names):
            right = forward()
    assert dtype == torch.float32
    assert len(names) > 20
    assert all(name.split(".")[1].isdigit() for name in names)  # in a list of blocks
    # A product on the edge between two values of 8 bits falls on either side, by rounding.
    assert relative_error(ours, right) < 0.25 * relative_error(right, stock)
    assert 0 < relative_error(ours, stock) < 0.1
    assert torch.equal(forward_without_grad(forward), stock)
    assert all(torch.equal(each, weights[key]) for key, each in pipe.transformer.state_dict().items())


def forward_without_grad(forward):
    with torch.no_grad():
        return forward()


def test_the_original_linears_are_back_after_remove_hooks_and_all():
    pipe = ENTRY.build()
    before = dict(pipe.transformer.named_modules())
    parameters = dict(pipe.transformer.named_parameters())
    accelerate_pipeline(pipe, **SETTINGS)
    seen = []
    linear = pipe.transformer.transformer_blocks[0].attn.to_q
    assert isinstance(linear, Float8Linear)
    handle = linear.register_forward_hook(lambda *_: seen.append(1))
    call(pipe)
    pipe.acceleration.remove()
    assert all(module is before[name] for name, module in pipe.transformer.named_modules())
    assert all(each is parameters[name] for name, each in pipe.transformer.named_parameters())
    ours = len(seen)
    assert torch.equal(call(pipe), ENTRY.stock(**SHORT))
    assert len(seen) == 2 * ours > 0
    handle.remove()
    call(pipe)
    assert len(seen) == 2 * ours


def test_paused_calls_are_stock_to_the_bit_and_the_next_call_is_in_8_bits_again():
    pipe = accelerated()
    ours = call(pipe)
    with pipe.acceleration.paused():
        assert torch.equal(call(pipe), ENTRY.stock(**SHORT))
        assert not in_8_bits(pipe.transformer)
    assert torch.equal(call(pipe), ours)
    assert in_8_bits(pipe.transformer)
    assert (counts(pipe)["quantised"], counts(pipe)["restored"]) == (2, 1)
    assert "8 bits: transformer: 66 linears" in str(pipe.acceleration.report())
    result = pipe.acceleration.verify(**ENTRY.call_kwargs(**SHORT))
    assert 0 < result.forward_errors["transformer"] < 0.1


def test_a_deep_copy_is_stock_and_a_view_is_accelerated():
    pipe = accelerated()
    ours = call(pipe)
    twin, view = copy.deepcopy(pipe), copy.copy(pipe)
    assert not in_8_bits(twin.transformer)
    assert torch.equal(call(twin), ENTRY.stock(**SHORT))
    assert torch.equal(call(view), ours)


def test_what_is_saved_is_what_was_loaded(tmp_path):
    pipe = accelerated()
    weights = copy.deepcopy(ENTRY.build().transformer.state_dict())
    call(pipe)
    pipe.transformer.save_pretrained(tmp_path)
    saved = FluxTransformer2DModel.from_pretrained(tmp_path).state_dict()
    assert saved.keys() == weights.keys()
    assert all(torch.equal(each, weights[key]) for key, each in saved.items())
    assert not in_8_bits(pipe.transformer)


def test_weights_that_are_loaded_run_in_8_bits_and_stay_after_remove():
    pipe, other = accelerated(), ENTRY.build()
    call(pipe)
    changed = {name: each * 1.1 for name, each in other.transformer.state_dict().items()}
    pipe.transformer.load_state_dict(changed)
    other.transformer.load_state_dict(changed)
    ours = call(pipe)
    assert in_8_bits(pipe.transformer)
    accelerate_pipeline(other, **SETTINGS)
    assert torch.equal(ours, call(other))
    pipe.acceleration.remove()
    assert all(torch.equal(each, changed[name]) for name, each in pipe.transformer.state_dict().items())


def test_adapters_come_and_go_between_calls_as_they_do_in_stock():
    pipe, stock = accelerated(), ENTRY.build()
    plain = call(pipe)
    adapters = lora_state_dict(stock.transformer, rank=4)
    steps = {
        "load": lambda each: each.load_lora_weights(dict(adapters), adapter_name="tiny"),
        "scale": lambda each: each.set_adapters("tiny", 0.5),
        "turn off": lambda each: each.disable_lora(),
        "turn on": lambda each: each.enable_lora(),
        "fuse": lambda each: each.fuse_lora(),
        "turn off what is fused": lambda each: each.disable_lora(),
        "turn on again": lambda each: each.enable_lora(),
        "unfuse": lambda each: each.unfuse_lora(),
        "fuse again": lambda each: each.fuse_lora(),
        "unload": lambda each: each.unload_lora_weights(),
    }
    for name, step in steps.items():
        step(stock)
        step(pipe)
        right, ours = call(stock), call(pipe)
        assert 0 < relative_error(ours, right) < 0.15, name
        paths = in_8_bits(pipe.transformer)
        assert "transformer_blocks.0.attn.to_q" in {path.removesuffix(".base_layer") for path in paths} or "off" in name
        assert not [path for path in paths if "lora" in path]
        with pipe.acceleration.paused():
            assert relative_error(call(pipe), right) < 1e-5, name
    assert relative_error(ours, plain) > 0.2  # the adapter was fused into the weights
    pipe.acceleration.remove()
    assert torch.equal(call(pipe), call(stock))


def test_an_adapter_of_before_keeps_its_side_path_and_its_base_is_in_8_bits():
    pipe, stock = ENTRY.build(), ENTRY.build()
    load_tiny_lora(pipe)
    load_tiny_lora(stock)
    accelerate_pipeline(pipe, **SETTINGS)
    assert 0 < relative_error(call(pipe), call(stock)) < 0.15
    assert "transformer_blocks.0.attn.to_q.base_layer" in in_8_bits(pipe.transformer)
    pipe.acceleration.remove()
    assert torch.equal(call(pipe), call(stock))


def test_two_accelerations_share_a_transformer_and_a_stricter_one_beside_them_is_stock():
    first, strict, last = accelerated(), ENTRY.build(), ENTRY.build()
    strict.register_modules(transformer=first.transformer)
    last.register_modules(transformer=first.transformer)
    ours = call(first)
    accelerate_pipeline(strict, quality="exact")
    accelerate_pipeline(last, **SETTINGS)
    assert torch.equal(call(strict), ENTRY.stock(**SHORT))
    assert torch.equal(call(first), ours)
    first.acceleration.remove()
    assert torch.equal(call(last), ours)
    assert torch.equal(call(first), ENTRY.stock(**SHORT))
    other = ENTRY.build()
    other.register_modules(transformer=first.transformer)
    with pytest.raises(UnsupportedError, match="shared with another accelerated pipeline"):
        accelerate_pipeline(other, **{**SETTINGS, "quantize": QuantizeConfig(reversible=False)})
    last.acceleration.remove()
    assert not in_8_bits(first.transformer)


def test_a_pipeline_made_of_an_accelerated_one_runs_stock_and_its_adapters_load():
    pipe = accelerated()
    call(pipe)
    other = FluxImg2ImgPipeline.from_pipe(pipe)
    load_tiny_lora(other)
    assert not in_8_bits(pipe.transformer)
    call(pipe)
    assert "transformer_blocks.0.attn.to_q.base_layer" in in_8_bits(pipe.transformer)


def test_what_the_user_put_in_a_linears_place_runs_in_8_bits_too_and_stays():
    pipe, stock = accelerated(), ENTRY.build()
    call(pipe)
    theirs = nn.Linear(64, 64)
    for each in (pipe, stock):
        each.transformer.transformer_blocks[0].attn.to_q = theirs
    assert 0 < relative_error(call(pipe), call(stock)) < 0.1
    assert "transformer_blocks.0.attn.to_q" in in_8_bits(pipe.transformer)
    pipe.acceleration.remove()
    assert pipe.transformer.transformer_blocks[0].attn.to_q is theirs
    assert torch.equal(call(pipe), call(stock))


def test_linears_that_diffusers_offloads_keep_their_precision():
    pipe = accelerated()
    call(pipe)
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(call(pipe), ENTRY.stock(**SHORT))
    assert counts(pipe)["left"] == {"that were changed by a hook": 66}


def test_a_conversion_reaches_the_weights_as_they_were():
    pipe = accelerated()
    call(pipe)
    pipe.transformer.to(torch.float64)
    pipe.transformer.to(torch.float32)
    assert not in_8_bits(pipe.transformer)
    call(pipe)
    pipe.to("cpu")
    assert in_8_bits(pipe.transformer)
    pipe.acceleration.remove()
    assert torch.equal(call(pipe), ENTRY.stock(**SHORT))


@pytest.mark.parametrize("offload", ["stage", "layerwise"])
def test_weights_in_8_bits_wait_on_the_host_and_come_back_whole(offload):
    pipe = accelerated(offload=offload)
    assert torch.equal(call(pipe), call(accelerated()))
    with pipe.acceleration.paused():
        assert torch.equal(call(pipe), ENTRY.stock(**SHORT))
    load_tiny_lora(pipe)
    call(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(call(pipe), call(accelerated()))
    pipe.acceleration.remove()
    assert torch.equal(call(pipe), ENTRY.stock(**SHORT))


def test_blocks_in_8_bits_are_compiled_once_a_kind():
    pipe = accelerated(compile=CompileConfig(backend=lambda graph, _: graph.forward))  # shares no other test's graphs
    compiled = call(pipe)
    with pipe.acceleration.paused():
        call(pipe)
    assert torch.equal(call(pipe), compiled)
    counters = pipe.acceleration.report().compiled["transformer"]
    assert counters["eager"] == {}
    assert counters["graphs"] == len(pipe.acceleration.plan.family.blocks)
    assert relative_error(compiled, call(accelerated())) < 0.05


def test_weights_that_were_not_kept_are_missed_in_one_sentence():
    stock = ENTRY.build()
    original = weakref.ref(stock.transformer.transformer_blocks[0].attn.to_q)
    adapter = lora_state_dict(stock.transformer, rank=4)
    pipe = accelerate_pipeline(stock, **{**SETTINGS, "quantize": QuantizeConfig(reversible=False)})
    assert original() is None
    ours = call(pipe)
    assert torch.equal(ours, call(accelerated()))
    for act in (pipe.transformer.state_dict, lambda: pipe.load_lora_weights(adapter), lambda: pipe.transformer.half()):
        with pytest.raises(UnsupportedError, match="reversible=False") as caught:
            act()
        assert "\n" not in str(caught.value)
    with pipe.acceleration.paused(), pytest.raises(UnsupportedError, match="a call outside of the acceleration"):
        call(pipe)
    assert torch.equal(call(pipe), ours)
    with pytest.warns(UserWarning, match="stay as 8 bits have them"):
        pipe.acceleration.remove()
    assert not in_8_bits(pipe.transformer)
    assert 0 < relative_error(call(pipe), ENTRY.stock(**SHORT)) < 0.1


def test_a_pipeline_that_is_accelerated_anew_has_the_same_plan():
    pipe = accelerated()
    before = str(pipe.acceleration.plan)
    accelerate_pipeline(pipe, **SETTINGS)
    assert str(pipe.acceleration.plan) == before
    accelerate_pipeline(pipe, quality="lossless")
    assert not in_8_bits(pipe.transformer)
    assert torch.equal(call(pipe), ENTRY.stock(**SHORT))


def test_a_dropped_pipeline_frees_its_weights_in_8_bits():
    pipe = accelerated()
    call(pipe)
    weight = weakref.ref(pipe.transformer.transformer_blocks[0].attn.to_q.weight)
    del pipe
    gc.collect()
    assert weight() is None


def test_stock_and_accelerated_calls_of_two_threads_are_both_right():
    pipe, plain = accelerated(), ENTRY.build()
    with torch.no_grad():  # here, for a tokenizer has padding as its state, and no two threads can use it
        embeds, pooled, _ = plain.encode_prompt(PROMPT, None)
    given = {**SHORT, "prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    expected, ours, results = ENTRY.call(plain, **given), ENTRY.call(pipe, **given), {"ours": [], "stock": []}

    def stock() -> None:
        view = copy.copy(pipe)
        view.scheduler = copy.deepcopy(pipe.scheduler)
        with pipe.acceleration.paused():
            results["stock"].append(ENTRY.call(view, **given))

    def accelerated_call() -> None:
        results["ours"].append(ENTRY.call(pipe, **given))

    threads = [threading.Thread(target=target) for target in (stock, accelerated_call) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [torch.equal(each, ours) for each in results["ours"]] == [True] * 2
    assert [torch.equal(each, expected) for each in results["stock"]] == [True] * 2


def test_an_adapter_that_ran_fused_in_8_bits_is_taken_out_of_the_weights_as_they_were():
    pipe, stock = accelerated(), ENTRY.build()
    adapter = lora_state_dict(stock.transformer, rank=4)
    for each in (pipe, stock):
        each.load_lora_weights(dict(adapter))
        each.fuse_lora()
        call(each)
        each.unfuse_lora()
    assert 0 < relative_error(call(pipe), call(stock)) < 0.15
    pipe.acceleration.remove()
    assert torch.equal(call(pipe), call(stock))


def test_every_way_to_convert_or_freeze_weights_reaches_those_as_they_were():
    pipe = accelerated()
    call(pipe)
    pipe.transformer.type(torch.float64).type(torch.float32)
    call(pipe)
    pipe.transformer.requires_grad_(False)
    call(pipe)
    pipe.acceleration.remove()
    assert not any(each.requires_grad for each in pipe.transformer.parameters())
    assert torch.equal(call(pipe), ENTRY.stock(**SHORT))


def test_a_linear_that_two_modules_share_keeps_its_precision():
    pipe = ENTRY.build()
    first, second = pipe.transformer.transformer_blocks[:2]
    first.ff.net[2] = second.ff.net[2]
    accelerate_pipeline(pipe, **SETTINGS)
    call(pipe)
    assert type(first.ff.net[2]) is nn.Linear
    assert first.ff.net[2] is second.ff.net[2]
    assert counts(pipe)["left"] == {"that share their weight": 1}


def test_weights_that_were_not_kept_get_8_bits_again_when_accelerated_anew():
    settings = {**SETTINGS, "quantize": QuantizeConfig(reversible=False)}
    pipe = accelerate_pipeline(ENTRY.build(), **settings)
    before, linears = str(pipe.acceleration.plan), in_8_bits(pipe.transformer)
    with pytest.warns(UserWarning, match="stay as 8 bits have them"):
        accelerate_pipeline(pipe, **settings)
    assert str(pipe.acceleration.plan) == before
    assert in_8_bits(pipe.transformer) == linears
