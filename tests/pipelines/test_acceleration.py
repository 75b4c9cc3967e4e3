"""The one line on every family: what it changes, what it leaves alone, and that it comes off without a trace."""

import contextlib
import copy
import dataclasses
import gc
import pickle
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxTransformer2DModel

from pipeboost import CacheConfig, CompileConfig, accelerate_pipeline
from pipeboost.contract.call import current_call
from pipeboost.core.errors import PipeboostError, UnsupportedError
from pipeboost.core.seams import add_middleware
from tests.floors import is_rounding
from tests.moments import at_once, freed_at_once
from tests.parameters import often
from tests.pipelines.moves import plan_another_device
from tests.pipelines.tiny import (
    ENDS,
    OTHER_PROMPT,
    TINY,
    ip_adapter_inputs,
    load_tiny_ip_adapter,
    load_tiny_lora,
    picture,
    tiny_names,
)

FAMILIES = ("flux", "qwen_image", "wan", "hunyuan_video", "hunyuan_video_15", "z_image", "ltx2")
# Dynamo traces and guards as always; only the code generator, which takes minutes for all these models, is left out.
TRACED = CompileConfig(backend="eager")
ALL_ON = {"quality": "fast", "compile": TRACED, "cache": CacheConfig(warmup=1, threshold=0.9)}
LOSSLESS = {"quality": "lossless", "compile": TRACED}
# Where compile takes no part in what is claimed.
CACHED = {**ALL_ON, "compile": None}
UNTRACED = {**LOSSLESS, "compile": None}
pytestmark = pytest.mark.usefixtures("graphs_stay")


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


def _variants() -> list[Any]:
    """A family's first variant, traced in `lossless`, and its last, traced nowhere; all in both tiers if asked for."""
    first = [tiny_names(family)[0] for family in FAMILIES]
    found = [(name, (name in first, False)) for name in ENDS if TINY[name].family]
    return often(found, [(name, (True, True)) for name in tiny_names(*FAMILIES)])


@pytest.mark.parametrize(("name", "traced"), _variants(), ids=str)
def test_lossless_changes_rounding_at_most_and_what_comes_off_restores_bit_identical_output(name, traced):
    entry = TINY[name]
    stock = entry.stock()
    pipe = accelerate_pipeline(entry.build(), **(LOSSLESS if traced[0] else UNTRACED))
    assert is_rounding(difference(entry.call(pipe), stock), entry.floor)
    if name != "flux_controlnet" and entry.family not in ("z_image", "ltx2"):
        accelerate_pipeline(pipe, **(ALL_ON if traced[1] else CACHED))
        entry.call(pipe, steps=4)
    with pipe.acceleration.paused():
        assert difference(entry.call(pipe), stock) == 0
    pipe.acceleration.remove()
    assert not hasattr(pipe, "acceleration")
    assert difference(entry.call(pipe), stock) == 0


def test_the_default_needs_no_argument():
    entry = TINY["flux_dev"]
    pipe = entry.build()
    assert accelerate_pipeline(pipe) is pipe
    assert pipe.acceleration.plan.quality == "lossless"
    assert is_rounding(difference(entry.call(pipe), entry.stock()), entry.floor)


@pytest.mark.parametrize(("name", "settings"), [("sd3", LOSSLESS), ("pixart_sigma", UNTRACED)])
def test_a_pipeline_without_a_family_gets_the_generic_treatment(name, settings):
    entry = TINY[name]
    stock = entry.stock()
    pipe = accelerate_pipeline(entry.build(), **settings)
    assert "missing" in str(pipe.acceleration.plan)
    assert is_rounding(difference(entry.call(pipe), stock), entry.floor)
    pipe.acceleration.remove()
    assert difference(entry.call(pipe), stock) == 0


@pytest.mark.parametrize("name", often(["flux_dev", "wan22_t2v"], ["qwen_image", "hunyuan_video"]))
def test_another_pipeline_of_the_class_is_untouched_before_during_and_after(name):
    entry = TINY[name]
    other = entry.build()
    stock = entry.call(other, steps=4)
    pipe = accelerate_pipeline(entry.build(), **ALL_ON)
    during = []

    def call_the_other(pipe, step, timestep, kwargs):
        if step == 2:
            before = threading.Thread(target=lambda: during.append(entry.call(other, steps=4)))
            before.start()
            before.join()
        return kwargs

    entry.call(pipe, steps=4, callback_on_step_end=call_the_other)
    assert difference(during[0], stock) == 0
    assert difference(entry.call(other, steps=4), stock) == 0
    pipe.acceleration.remove()
    assert difference(entry.call(other, steps=4), stock) == 0


def _globals_of_the_libraries() -> dict[str, object]:
    """Every class attribute, module global and registry of the libraries we build on, by identity and content."""
    seen: dict[str, object] = {}
    for module_name, module in sorted(sys.modules.items()):
        if not module_name.startswith(("diffusers.", "cache_dit.", "torch.nn.", "accelerate.")):
            continue
        for name, value in list(vars(module).items()):
            key = f"{module_name}.{name}"
            seen[key] = _identity(value)
            if isinstance(value, type) and value.__module__ == module_name:
                seen.update({f"{key}.{member}": _identity(inner) for member, inner in vars(value).items()})
    for flags in (torch._dynamo.config, torch._inductor.config):
        seen.update({f"{flags.__name__}.{name}": repr(value) for name, value in flags.get_config_copy().items()})
    seen["threads"] = threading.active_count()
    return seen


def _identity(value: object) -> object:
    if isinstance(value, dict):
        return {repr(key): id(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return sorted(map(id, value))
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    return id(value)


@pytest.mark.parametrize("name", often(["flux_dev", "wan22_t2v"], ["qwen_image", "hunyuan_video"]))
def test_no_class_global_or_registry_differs_after_remove(name):
    entry = TINY[name]
    with contextlib.suppress(PipeboostError):
        warm = accelerate_pipeline(entry.build(), **ALL_ON)  # imports what is imported on first use
        entry.call(warm, steps=4)
        warm.acceleration.remove()
    pipe = entry.build()
    before = _globals_of_the_libraries()
    accelerate_pipeline(pipe, **ALL_ON)
    entry.call(pipe, steps=4)
    pipe.acceleration.remove()
    after = _globals_of_the_libraries()
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert not changed


def test_after_remove_every_object_has_its_stock_class_and_attributes():
    entry = TINY["flux_dev"]
    pipe, untouched = entry.build(), entry.build()
    entry.call(pipe)
    entry.call(untouched)
    accelerate_pipeline(pipe, **ALL_ON)
    entry.call(pipe, steps=4)
    pipe.acceleration.remove()
    for (name, ours), (_, theirs) in zip(
        pipe.transformer.named_modules(), untouched.transformer.named_modules(), strict=True
    ):
        assert type(ours) is type(theirs), name
        assert vars(ours).keys() == vars(theirs).keys(), name
        if hasattr(ours, "processor"):
            assert type(ours.processor) is type(theirs.processor), name
    for component in ("scheduler", "vae"):
        assert type(getattr(pipe, component)) is type(getattr(untouched, component))
    assert type(pipe) is type(untouched)
    assert vars(pipe).keys() == vars(untouched).keys()


@pytest.mark.parametrize("name", ["flux_dev", "wan21_t2v"])
def test_a_scheduler_that_the_user_replaces_is_used_and_kept(name):
    entry = TINY[name]
    stock = entry.build()
    pipe = accelerate_pipeline(entry.build(), **LOSSLESS)
    before = entry.call(pipe)
    old = pipe.scheduler
    stock_class_of_old = type(stock.scheduler)
    for each in (stock, pipe):
        each.scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    replaced = pipe.scheduler
    expected = entry.call(stock)
    assert difference(expected, before) > 1e-3
    assert is_rounding(difference(entry.call(pipe), expected), entry.floor)
    assert len(pipe.acceleration.report().steps) == entry.steps
    assert type(old) is stock_class_of_old
    pipe.acceleration.remove()
    assert pipe.scheduler is replaced
    assert type(replaced) is FlowMatchEulerDiscreteScheduler
    assert difference(entry.call(pipe), expected) == 0


def test_a_transformer_that_the_user_replaces_is_accelerated_and_the_old_one_is_stock_again():
    entry = TINY["flux_dev"]
    pipe = accelerate_pipeline(entry.build(), **ALL_ON)
    entry.call(pipe, steps=4)
    old, new = pipe.transformer, copy.deepcopy(entry.build().transformer)
    stock_class = type(new)
    with torch.no_grad():
        new.proj_out.weight.mul_(0.5)
    reference = entry.build()
    reference.transformer = copy.deepcopy(new)
    expected = entry.call(reference, steps=4)
    pipe.transformer = new
    entry.call(pipe, steps=4)
    assert type(old) is stock_class
    assert type(new) is not stock_class
    pipe.acceleration.remove()
    assert pipe.transformer is new
    assert difference(entry.call(pipe, steps=4), expected) == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_lora_loaded_before_or_after_acceleration_works_and_unloads(when):
    entry = TINY["flux_dev"]
    reference = entry.build()
    plain = entry.call(reference)
    load_tiny_lora(reference)
    with_lora = entry.call(reference)
    assert difference(plain, with_lora) > 1e-3
    pipe = entry.build()
    if when == "before":
        load_tiny_lora(pipe)
        accelerate_pipeline(pipe, **UNTRACED)
    else:
        accelerate_pipeline(pipe, **LOSSLESS)
        entry.call(pipe)
        load_tiny_lora(pipe)
    assert is_rounding(difference(entry.call(pipe), with_lora), entry.floor)
    pipe.unload_lora_weights()
    assert is_rounding(difference(entry.call(pipe), plain), entry.floor)
    load_tiny_lora(pipe)
    pipe.acceleration.remove()
    assert difference(entry.call(pipe), with_lora) == 0


def test_an_ip_adapter_loaded_after_acceleration_is_accelerated_and_kept():
    entry = TINY["flux_dev"]
    reference = entry.build()
    load_tiny_ip_adapter(reference)
    image = ip_adapter_inputs()
    expected = entry.call(reference, **image)
    pipe = accelerate_pipeline(entry.build(), **LOSSLESS)
    plain = entry.call(pipe)
    load_tiny_ip_adapter(pipe)
    assert is_rounding(difference(entry.call(pipe, **image), expected), entry.floor)
    pipe.acceleration.remove()
    assert difference(entry.call(pipe, **image), expected) == 0
    assert type(pipe.transformer.transformer_blocks[0].attn.processor).__name__ == "FluxIPAdapterAttnProcessor"
    accelerate_pipeline(pipe, **LOSSLESS)
    pipe.unload_ip_adapter()
    assert is_rounding(difference(entry.call(pipe), plain), entry.floor)
    pipe.acceleration.remove()
    assert difference(entry.call(pipe), entry.stock()) == 0


def test_a_shallow_copy_is_accelerated_too_and_remove_reaches_it():
    entry = TINY["flux_dev"]
    stock = entry.stock()
    pipe = accelerate_pipeline(entry.build(), **LOSSLESS)
    view = copy.copy(pipe)
    assert is_rounding(difference(entry.call(view), stock), entry.floor)
    assert is_rounding(difference(entry.call(pipe), stock), entry.floor)
    with pytest.raises(UnsupportedError, match="shallow copy of an accelerated one"):
        accelerate_pipeline(view, quality="exact")
    pipe.acceleration.remove()
    assert difference(entry.call(view), stock) == 0
    assert difference(entry.call(pipe), stock) == 0


def test_a_shallow_copy_whose_original_is_gone_runs_and_comes_off():
    entry = TINY["flux_dev"]
    pipe = accelerate_pipeline(entry.build(), **LOSSLESS)
    view = copy.copy(pipe)
    del pipe
    gc.collect()
    stock = entry.stock()
    assert is_rounding(difference(entry.call(view), stock), entry.floor)
    view.acceleration.remove()
    assert difference(entry.call(view), stock) == 0


def _pickled(pipe):
    return pickle.loads(pickle.dumps(pipe))


# After a call transformers leaves a hook on some text encoders that stock cannot pickle either.
@pytest.mark.parametrize(
    ("name", "duplicate"),
    [("flux_dev", copy.deepcopy), ("hunyuan_video", copy.deepcopy), ("flux_dev", _pickled)],
)
def test_a_deep_copy_or_pickle_is_a_stock_pipeline_and_leaves_nothing_on_the_original(name, duplicate):
    entry = TINY[name]
    stock = entry.stock(steps=4)
    pipe = accelerate_pipeline(entry.build(), **ALL_ON)
    entry.call(pipe, steps=4)
    for _ in range(2):
        twin = duplicate(pipe)
        assert not hasattr(twin, "acceleration")
        assert type(twin) is type(entry.build())
        assert difference(entry.call(twin, steps=4), stock) == 0
    accelerate_pipeline(twin, **LOSSLESS)
    assert is_rounding(difference(entry.call(twin), entry.stock()), entry.floor)
    pipe.acceleration.remove()
    assert not [module for module in pipe.transformer.modules() if "_pipeboost_chains" in vars(module)]
    assert difference(entry.call(pipe, steps=4), stock) == 0


def test_ten_views_leave_nothing_behind():
    entry = TINY["flux_dev"]
    pipe = accelerate_pipeline(entry.build(), quality="exact")
    entry.call(pipe, steps=1, output_type="latent")
    parts = len(pipe.acceleration._applied.components)
    for _ in range(10):
        view = copy.copy(pipe)
        view.scheduler = copy.deepcopy(pipe.scheduler)
        entry.call(view, steps=1, output_type="latent")
        assert len(view.acceleration.report().steps) == 1
    del view
    gc.collect()
    entry.call(pipe, steps=1, output_type="latent")
    assert len(pipe.acceleration._applied.components) == parts


def test_removing_one_of_two_pipelines_with_one_transformer_leaves_the_other_as_it_was():
    entry = TINY["flux_true_cfg"]
    pipe = accelerate_pipeline(entry.build(), **CACHED)
    second = accelerate_pipeline(type(pipe).from_pipe(pipe), **CACHED)
    before, counts = entry.call(second, steps=8), second.acceleration.report().cache
    assert any(count["skipped"] for count in counts.values())
    pipe.acceleration.remove()
    assert difference(entry.call(second, steps=8), before) == 0
    assert second.acceleration.report().cache == counts
    del pipe
    transformer, scheduler = second.transformer, second.scheduler
    second.acceleration.remove()
    untouched = entry.build()
    assert type(transformer) is type(untouched.transformer)
    assert type(scheduler) is type(untouched.scheduler)


def test_a_pipeline_built_with_from_pipe_runs_stock_and_can_be_accelerated_too():
    entry, variant = TINY["flux_dev"], TINY["flux_img2img"]
    pipe = accelerate_pipeline(entry.build(), **ALL_ON)
    entry.call(pipe, steps=4)
    expected = variant.call(FluxImg2ImgPipeline.from_pipe(entry.build()), steps=4)
    second = FluxImg2ImgPipeline.from_pipe(pipe)
    second.set_progress_bar_config(disable=True)
    assert difference(variant.call(second, steps=4), expected) == 0
    accelerate_pipeline(second, **ALL_ON)
    variant.call(second, steps=4)
    pipe.acceleration.remove()
    variant.call(second, steps=4)
    second.acceleration.remove()
    assert difference(variant.call(second, steps=4), expected) == 0
    assert difference(entry.call(pipe, steps=4), entry.stock(steps=4)) == 0


def test_an_exact_pipeline_that_shares_a_transformer_with_a_faster_one_stays_exact():
    entry, variant = TINY["flux_dev"], TINY["flux_img2img"]
    pipe = accelerate_pipeline(entry.build(), **{**ALL_ON, "attention": "flex"})
    expected = variant.call(FluxImg2ImgPipeline.from_pipe(entry.build()), steps=4)
    second = accelerate_pipeline(FluxImg2ImgPipeline.from_pipe(pipe), quality="exact")
    assert difference(variant.call(second, steps=4), expected) == 0


def test_pipelines_that_share_a_transformer_must_agree():
    pipe = accelerate_pipeline(TINY["flux_dev"].build(), **LOSSLESS)
    second = FluxImg2ImgPipeline.from_pipe(pipe)
    with pytest.raises(UnsupportedError, match="shared with another accelerated pipeline"):
        accelerate_pipeline(second, quality="lossless", compile=CompileConfig(backend="aot_eager"))
    assert not hasattr(second, "acceleration")


def test_a_pipeline_moved_to_another_device_is_planned_anew():
    entry = TINY["flux_dev"]
    pipe = accelerate_pipeline(entry.build(), quality="balanced")
    here = plan_another_device(pipe)
    assert is_rounding(difference(entry.call(pipe), entry.stock()), entry.floor)
    assert pipe.acceleration.plan == here
    pipe.acceleration.remove()
    assert difference(entry.call(pipe), entry.stock()) == 0


def test_a_list_of_requests_after_a_move_to_another_device_is_planned_anew_too():
    entry = TINY["flux_dev"]
    pipe = accelerate_pipeline(entry.build(), quality="exact")
    here = plan_another_device(pipe)
    assert len(list(pipe.acceleration.run_many([entry.call_kwargs(steps=1, seed=seed) for seed in range(2)]))) == 2
    assert pipe.acceleration.plan == here


def test_a_dropped_pipeline_frees_its_transformer_at_once():
    entry = TINY["flux_dev"]
    pipe = accelerate_pipeline(entry.build(), **ALL_ON)
    entry.call(pipe, steps=4)
    # Diffusers' own cache contexts make a cycle of a transformer and its hooks; of ours there must be none.
    vars(pipe.transformer).pop("_diffusers_hook", None)
    transformer = weakref.ref(pipe.transformer)
    with freed_at_once():
        del pipe
        assert transformer() is None


def test_a_transformer_that_outlives_its_pipeline_can_be_accelerated_with_other_settings():
    entry = TINY["flux_dev"]
    pipe = accelerate_pipeline(entry.build(), **LOSSLESS)
    entry.call(pipe)
    transformer = pipe.transformer
    del pipe
    second = entry.build()
    second.transformer = transformer
    accelerate_pipeline(second, quality="lossless", attention="flex", compile=None)
    assert is_rounding(difference(entry.call(second), entry.stock()), entry.floor)
    second.acceleration.remove()
    assert difference(entry.call(second), entry.stock()) == 0


def test_views_in_two_threads_never_see_each_others_state():
    entry = TINY["flux_dev"]
    jobs = [{"seed": 1, "steps": 5}, {"seed": 2, "steps": 3, "prompt": OTHER_PROMPT}]
    expected = [entry.stock(**job) for job in jobs]
    pipe = accelerate_pipeline(entry.build(), **LOSSLESS)

    def work(index: int) -> None:
        view = copy.copy(pipe)
        view.scheduler = copy.deepcopy(pipe.scheduler)
        for _ in range(3):
            assert is_rounding(difference(entry.call(view, **jobs[index]), expected[index]), entry.floor)

    at_once(work, range(2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attention": "nonsense"}, "attention='nonsense' is not allowed; use one of 'auto', 'sdpa'"),
        ({"attention": "flash3"}, "flash3"),
        ({"cache": CacheConfig}, "cache=.* is not allowed"),
        ({"quality": "perfect"}, "quality='perfect' is not allowed; use one of 'exact'"),
        ({"quality": "lossless", "cache": CacheConfig()}, "needs quality='fast'"),
        ({"quality": "exact", "compile": "regional"}, "needs quality='lossless'"),
        ({"quality": "fast", "cache": {"treshold": 0.2}}, "cache has no setting 'treshold'"),
        ({"quality": "fast", "cache": CacheConfig(fn=99)}, "fn"),
        ({"quality": "fast", "cache": "fast", "compile": "full"}, "use 'regional'"),
        ({"offload": "everywhere"}, "offload='everywhere' is not allowed; use one of 'auto', 'resident'"),
        ({"quantize": "fp8"}, "needs quality='balanced'"),
        ({"config": 3}, "config must be an AccelerationConfig"),
        ({"config": "missing.yaml"}, "missing.yaml cannot be read"),
    ],
)
def test_bad_input_raises_one_sentence_and_leaves_the_pipe_stock(arguments, words):
    entry = TINY["flux_dev"]
    pipe = entry.build()
    with pytest.raises(PipeboostError, match=words) as caught:
        accelerate_pipeline(pipe, **arguments)
    assert "\n" not in str(caught.value)
    assert not hasattr(pipe, "acceleration")
    assert type(pipe.transformer) is FluxTransformer2DModel
    assert difference(entry.call(pipe), entry.stock()) == 0


@pytest.mark.parametrize("thing", [None, 3, "flux", torch.nn.Linear(2, 2), FlowMatchEulerDiscreteScheduler()])
def test_what_is_no_pipeline_is_refused(thing):
    with pytest.raises(UnsupportedError, match="pipe must be a Diffusers pipeline, not"):
        accelerate_pipeline(thing)


def test_a_pipeline_without_a_transformer_is_refused():
    pipe = TINY["stable_diffusion"].build()
    with pytest.raises(UnsupportedError, match=r"has no transformer to accelerate \(its denoiser is a U-Net"):
        accelerate_pipeline(pipe)
    assert not hasattr(pipe, "acceleration")


def test_accelerating_again_replaces_the_acceleration():
    entry = TINY["flux_dev"]
    pipe = accelerate_pipeline(entry.build(), **ALL_ON)
    entry.call(pipe, steps=4)
    first = pipe.acceleration
    accelerate_pipeline(pipe, quality="exact")
    assert pipe.acceleration is not first
    assert difference(entry.call(pipe), entry.stock()) == 0
    with pytest.raises(PipeboostError, match="was removed"):
        first.verify()


def test_a_refused_new_acceleration_keeps_the_old_one():
    entry = TINY["flux_dev"]
    pipe = accelerate_pipeline(entry.build(), **LOSSLESS)
    first = pipe.acceleration
    with pytest.raises(PipeboostError):
        accelerate_pipeline(pipe, attention="nonsense")
    assert pipe.acceleration is first
    assert is_rounding(difference(entry.call(pipe), entry.stock()), entry.floor)


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_images_per_prompt": 2},
        {"prompt": [OTHER_PROMPT, "a fox"]},
        {"output_type": "latent"},
        {"max_sequence_length": 24},
    ],
)
@pytest.mark.parametrize("name", ["flux_dev", "qwen_image"])
def test_the_pipelines_own_arguments_keep_working(name, overrides):
    entry = TINY[name]
    stock = entry.stock(**overrides)
    pipe = accelerate_pipeline(entry.build(), **UNTRACED)
    assert is_rounding(difference(entry.call(pipe, **overrides), stock), lambda: entry.floor(**overrides))


@pytest.mark.parametrize("name", ["flux_dev", "wan21_t2v"])
def test_a_callback_on_step_end_sees_and_changes_the_latents(name):
    entry = TINY[name]

    def halve(pipe, step, timestep, kwargs):
        return {"latents": kwargs["latents"] * 0.5}

    stock = entry.call(entry.build(), callback_on_step_end=halve)
    pipe = accelerate_pipeline(entry.build(), **LOSSLESS)
    assert is_rounding(difference(entry.call(pipe, callback_on_step_end=halve), stock), entry.floor)


def test_prompt_embeds_keep_working():
    entry = TINY["flux_dev"]
    stock = entry.build()
    with torch.no_grad():
        embeds, pooled, _ = stock.encode_prompt(OTHER_PROMPT, None)
    given = {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    pipe = accelerate_pipeline(entry.build(), **UNTRACED)
    assert is_rounding(difference(entry.call(pipe, **given), entry.call(stock, **given)), entry.floor)


def test_save_pretrained_writes_a_stock_pipeline(tmp_path):
    entry = TINY["flux_dev"]
    pipe = accelerate_pipeline(entry.build(), **ALL_ON)
    entry.call(pipe, steps=4)
    pipe.save_pretrained(tmp_path)
    loaded = type(entry.build()).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert not hasattr(loaded, "acceleration")
    assert difference(entry.call(loaded), entry.stock()) == 0


def test_a_report_says_where_the_time_went(tmp_path):
    entry = TINY["flux_true_cfg"]
    pipe = accelerate_pipeline(entry.build(), **LOSSLESS)
    entry.call(pipe, steps=3)
    report = pipe.acceleration.report()
    assert len([event for event in report.trace if event.what == "forward"]) == 3 * entry.branches
    report.to_json(tmp_path / "report.json")
    report.plot(tmp_path / "report.png")
    assert all((tmp_path / name).stat().st_size > 100 for name in ("report.json", "report.png"))
    assert "denoising" in str(report)


@pytest.mark.parametrize("name", ["sd3", "pixart_sigma"])
def test_a_named_kernel_that_would_not_run_is_refused_and_auto_says_what_stays_stock(name):
    with pytest.raises(UnsupportedError, match="would not run in"):
        accelerate_pipeline(TINY[name].build(), attention="flex")
    plan = accelerate_pipeline(TINY[name].build()).acceleration.plan
    assert not plan["attention"].on
    assert "calls its attention kernel itself" in str(plan)


def test_what_the_user_compiles_stays_stock_outside_our_calls():
    entry = TINY["wan21_t2v"]
    pipe = accelerate_pipeline(entry.build(), attention="flex", compile=None)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    with pipe.acceleration.paused():
        assert difference(entry.call(pipe), entry.stock()) == 0


def test_a_component_replaced_while_a_view_runs_does_not_touch_the_views_call():
    entry = TINY["flux_dev"]
    pipe = accelerate_pipeline(entry.build(), **CACHED)
    alone = entry.call(pipe, steps=8)
    view = copy.copy(pipe)
    view.scheduler = copy.deepcopy(pipe.scheduler)
    new = entry.build().transformer

    def replace_on_the_original(view, step, timestep, kwargs):
        if step == 2:
            pipe.transformer = new
            thread = threading.Thread(target=lambda: entry.call(pipe, steps=1))
            thread.start()
            thread.join()
        return kwargs

    assert difference(entry.call(view, steps=8, callback_on_step_end=replace_on_the_original), alone) == 0


def test_a_scheduler_replaced_in_a_callback_goes_on_counting():
    entry = TINY["flux_true_cfg"]
    pipe = accelerate_pipeline(entry.build(), **CACHED)
    expected = entry.call(pipe, steps=6)
    counts = pipe.acceleration.report().cache

    def replace(pipe, step, timestep, kwargs):
        if step == 1:
            pipe.scheduler = copy.deepcopy(pipe.scheduler)
        return kwargs

    assert difference(entry.call(pipe, steps=6, callback_on_step_end=replace), expected) == 0
    assert len(pipe.acceleration.report().steps) == 6
    assert pipe.acceleration.report().cache == counts


# FLUX needs the noise floor, for which stock's own compile takes its time.
@pytest.mark.parametrize("compiled", often(["wan21_t2v"], ["flux_dev"]))
def test_verify_keeps_each_tiers_promise_and_says_when_it_is_broken(compiled):
    entry, other = TINY["flux_dev"], TINY[compiled]
    call = {key: value for key, value in entry.call_kwargs().items() if key != "generator"}
    pipe = accelerate_pipeline(entry.build(), quality="exact")
    result = pipe.acceleration.verify(**call)
    assert result.passed
    assert result.max_difference == 0
    call_of_other = {key: value for key, value in other.call_kwargs(steps=1).items() if key != "generator"}
    lossless = accelerate_pipeline(other.build(), **LOSSLESS)
    result = lossless.acceleration.verify(**call_of_other)
    assert result.passed, str(result)
    accelerate_pipeline(pipe, quality="fast", cache=CacheConfig(warmup=1, threshold=1.0, max_continuous=9))
    pipe.acceleration._applied.plan = dataclasses.replace(pipe.acceleration.plan, quality="exact")
    broken = pipe.acceleration.verify(**{**call, "num_inference_steps": 9})
    assert not broken.passed
    assert broken.max_difference > 0
    assert str(broken).startswith("FAILED")


@pytest.mark.parametrize(
    ("name", "outputs", "forwards"),
    [
        ("z_image", ["images"], ["transformer"]),
        ("ltx2", ["frames", "audio"], ["transformer.0", "transformer.1"]),
    ],
)
def test_verify_judges_each_output_whether_a_list_of_samples_or_a_video_with_its_sound(name, outputs, forwards):
    entry = TINY[name]
    call = {key: value for key, value in entry.call_kwargs(steps=2).items() if key != "generator"}
    pipe = accelerate_pipeline(entry.build(), **UNTRACED)
    result = pipe.acceleration.verify(**call)
    assert result.passed, str(result)
    assert list(result.outputs) == outputs
    assert list(result.forward_errors) == forwards
    assert all(f"{output}: PSNR" in str(result) for output in outputs if len(outputs) > 1)
    # What the transformer returns last is spoiled, in our calls alone.
    accelerate_pipeline(pipe, quality="exact")
    add_middleware(pipe.transformer, "__call__", spoil_last, place="component.stages")
    broken = pipe.acceleration.verify(**call)
    assert not broken.passed
    assert broken.outputs[outputs[-1]][1] > 0


def spoil_last(call_next, owner, *args, **kwargs):
    *others, last = call_next(*args, **kwargs)
    if current_call() is not None:
        last = [sample * 1.5 for sample in last] if isinstance(last, list) else last * 1.5
    return (*others, last)


def test_the_noise_floor_is_stocks_own():
    entry = TINY["wan21_t2v"]
    call = {key: value for key, value in entry.call_kwargs(steps=1).items() if key != "generator"}
    pipe = accelerate_pipeline(entry.build(), attention="flex")
    stock_compile = pipe.transformer.compile_repeated_blocks
    pipe.transformer.compile_repeated_blocks = lambda **options: stock_compile(backend="eager")
    result = pipe.acceleration.verify(**call)
    assert result.noise_floor == {"transformer": 0.0}
    assert result.forward_errors["transformer"] > 0
    assert not result.passed


def test_image_to_image_with_a_cache_counts_its_own_steps():
    entry = TINY["flux_img2img"]
    pipe = accelerate_pipeline(entry.build(), **CACHED)
    entry.call(pipe, steps=8, image=picture(), strength=0.5, output_type="latent")
    assert len(pipe.acceleration.report().steps) == 4
