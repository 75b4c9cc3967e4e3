"""Residency on whole pipelines: bit-identical to stock, whatever the user does meanwhile, and off again."""

import copy
import gc
import itertools
import threading
import weakref

import accelerate
import pytest
import torch

from pipeboost import CacheConfig, CompileConfig, OffloadConfig, accelerate_pipeline
from pipeboost.contract.call import current_call
from pipeboost.core.errors import PipeboostError
from pipeboost.features.offload.component import LOADS
from pipeboost.features.offload.copy_stream import MOVES
from pipeboost.features.offload.place import _placed
from tests.moments import at_once, freed_at_once
from tests.parameters import often
from tests.pipelines.tiny import (
    OTHER_PROMPT,
    TINY,
    load_tiny_ip_adapter,
    load_tiny_lora,
    picture,
)

POLICIES = ("stage", "layerwise")
EXACT = {"quality": "exact", "reuse": None}
VARIED = ("flux_dev", "flux_controlnet", "qwen_image", "wan21_i2v", "wan22_t2v", "hunyuan_video")


def offloaded(entry, policy="stage", **more):
    return accelerate_pipeline(entry.build(), offload=policy, **{**EXACT, **more})


def loaded(pipe):
    return {path for path, module in pipe.components.items() if module in _modules() and _placed[module].loaded}


def _modules():
    return set(_placed.keys())


def watching(pipe, seen):
    """A callback that notes what is on the device at the end of each step."""

    def look(_, step, timestep, kwargs):
        seen.append(loaded(pipe))
        return kwargs

    return look


@pytest.mark.parametrize(
    ("name", "policy"), often([*zip(VARIED, POLICIES * 3, strict=True)], itertools.product(VARIED, POLICIES))
)
def test_an_offloaded_pipeline_gives_stocks_bits_and_comes_off_again(name, policy):
    entry = TINY[name]
    stock = entry.stock()
    pipe = offloaded(entry, policy)
    assert torch.equal(entry.call(pipe), stock)
    assert torch.equal(entry.call(pipe), stock)
    assert not loaded(pipe)
    pipe.acceleration.remove()
    fresh = entry.build()
    assert torch.equal(entry.call(pipe), stock)
    for path, component in fresh.components.items():
        assert type(pipe.components[path]) is type(component)
        if isinstance(component, torch.nn.Module):
            ours = pipe.components[path].state_dict()
            assert all(torch.equal(ours[key], value) for key, value in component.state_dict().items())


@pytest.mark.parametrize("name", ["sd3", "pixart_sigma"])
def test_a_pipeline_without_a_family_is_streamed_too(name):
    entry = TINY[name]
    assert torch.equal(entry.call(offloaded(entry, "layerwise")), entry.stock())


def test_while_one_expert_denoises_the_other_and_the_encoders_wait():
    entry = TINY["wan22_t2v"]
    pipe, seen = offloaded(entry), []
    entry.call(pipe, callback_on_step_end=watching(pipe, seen))
    assert seen == [{"transformer"}] * 2 + [{"transformer_2"}] * 2


def test_a_controlnet_stays_beside_the_denoiser():
    entry = TINY["flux_controlnet"]
    pipe, seen = offloaded(entry), []
    entry.call(pipe, callback_on_step_end=watching(pipe, seen))
    assert seen == [{"transformer", "controlnet"}] * entry.steps
    loads = pipe.acceleration.report().loads
    assert sorted(load.component for load in loads).count("controlnet") == 1


def test_kinds_have_their_own_policies():
    entry = TINY["flux_dev"]
    pipe, seen = offloaded(entry, OffloadConfig("resident", text_encoders="stage")), []
    assert torch.equal(entry.call(pipe, callback_on_step_end=watching(pipe, seen)), entry.stock())
    assert {path for path, module in pipe.components.items() if module in _modules()} == {
        "text_encoder",
        "text_encoder_2",
    }
    assert "transformers resident" in pipe.acceleration.plan["offload"].choice


def test_auto_on_a_pipeline_on_the_cpu_adds_no_layer():
    pipe = accelerate_pipeline(TINY["flux_dev"].build(), **EXACT)
    assert not pipe.acceleration.plan["offload"].on
    assert not any(module in _modules() for module in pipe.components.values())


@pytest.mark.parametrize("policy", POLICIES)
def test_a_kept_prompt_loads_no_encoder_and_a_changed_one_does(policy):
    entry = TINY["flux_dev"]
    stock = entry.build()
    pipe = accelerate_pipeline(entry.build(), quality="exact", offload=policy)
    for prompt, encoders in ((OTHER_PROMPT, 2), (OTHER_PROMPT, 0), ("a fox", 2)):
        assert torch.equal(entry.call(pipe, prompt=prompt), entry.call(stock, prompt=prompt))
        loads = [load.component for load in pipe.acceleration.report().loads]
        assert sum("encoder" in path for path in loads) == encoders


def test_a_call_counts_the_bytes_that_it_moves():
    entry = TINY["flux_dev"]
    pipe, calls = offloaded(entry, "layerwise"), []

    def keep(_, step, timestep, kwargs):
        calls.append(current_call())
        return kwargs

    entry.call(pipe, callback_on_step_end=keep)
    loads = calls[0][LOADS]
    assert {path for path, _, _ in loads} == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    assert sum(moved for _, moved, _ in loads) == sum(moved for _, moved in calls[0][MOVES])
    assert all(seconds >= 0 for _, _, seconds in loads)
    by_component = {path: moved for path, moved, _ in loads}
    assert pipe.acceleration.report().moved == {
        "text encoding": by_component["text_encoder"] + by_component["text_encoder_2"],
        "denoising": by_component["transformer"],
        "decoding": by_component["vae"],
    }


@pytest.mark.parametrize("policy", POLICIES)
def test_a_lora_loaded_before_or_after_or_between_calls_works(policy):
    entry = TINY["flux_dev"]
    reference = entry.build()
    plain = entry.call(reference)
    load_tiny_lora(reference)
    with_lora = entry.call(reference)
    pipe = offloaded(entry, policy)
    assert torch.equal(entry.call(pipe), plain)
    load_tiny_lora(pipe)
    assert torch.equal(entry.call(pipe), with_lora)
    pipe.unload_lora_weights()
    assert torch.equal(entry.call(pipe), plain)
    load_tiny_lora(pipe)
    accelerate_pipeline(pipe, offload=policy, **EXACT)
    assert torch.equal(entry.call(pipe), with_lora)
    pipe.acceleration.remove()
    assert torch.equal(entry.call(pipe), with_lora)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_lora_that_a_callback_loads_or_fuses_between_calls_is_kept(policy):
    entry = TINY["flux_dev"]

    def load(pipe, step, timestep, kwargs):
        if step == 0 and not pipe.get_active_adapters():
            load_tiny_lora(pipe)
        return kwargs

    reference = entry.build()
    expected = entry.call(reference, callback_on_step_end=load)
    fused = (reference.fuse_lora(), entry.call(reference))[1]
    pipe = offloaded(entry, policy)
    assert torch.equal(entry.call(pipe, callback_on_step_end=load), expected)
    pipe.fuse_lora()
    assert torch.equal(entry.call(pipe), fused)


@pytest.mark.parametrize("policy", POLICIES)
def test_weights_that_a_callback_changes_in_place_are_written_back(policy):
    entry = TINY["flux_dev"]

    def weaken(pipe, step, timestep, kwargs):
        if step == 0:
            with torch.no_grad():
                pipe.transformer.proj_out.weight.mul_(0.5)
                pipe.transformer.transformer_blocks[0].attn.to_q.weight.mul_(0.5)
                pipe.transformer.single_transformer_blocks[-1].proj_out.weight.mul_(0.5)
        return kwargs

    reference = entry.build()
    expected = entry.call(reference, callback_on_step_end=weaken)
    after = entry.call(reference)
    pipe = offloaded(entry, policy)
    assert torch.equal(entry.call(pipe, callback_on_step_end=weaken), expected)
    assert torch.equal(entry.call(pipe), after)
    pipe.acceleration.remove()
    assert torch.equal(entry.call(pipe), after)


def test_weights_that_a_callback_replaces_reach_a_streamed_block_that_was_sent_already():
    entry = TINY["flux_dev"]

    def replace(pipe, step, timestep, kwargs):
        if step == 0:
            for block in (pipe.transformer.transformer_blocks[0], pipe.transformer.single_transformer_blocks[-1]):
                block.attn.to_k.weight = torch.nn.Parameter(block.attn.to_k.weight * 0.5)
                block.attn.to_q.weight.data = block.attn.to_q.weight.data * 0.5
        return kwargs

    reference = entry.build()
    expected = entry.call(reference, callback_on_step_end=replace)
    after = entry.call(reference)
    pipe = offloaded(entry, "layerwise")
    assert torch.equal(entry.call(pipe, callback_on_step_end=replace), expected)
    assert torch.equal(entry.call(pipe), after)


def test_weights_that_the_user_moves_or_casts_meanwhile_are_taken_in_at_the_next_call():
    entry = TINY["flux_dev"]
    pipe = offloaded(entry)
    entry.call(pipe)
    pipe.transformer.to(torch.float64).to(torch.float32)
    pipe.vae.to(torch.float64)
    reference = entry.build()
    reference.vae.to(torch.float64)
    latents = entry.call(reference, output_type="latent")
    assert torch.equal(entry.call(pipe, output_type="latent"), latents)
    assert _placed[pipe.vae]._store.holds([*pipe.vae.parameters(), *pipe.vae.buffers()])
    assert pipe.vae.dtype == torch.float64


@pytest.mark.parametrize("policy", POLICIES)
def test_an_error_in_a_call_takes_everything_off_the_device(policy):
    entry = TINY["flux_dev"]
    pipe, seen = offloaded(entry, policy), []

    def fail(_, step, timestep, kwargs):
        seen.append(loaded(pipe))
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        entry.call(pipe, callback_on_step_end=fail)
    assert seen == [{"transformer"}]
    assert not loaded(pipe)
    assert torch.equal(entry.call(pipe), entry.stock())


def test_outside_of_calls_and_paused_components_work_as_stock():
    entry = TINY["flux_dev"]
    stock = entry.build()
    expected = entry.call(stock)
    pipe = offloaded(entry)
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(pipe.vae.decode(latents).sample, stock.vae.decode(latents).sample)
        assert torch.equal(
            pipe.vae.encode(torch.ones(1, 3, 64, 64)).latent_dist.mean,
            stock.vae.encode(torch.ones(1, 3, 64, 64)).latent_dist.mean,
        )
        assert torch.equal(pipe.encode_prompt("a fox", "a fox")[0], stock.encode_prompt("a fox", "a fox")[0])
    assert not loaded(pipe)
    with pipe.acceleration.paused():
        assert torch.equal(entry.call(pipe), expected)
    assert not loaded(pipe)
    assert pipe.acceleration.verify(**entry.call_kwargs()).passed


def test_the_pipeline_says_where_it_runs():
    entry = TINY["flux_dev"]
    pipe = offloaded(entry)
    view = copy.copy(pipe)
    assert "_execution_device" in vars(type(pipe))
    assert pipe._execution_device == view._execution_device == torch.device("cpu")
    pipe.acceleration.remove()
    assert "_execution_device" not in vars(type(pipe))


def test_calls_in_several_threads_run_one_after_the_other():
    entry = TINY["flux_dev"]
    jobs = [{"seed": 1}, {"seed": 2, "prompt": OTHER_PROMPT}]
    stock = entry.build()
    alone = [entry.call(stock, **job) for job in jobs]
    pipe, results, inside, most = offloaded(entry), {}, [], []

    def count(_, step, timestep, kwargs):
        inside.append(threading.get_ident())
        most.append(len(set(inside)))
        if step == entry.steps - 1:
            inside.clear()
        return kwargs

    def work(index):
        view = copy.copy(pipe)
        view.scheduler = copy.deepcopy(pipe.scheduler)
        results[index] = [entry.call(view, callback_on_step_end=count, **jobs[index]) for _ in range(3)]

    at_once(work, range(2))
    assert all(torch.equal(result, alone[index]) for index in range(2) for result in results[index])
    assert max(most) == 1


def test_two_accelerated_pipelines_share_components_and_the_last_one_takes_them_off():
    from diffusers import FluxImg2ImgPipeline

    entry, other = TINY["flux_dev"], TINY["flux_img2img"]
    expected, painted = entry.stock(), other.call(other.build())
    pipe = entry.build()
    second = FluxImg2ImgPipeline.from_pipe(pipe)
    second.set_progress_bar_config(disable=True)
    accelerate_pipeline(pipe, offload="stage", **EXACT)
    accelerate_pipeline(second, offload="stage", **EXACT)
    assert torch.equal(entry.call(pipe), expected)
    assert torch.equal(other.call(second), painted)
    pipe.acceleration.remove()
    assert torch.equal(other.call(second), painted)
    with pytest.raises(PipeboostError, match="whose offload is"):
        accelerate_pipeline(pipe, offload="layerwise", **EXACT)
    second.acceleration.remove()
    assert pipe.transformer not in _modules()
    assert torch.equal(entry.call(pipe), expected)


def test_a_component_that_the_user_replaces_is_placed_and_the_old_one_released():
    entry = TINY["flux_dev"]
    pipe = offloaded(entry)
    entry.call(pipe)
    old, new = pipe.transformer, entry.build().transformer
    with torch.no_grad():
        new.proj_out.weight.mul_(0.5)
    reference = entry.build()
    reference.transformer = copy.deepcopy(new)
    pipe.transformer = new
    assert torch.equal(entry.call(pipe), entry.call(reference))
    assert old not in _modules()
    assert type(old) is type(reference.transformer)
    assert new in _modules()


def test_an_image_encoder_that_comes_later_is_placed_too():
    entry = TINY["flux_dev"]
    donor = TINY["flux_ip_adapter"].build()

    def equip(pipe):
        pipe.register_modules(
            image_encoder=copy.deepcopy(donor.image_encoder), feature_extractor=donor.feature_extractor
        )
        load_tiny_ip_adapter(pipe)
        return entry.call(pipe, ip_adapter_image=picture())

    pipe = offloaded(entry)
    assert torch.equal(equip(pipe), equip(entry.build()))
    assert pipe.image_encoder in _modules()


def test_diffusers_own_offload_turned_on_later_takes_over_and_the_plan_says_so():
    entry = TINY["flux_dev"]
    expected = entry.stock()
    pipe = offloaded(entry)
    entry.call(pipe)
    for module in (pipe.text_encoder, pipe.text_encoder_2, pipe.transformer, pipe.vae):
        accelerate.cpu_offload_with_hook(module, "cpu")
    assert torch.equal(entry.call(pipe), expected)
    assert "Diffusers' own CPU offload" in pipe.acceleration.plan["offload"].why
    assert not any(module in _modules() for module in pipe.components.values())
    assert "_execution_device" not in vars(type(pipe))
    pipe.remove_all_hooks()
    pipe.acceleration.remove()
    assert torch.equal(entry.call(pipe), expected)


def test_a_policy_beside_diffusers_own_offload_is_refused_before_any_change():
    entry = TINY["flux_dev"]
    pipe = entry.build()
    accelerate.cpu_offload_with_hook(pipe.transformer, "cpu")
    with pytest.raises(PipeboostError, match=r"pipe.remove_all_hooks\(\) first"):
        accelerate_pipeline(pipe, offload="stage")
    assert not hasattr(pipe, "acceleration")
    assert "left as Diffusers' own" in accelerate_pipeline(pipe).acceleration.plan["offload"].why


@pytest.mark.usefixtures("graphs_stay")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["flux_dev", "wan22_t2v"])
def test_compiled_and_cached_blocks_are_streamed_without_new_graphs(name, policy):
    entry = TINY[name]
    settings = {
        "quality": "fast",
        "reuse": None,
        "compile": CompileConfig(backend="eager"),
        "cache": CacheConfig(warmup=1, threshold=0.9),
    }
    resident = accelerate_pipeline(entry.build(), **settings)
    expected = entry.call(resident, steps=4)
    pipe = offloaded(entry, policy, **settings)
    assert torch.equal(entry.call(pipe, steps=4), expected)
    compiled = pipe.acceleration.report().compiled.values()
    assert sum(counters["graphs"] for counters in compiled) == 0


def test_a_saved_pipeline_is_stock(tmp_path):
    entry = TINY["flux_dev"]
    pipe = offloaded(entry, "layerwise")
    entry.call(pipe)
    pipe.save_pretrained(tmp_path)
    read = type(entry.build()).from_pretrained(tmp_path)
    read.set_progress_bar_config(disable=True)
    assert torch.equal(entry.call(read), entry.stock())
    assert torch.equal(entry.call(copy.deepcopy(pipe)), entry.stock())


def test_inference_mode_changes_nothing():
    entry = TINY["flux_dev"]
    expected = entry.stock()
    pipe = offloaded(entry, "layerwise")
    with torch.inference_mode():
        assert torch.equal(entry.call(pipe), expected)
    assert torch.equal(entry.call(pipe), expected)
    assert not pipe.transformer.proj_out.weight.is_inference()


def test_an_offloaded_pipeline_that_is_dropped_frees_its_memory():
    entry = TINY["flux_dev"]
    pipe = offloaded(entry, "layerwise")
    entry.call(pipe)
    alive = [weakref.ref(each) for each in (pipe, pipe.vae, pipe.vae.decoder.conv_in.weight)]
    transformer = weakref.ref(pipe.transformer)
    with freed_at_once():
        del pipe
        assert [reference() for reference in alive] == [None] * 3
    gc.collect()  # stock's own hooks hold a transformer in a cycle once it has been called
    assert transformer() is None
