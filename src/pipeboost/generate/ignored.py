"""What a pipeline would ignore without a word is refused before it runs.

It is found by the names that Diffusers gives to arguments and by what the pipeline holds: no class is named here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipeboost.core.errors import ConfigurationError, quoted
from pipeboost.core.seams import stock_class

if TYPE_CHECKING:
    from pipeboost.generate.call_arguments import CallSignature

_OF_GUIDANCE = (
    "guidance_rescale", "cfg_normalization", "cfg_normalize", "cfg_truncation", "cfg_trunc_ratio", "enable_cfg_renorm",
    "cfg_renorm_min", "skip_guidance_layers",
)  # fmt: skip
# What an argument is ignored without, in pipelines that have both.
_NEEDS = {
    "callback_on_step_end_tensor_inputs": "callback_on_step_end",
    "padding_mask_crop": "mask_image",
    "pag_adaptive_scale": "pag_scale",
    **{f"skip_layer_guidance_{part}": "skip_guidance_layers" for part in ("scale", "start", "stop")},
    "system_prompt": "enable_prompt_enhancement",
    **{
        f"prompt_{part}": "enable_prompt_enhancement"
        for part in ("max_new_tokens", "enhancement_kwargs", "enhancement_seed")
    },
}
_INSTEAD_OF = {"min_seconds": "num_frames", "max_seconds": "num_frames"}
_GIVEN_BY_BLOCKS = {
    "self", "attn", "args", "kwargs", "hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask",
    "image_rotary_emb", "temb",
}  # fmt: skip
_MODELS = ("transformer", "transformer_2", "unet")
_IMAGE_PROJECTIONS = ("encoder_hid_proj", "image_proj")


def refuse_ignored(signature: CallSignature, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse what a call would not make use of.

    Args:
        arguments: all that the call would get.
        given: those of the arguments that the user chose.

    Raises:
        ConfigurationError: an argument that does nothing together with the others, or contradicts one of them.
    """
    wanted = {key: value for key, value in given.items() if not _is_default(value, signature.parameters[key])}
    for reason in (_schedule, _guidance_parts, _dependent_arguments, _of_components, _attention_arguments):
        for argument, why in reason(signature, arguments, wanted):
            raise ConfigurationError(f"{argument}={quoted(arguments[argument])} does nothing in {signature.name}{why}")


def guidance_acts(signature: CallSignature, arguments: Mapping[str, Any]) -> bool:
    """Whether a call computes a negative branch, as the pipeline itself decides it."""
    pipe, names = signature.pipe, signature.parameters
    guider = getattr(pipe, "guider", None)
    if guider is not None:
        return bool(getattr(guider, "_enabled", True)) and getattr(guider, "num_conditions", 2) > 1
    scales = {name: signature.value(name, arguments) for name in names if name.endswith(("_scale", "_scale_2"))}
    decision = getattr(stock_class(pipe), "do_classifier_free_guidance", None)
    if "true_cfg_scale" not in scales and isinstance(decision, property):
        view = copy.copy(pipe)
        # A scale that is not given stands for the first one.
        first = scales.get("guidance_scale")
        vars(view).update({f"_{name}": first if value is None else value for name, value in scales.items()})
        return bool(view.do_classifier_free_guidance)
    scale = scales.get("true_cfg_scale", scales.get("guidance_scale"))
    return not isinstance(scale, (int, float)) or scale > 1


_Found = Iterator[tuple[str, str]]


def _guidance_parts(signature: CallSignature, arguments: Mapping[str, Any], wanted: Mapping[str, Any]) -> _Found:
    """Negative prompts in all their forms, what corrects guidance, and a scale for which there is no embedding."""
    if "guidance_scale" in wanted and signature.guidance == "true_cfg_scale":
        yield "guidance_scale", ", which has no guidance embedding; use true_cfg_scale"
    parts = [name for name in wanted if name.startswith("negative_") or name in _OF_GUIDANCE]
    if "stg_scale" in signature.parameters:  # these rescale other kinds of guidance too
        parts = [name for name in parts if name != "guidance_rescale"]
    if not parts or guidance_acts(signature, arguments):
        return
    scale = signature.cfg_scale
    if scale is None or getattr(signature.pipe, "guider", None) is not None:
        yield parts[0], ", whose guidance is off; leave it out"
    else:
        way = "guidance_scale=4" if scale == signature.guidance else f"call={{{scale!r}: 4}}"
        yield parts[0], f" at {scale}={signature.value(scale, arguments)}; use {way}, or leave it out"


def _dependent_arguments(signature: CallSignature, arguments: Mapping[str, Any], wanted: Mapping[str, Any]) -> _Found:
    for name in wanted:
        needed, other = _NEEDS.get(name, ""), _INSTEAD_OF.get(name, "")
        if needed in signature.parameters and not signature.value(needed, arguments):
            yield name, f" without {needed}; give both, or leave it out"
        if other in arguments:
            yield name, f" beside {other}={arguments[other]}; leave one of them out"


def _schedule(signature: CallSignature, arguments: Mapping[str, Any], wanted: Mapping[str, Any]) -> _Found:
    given = [name for name in ("timesteps", "sigmas") if name in wanted]
    if len(given) > 1:
        raise ConfigurationError("timesteps and sigmas contradict each other; leave one of them out")
    scheduler: Any = getattr(signature.pipe, "scheduler", None)
    kind: Any = stock_class(scheduler)
    read = inspect.unwrap(stock_class(signature.pipe).__call__).__code__.co_names
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


def _of_components(signature: CallSignature, arguments: Mapping[str, Any], wanted: Mapping[str, Any]) -> _Found:
    """What acts through a part that the pipeline may or may not have."""
    vae = getattr(getattr(signature.pipe, "vae", None), "config", None)
    for name in wanted:
        if name.startswith(("ip_adapter_", "negative_ip_adapter_")) and not _has_ip_adapter(signature.pipe):
            yield name, ", for no IP-Adapter is loaded; leave it out"
        if name in ("decode_timestep", "decode_noise_scale") and not getattr(vae, "timestep_conditioning", True):
            yield name, ", whose VAE is not conditioned on a timestep; leave it out"


def _attention_arguments(signature: CallSignature, arguments: Mapping[str, Any], wanted: Mapping[str, Any]) -> _Found:
    for name, value in wanted.items():
        if not name.endswith("attention_kwargs") or not isinstance(value, Mapping):
            continue
        for key in value.keys() - _attention_keys(signature.pipe):
            less = " without a LoRA" if key == "scale" else ""
            yield name, f", whose attention makes no use of {quoted(key)}{less}; leave it out"


def _attention_keys(pipe: Any) -> set[str]:
    """What `attention_kwargs` may hold: a LoRA's scale, and arguments of processors where blocks hand them on."""
    keys = {"scale"} if any(getattr(each, "peft_config", None) for each in pipe.components.values()) else set()
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
    return any(getattr(model, name, None) is not None for model in models for name in _IMAGE_PROJECTIONS)


def _is_default(value: Any, parameter: inspect.Parameter) -> bool:
    default = parameter.default
    plain = type(value) is type(default) and isinstance(value, (bool, int, float, str))
    return value is None or value is default or (plain and value == default)
