"""What a pipeline would ignore without a word is refused before it runs.

It is found by the names that Diffusers gives to arguments and by what the pipeline holds: no class is named here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from pipeboost.core.errors import ConfigurationError, quoted
from pipeboost.core.seams import stock_class

_OF_GUIDANCE = (
    "guidance_rescale",
    "cfg_normalization",
    "cfg_normalize",
    "cfg_truncation",
    "cfg_trunc_ratio",
    "enable_cfg_renorm",
    "cfg_renorm_min",
    "skip_guidance_layers",
)
# What an argument is ignored without, in pipelines that have both.
_NEEDS = {
    "callback_on_step_end_tensor_inputs": "callback_on_step_end",
    "padding_mask_crop": "mask_image",
    "pag_adaptive_scale": "pag_scale",
    **dict.fromkeys(("skip_layer_guidance_scale", "skip_layer_guidance_start"), "skip_guidance_layers"),
    "skip_layer_guidance_stop": "skip_guidance_layers",
    **dict.fromkeys(("system_prompt", "prompt_max_new_tokens"), "enable_prompt_enhancement"),
    **dict.fromkeys(("prompt_enhancement_kwargs", "prompt_enhancement_seed"), "enable_prompt_enhancement"),
}
_INSTEAD_OF = {"min_seconds": "num_frames", "max_seconds": "num_frames"}
_GIVEN_BY_BLOCKS = {
    "self",
    "attn",
    "args",
    "kwargs",
    "hidden_states",
    "encoder_hidden_states",
    "encoder_hidden_states_mask",
    "image_rotary_emb",
    "temb",
}
_MODELS = ("transformer", "transformer_2", "unet")


def refuse_ignored(
    pipe: Any,
    parameters: Mapping[str, inspect.Parameter],
    arguments: Mapping[str, Any],
    *,
    guidance: str | None,
    given: Mapping[str, Any],
) -> None:
    """Refuse what a call would not make use of.

    Args:
        parameters: those of the pipeline's `__call__`.
        arguments: all that the call would get.
        guidance: name of the argument that guides this pipeline.
        given: those of the arguments that the user chose.

    Raises:
        ConfigurationError: an argument that does nothing beside the others, or contradicts one of them.
    """
    name = stock_class(pipe).__name__
    wanted = {key: value for key, value in given.items() if not _is_default(value, parameters[key])}
    guided = partial(_guidance_parts, guidance)
    for reason in (_schedule, guided, _beside_others, _of_components, _attention_arguments):
        for argument, why in reason(pipe, parameters, arguments, wanted):
            raise ConfigurationError(f"{argument}={quoted(arguments[argument])} does nothing in {name}{why}")


def guidance_acts(pipe: Any, parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any]) -> bool:
    """Whether a call computes a negative branch, as the pipeline itself decides it."""
    guider = getattr(pipe, "guider", None)
    if guider is not None:
        return bool(getattr(guider, "_enabled", True)) and getattr(guider, "num_conditions", 2) > 1
    scales = {name: _value(name, parameters, arguments) for name in parameters if name.endswith(("_scale", "_scale_2"))}
    decision = getattr(stock_class(pipe), "do_classifier_free_guidance", None)
    if "true_cfg_scale" not in scales and isinstance(decision, property):
        view = copy.copy(pipe)
        # A scale that is not given stands for the first one.
        first = scales.get("guidance_scale")
        vars(view).update({f"_{name}": first if value is None else value for name, value in scales.items()})
        return bool(view.do_classifier_free_guidance)
    scale = scales.get("true_cfg_scale", scales.get("guidance_scale"))
    return not isinstance(scale, (int, float)) or scale > 1


def scale_name(parameters: Mapping[str, Any]) -> str | None:
    """The argument that switches classifier-free guidance on."""
    return next((name for name in ("true_cfg_scale", "guidance_scale") if name in parameters), None)


_Found = Iterator[tuple[str, str]]


def _guidance_parts(
    guidance: str | None, pipe: Any, parameters: Any, arguments: Any, wanted: Mapping[str, Any]
) -> _Found:
    """Negative prompts in all their forms, what corrects guidance, and a scale for which there is no embedding."""
    if "guidance_scale" in wanted and guidance == "true_cfg_scale":
        yield "guidance_scale", ", which has no guidance embedding; use true_cfg_scale"
    parts = [name for name in wanted if name.startswith("negative_") or name in _OF_GUIDANCE]
    if "stg_scale" in parameters:  # these rescale other kinds of guidance too
        parts = [name for name in parts if name != "guidance_rescale"]
    if not parts or guidance_acts(pipe, parameters, arguments):
        return
    scale = scale_name(parameters)
    if scale is None or getattr(pipe, "guider", None) is not None:
        yield parts[0], ", whose guidance is off; leave it out"
    else:
        way = "guidance_scale=4" if scale == guidance else f"call={{{scale!r}: 4}}"
        yield parts[0], f" at {scale}={_value(scale, parameters, arguments)}; use {way}, or leave it out"


def _beside_others(pipe: Any, parameters: Any, arguments: Any, wanted: Mapping[str, Any]) -> _Found:
    for name in wanted:
        needed, other = _NEEDS.get(name), _INSTEAD_OF.get(name)
        if needed is not None and needed in parameters and not _value(needed, parameters, arguments):
            yield name, f" without {needed}; give both, or leave it out"
        if other in arguments:
            yield name, f" beside {other}={arguments[other]}; leave one of them out"


def _schedule(pipe: Any, parameters: Any, arguments: Any, wanted: Mapping[str, Any]) -> _Found:
    given = [name for name in ("timesteps", "sigmas") if name in wanted]
    if len(given) > 1:
        raise ConfigurationError("timesteps and sigmas contradict each other; leave one of them out")
    scheduler: Any = getattr(pipe, "scheduler", None)
    kind: Any = stock_class(scheduler)
    read = inspect.unwrap(stock_class(pipe).__call__).__code__.co_names
    for name in given:
        makes_its_own = name == "sigmas" and "use_flow_sigmas" in read and scheduler.config.get("use_flow_sigmas")
        if makes_its_own or name not in inspect.signature(kind.set_timesteps).parameters:
            yield name, f", for {kind.__name__} makes its own; leave it out"
        count, steps = len(arguments[name]), arguments.get("num_inference_steps")
        if count == 0 or steps not in (None, count):
            raise ConfigurationError(
                f"num_inference_steps={steps} contradicts {name}={quoted(arguments[name])}, which has {count}; leave "
                "num_inference_steps out, or give as many"
            )
    if "eta" in wanted and "eta" not in inspect.signature(kind.step).parameters:
        yield "eta", f", for {kind.__name__} has none; leave it out"


def _of_components(pipe: Any, parameters: Any, arguments: Any, wanted: Mapping[str, Any]) -> _Found:
    """What acts through a part that the pipeline may or may not have."""
    vae = getattr(getattr(pipe, "vae", None), "config", None)
    for name in wanted:
        if name.startswith(("ip_adapter_", "negative_ip_adapter_")) and not _has_ip_adapter(pipe):
            yield name, ", for no IP-Adapter is loaded; leave it out"
        if name in ("decode_timestep", "decode_noise_scale") and not getattr(vae, "timestep_conditioning", True):
            yield name, ", whose VAE is not conditioned on a timestep; leave it out"


def _attention_arguments(pipe: Any, parameters: Any, arguments: Any, wanted: Mapping[str, Any]) -> _Found:
    for name in wanted:
        if not name.endswith("attention_kwargs") or not isinstance(wanted[name], Mapping):
            continue
        known = _attention_keys(pipe)
        for key in wanted[name]:
            if key not in known:
                less = " without a LoRA" if key == "scale" else ""
                yield name, f", whose attention makes no use of {quoted(key)}{less}; leave it out"


def _attention_keys(pipe: Any) -> set[str]:
    """What `attention_kwargs` may hold: a LoRA's scale, and arguments of processors where blocks hand them on."""
    components = [each for each in pipe.components.values() if each is not None]
    keys = {"scale"} if any(getattr(each, "peft_config", None) for each in components) else set()
    if _has_ip_adapter(pipe):
        keys.add("ip_adapter_image_embeds")
    for model in filter(None, (getattr(pipe, name, None) for name in _MODELS)):
        classes: set[Any] = {stock_class(module) for module in model.modules() if module is not model}
        forwards = [inspect.signature(cls.forward).parameters.values() for cls in classes]
        named = {each.name for forward in forwards for each in forward if each.kind is not each.VAR_KEYWORD}
        if not any(name.endswith("attention_kwargs") for name in named):
            continue
        processors = {stock_class(getattr(module, "processor", None)) for module in model.modules()} - {type(None)}
        taken = {name for cls in processors for name in inspect.signature(cls.__call__).parameters}
        keys |= taken - _GIVEN_BY_BLOCKS
    return keys


def _has_ip_adapter(pipe: Any) -> bool:
    models = (getattr(pipe, name, None) for name in _MODELS)
    return any(
        getattr(model, name, None) is not None for model in models for name in ("encoder_hid_proj", "image_proj")
    )


def _value(name: str, parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any]) -> Any:
    return arguments.get(name, parameters[name].default)


def _is_default(value: Any, parameter: inspect.Parameter) -> bool:
    default = parameter.default
    plain = type(value) is type(default) and isinstance(value, (bool, int, float, str))
    return value is None or value is default or (plain and value == default)
