"""Swapped attention processors: same numbers, same objects, same classes afterwards."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from torch._dynamo.utils import counters

from pipeboost import accelerate_pipeline
from pipeboost.contract.call import open_call, tracing_our_call
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import add_middleware, remove_middleware, stock_class
from pipeboost.features.attention.swap import (
    dispatcher_of,
    rebind_attention,
    refuse_stock_processors,
    swap_attention,
    swappable_processors,
)
from tests.floors import floor_of, is_rounding, python_calls
from tests.pipelines.tiny import TINY, ip_adapter_inputs, load_tiny_ip_adapter

FAMILIES = ("flux_dev", "qwen_image", "wan21_t2v", "wan21_i2v", "hunyuan_video", "hunyuan_video_i2v")


def a_call():
    return open_call(None, owner=None)


def processors(model):
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


def classes(model):
    return [type(processor) for processor in processors(model)]


@pytest.fixture(scope="module")
def flux():
    entry = TINY["flux_dev"]
    pipe = entry.build()
    return pipe.transformer, entry.forward_inputs(pipe)


@pytest.fixture
def flux_model(flux):
    return copy.deepcopy(flux[0])


def forward(model, inputs):
    with torch.no_grad():
        return model(**copy.deepcopy(inputs))[0]


@pytest.fixture
def attended(monkeypatch):
    """How often our dispatcher attended, by model."""
    count = []

    def watch(model):
        dispatcher = dispatcher_of(model)

        def layer(call_next, owner, *args, **kwargs):
            count.append(owner)
            return call_next(*args, **kwargs)

        add_middleware(dispatcher, "attend", layer, place="component.stages")
        undo.append((dispatcher, layer))
        return count

    undo = []
    yield watch
    for dispatcher, layer in undo:
        remove_middleware(dispatcher, "attend", layer)


@pytest.mark.parametrize("name", FAMILIES)
def test_sdpa_equals_stock_bit_for_bit_and_leaves_stock_classes_behind(name, attended):
    entry = TINY[name]
    pipe = entry.build()
    model, inputs = pipe.transformer, entry.forward_inputs(pipe)
    before, stock = processors(model), classes(model)
    expected = forward(model, inputs)
    ledger = Ledger()
    report = swap_attention(model, "sdpa", ledger)
    count = attended(model)
    outside = forward(model, inputs)
    assert not count
    with a_call():
        inside = forward(model, inputs)
    assert len(count) >= report.swapped == sum(cls is not old for cls, old in zip(classes(model), stock, strict=True))
    assert torch.equal(outside, expected)
    assert torch.equal(inside, expected)
    assert all(one is other for one, other in zip(processors(model), before, strict=True))
    ledger.undo()
    assert list(map(id, classes(model))) == list(map(id, stock))
    with a_call():
        assert torch.equal(forward(model, inputs), expected)


def test_processors_that_call_their_kernel_themselves_are_reported():
    model = TINY["hunyuan_video"].build().transformer
    report = swap_attention(model, "auto", Ledger())
    assert report.left == (("AttnProcessor2_0", "it calls its attention kernel itself"),)
    assert report.swapped == 7


def test_flex_equals_stock_up_to_rounding_on_masked_attention():
    entry = TINY["hunyuan_video"]
    pipe = entry.build()
    inputs = entry.forward_inputs(pipe)
    expected = forward(pipe.transformer, inputs)
    floor = floor_of(lambda: forward(pipe.transformer, inputs), pipe.transformer)
    swap_attention(pipe.transformer, "flex", Ledger())
    with a_call():
        assert is_rounding(float((forward(pipe.transformer, inputs) - expected).abs().max()), floor)


def test_a_swapped_model_passes_for_stock(flux_model):
    (stock,) = set(classes(flux_model))
    swap_attention(flux_model, "auto", Ledger())
    ours = type(processors(flux_model)[0])
    assert ours is not stock
    assert (ours.__name__, ours.__qualname__, ours.__module__) == (
        stock.__name__,
        stock.__qualname__,
        stock.__module__,
    )
    assert isinstance(processors(flux_model)[0], FluxAttnProcessor)


def test_one_subclass_serves_all_blocks_and_models_with_equal_choices(flux_model, flux):
    other, third = copy.deepcopy(flux[0]), copy.deepcopy(flux[0])
    swap_attention(flux_model, "auto", Ledger())
    swap_attention(other, "auto", Ledger())
    swap_attention(third, "flex", Ledger())
    ours, same, another = ({id(cls) for cls in classes(model)} for model in (flux_model, other, third))
    assert len(ours) == 1
    assert ours == same
    assert ours != another


def test_compiling_many_blocks_takes_as_many_graphs_as_stock():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=12, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 6, 16),
        "encoder_hidden_states": torch.randn(1, 4, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(4, 3),
    }
    graphs, results = [], [forward(model, inputs)]
    for swapped in (False, True):
        twin = copy.deepcopy(model)
        if swapped:
            swap_attention(twin, "auto", Ledger())
        torch._dynamo.reset()
        counters.clear()
        for block in twin.single_transformer_blocks:
            block.compile(backend="eager", fullgraph=True)
        with a_call():
            results.append(forward(twin, inputs))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] <= 2
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["qwen_image", "hunyuan_video"])
def test_blocks_compile_as_one_graph_and_a_layer_on_attend_is_traced(name):
    entry = TINY[name]
    pipe = entry.build()
    model, inputs = pipe.transformer, entry.forward_inputs(pipe)
    expected, floor = forward(model, inputs), floor_of(lambda: forward(model, inputs), model)
    swap_attention(model, "auto", Ledger())
    torch._dynamo.reset()
    for block in model.transformer_blocks:
        block.compile(backend="eager", fullgraph=True)

    def doubled(call_next, owner, q, k, v, mask=None, **kwargs):
        return 2 * call_next(q, k, v, mask, **kwargs)

    with a_call(), tracing_our_call():
        plain = forward(model, inputs)
        add_middleware(dispatcher_of(model), "attend", doubled, place="component.stages")
        try:
            layered = forward(model, inputs)
        finally:
            remove_middleware(dispatcher_of(model), "attend", doubled)
        again = forward(model, inputs)
    assert is_rounding(float((plain - expected).abs().max()), floor)
    assert (layered - expected).abs().max() > 1e-2
    assert torch.equal(again, plain)


def test_a_text_length_that_varies_needs_one_graph_only():
    entry = TINY["qwen_image"]
    pipe = entry.build()
    model = pipe.transformer
    swap_attention(model, "auto", Ledger())
    torch._dynamo.reset()
    counters.clear()
    for block in model.transformer_blocks:
        block.compile(backend="eager", fullgraph=True, dynamic=True)
    with a_call():
        for prompt in ("a fox", "a small red fox in the snow", "two golden robots over the city at night, soft light"):
            forward(model, entry.forward_inputs(pipe, prompt=prompt))
            if prompt == "a fox":
                first = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == first


@pytest.mark.parametrize("compiled", [False, True])
def test_a_named_kernel_refuses_a_mask_it_cannot_honour_in_one_sentence(flux_model, flux, compiled):
    swap_attention(flux_model, "flex", Ledger())
    inputs = {**flux[1], "joint_attention_kwargs": {"attention_mask": torch.zeros(1, 1, 1, 1)}}
    if compiled:
        torch._dynamo.reset()
        for block in flux_model.transformer_blocks:
            block.compile(backend="eager", fullgraph=True)
    with (
        a_call(),
        pytest.raises(UnsupportedError, match=r"attention='flex' cannot take this call .* use 'auto' or 'sdpa'"),
    ):
        forward(flux_model, inputs)


def test_auto_honours_every_mask_as_stock_does(flux_model, flux):
    tokens = flux[1]["hidden_states"].shape[1] + flux[1]["encoder_hidden_states"].shape[1]
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(1, 1, tokens, tokens, generator=generator)
    padding = torch.rand(1, 1, 1, tokens, generator=generator) > 0.3
    results = []
    for swapped in (False, True):
        if swapped:
            swap_attention(flux_model, "auto", Ledger())
        with a_call():
            results.append(
                [
                    forward(flux_model, {**flux[1], "joint_attention_kwargs": {"attention_mask": mask}})
                    for mask in (bias, padding, padding[:, 0, 0])
                ]
            )
    for stock, ours in zip(*results, strict=True):
        assert torch.equal(stock, ours)
    assert not torch.equal(results[0][0], results[0][1])


def test_modes_that_only_stock_has_go_to_stock_or_are_refused():
    q, k, v = (torch.randn(1, 5, 2, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    models = [torch.nn.Module(), torch.nn.Module()]
    swap_attention(models[0], "auto", Ledger())
    swap_attention(models[1], "flex", Ledger())
    with a_call():
        assert torch.equal(dispatcher_of(models[0]).dispatch(q, k, v, is_causal=True), expected)
        with pytest.raises(UnsupportedError, match="causal"):
            dispatcher_of(models[1]).dispatch(q, k, v, is_causal=True)
    assert torch.equal(dispatcher_of(models[1]).dispatch(q, k, v, is_causal=True), expected)


def test_a_backend_that_the_user_sets_afterwards_wins(flux_model, flux, attended):
    swap_attention(flux_model, "auto", Ledger())
    count = attended(flux_model)
    for processor in processors(flux_model):
        processor._attention_backend = "native"
    with a_call():
        forward(flux_model, flux[1])
    assert not count
    for processor in processors(flux_model):
        del processor._attention_backend
    with a_call():
        forward(flux_model, flux[1])
    assert len(count) == len(processors(flux_model))


def test_a_backend_that_the_user_has_set_contradicts_a_named_kernel(flux_model):
    for processor in processors(flux_model):
        processor._attention_backend = "native"
    with pytest.raises(UnsupportedError, match="reset_attention_backend"):
        swap_attention(flux_model, "sdpa", Ledger())
    assert {id(cls) for cls in classes(flux_model)} == {id(FluxAttnProcessor)}


def test_an_ip_adapter_is_accelerated_on_the_next_call_and_comes_off_again(attended):
    entry = TINY["flux_dev"]
    stock, pipe = entry.build(), entry.build()
    load_tiny_ip_adapter(stock)
    expected = entry.call(stock, **ip_adapter_inputs())
    ledger = Ledger()
    swap_attention(pipe.transformer, "auto", ledger)
    load_tiny_ip_adapter(pipe)
    assert id(FluxIPAdapterAttnProcessor) in map(id, classes(pipe.transformer))
    rebind_attention(pipe.transformer)
    assert id(FluxIPAdapterAttnProcessor) not in map(id, classes(pipe.transformer))
    assert swappable_processors(pipe.transformer).swapped == len(processors(pipe.transformer))
    count = attended(pipe.transformer)
    with a_call():
        assert torch.equal(entry.call(pipe, **ip_adapter_inputs()), expected)
    assert count
    # Diffusers makes the plain processors anew, by the class of those it finds.
    pipe.unload_ip_adapter()
    rebind_attention(pipe.transformer)
    ledger.undo()
    assert {id(cls) for cls in classes(pipe.transformer)} == {id(FluxAttnProcessor)}
    load_tiny_ip_adapter(pipe)
    assert torch.equal(entry.call(pipe, **ip_adapter_inputs()), expected)


def test_processors_taken_off_the_model_become_stock_too(flux_model):
    ledger = Ledger()
    swap_attention(flux_model, "auto", ledger)
    kept = flux_model.attn_processors
    flux_model.set_attn_processor(FluxAttnProcessor())
    rebind_attention(flux_model)
    ledger.undo()
    assert {type(processor) for processor in kept.values()} == {FluxAttnProcessor}
    assert {id(cls) for cls in classes(flux_model)} == {id(FluxAttnProcessor)}


def test_two_holders_of_one_model_share_the_swap_and_the_last_one_restores(flux_model):
    first, second = Ledger(), Ledger()
    swap_attention(flux_model, "auto", first)
    swap_attention(flux_model, "auto", second)
    with pytest.raises(UnsupportedError, match="'auto'"):
        swap_attention(flux_model, "flex", Ledger())
    first.undo()
    assert id(FluxAttnProcessor) not in map(id, classes(flux_model))
    rebind_attention(flux_model)
    second.undo()
    assert {id(cls) for cls in classes(flux_model)} == {id(FluxAttnProcessor)}


def test_a_thread_without_a_call_runs_stock_beside_one_that_has_it(flux_model, flux, attended):
    swap_attention(flux_model, "auto", Ledger())
    count = attended(flux_model)
    with a_call():
        thread = threading.Thread(target=forward, args=(flux_model, flux[1]))
        thread.start()
        thread.join()
    assert not count


def test_rebinding_takes_four_python_calls_a_block_at_most():
    model = torch.nn.ModuleList(torch.nn.Module() for _ in range(57))
    for block in model:
        block.processor = FluxAttnProcessor()
    swap_attention(model, "auto", Ledger())
    assert all(stock_class(block.processor) is FluxAttnProcessor is not type(block.processor) for block in model)
    assert python_calls(lambda: rebind_attention(model)) <= 4 * len(model)


def test_a_model_is_let_go_after_undo():
    model = torch.nn.Module()
    model.processor = FluxAttnProcessor()
    ledger = Ledger()
    swap_attention(model, "auto", ledger)
    ledger.undo()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("name", ["flux_dev", "qwen_image"])
def test_hooks_that_look_the_processors_class_up_find_the_stock_one(name):
    pipe = TINY[name].build()
    known = [AttentionProcessorRegistry.get(cls) for cls in classes(pipe.transformer)]
    before = dict(AttentionProcessorRegistry._registry)
    accelerate_pipeline(pipe, compile=None)
    assert [AttentionProcessorRegistry.get(cls) for cls in classes(pipe.transformer)] == known
    assert AttentionProcessorRegistry._registry == before


def attending_through_a_helper(query, key, value, backend=None):
    return dispatch_attention_fn(query, key, value, backend=backend)


class HelpedProcessor:
    def __call__(self, attn, states):
        states = states.unflatten(-1, (2, -1))
        return attending_through_a_helper(states, states, states).flatten(2)


def test_a_processor_that_reaches_its_kernel_through_a_helper_calls_our_dispatcher(attended):
    model = torch.nn.Module()
    model.processor = HelpedProcessor()
    states, ledger = torch.randn(1, 5, 8), Ledger()
    expected = model.processor(None, states)
    assert swap_attention(model, "auto", ledger).swapped == 1
    count = attended(model)
    with a_call():
        assert torch.equal(model.processor(None, states), expected)
    assert count
    assert attending_through_a_helper.__globals__["dispatch_attention_fn"] is dispatch_attention_fn
    ledger.undo()
    assert type(model.processor) is HelpedProcessor


def test_flux2_processors_that_cache_keys_call_our_dispatcher():
    for cls in (Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor):
        model, ledger = torch.nn.Module(), Ledger()
        model.processor = cls()
        swap_attention(model, "auto", ledger)
        scope = type(model.processor).__dict__["__call__"].__globals__
        helper = scope["_flux2_kv_causal_attention"]
        assert helper.__globals__["dispatch_attention_fn"] == dispatcher_of(model).dispatch
        ledger.undo()


def test_ranks_cannot_share_a_sequence_where_a_processor_does_not_tell_its_kernel_of_them():
    class Across:
        def serve(self, attend):
            pass

    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.Module()])
    model.blocks[0].processor = Flux2KVAttnProcessor()
    swap_attention(model, "auto", Ledger(), across=Across())
    with pytest.raises(UnsupportedError, match=r"Flux2KVAttnProcessor .*so ranks cannot share a sequence"):
        refuse_stock_processors(model, ["blocks"])
