"""Tiny FLUX: text to image, Kontext, Fill, image to image, inpainting, ControlNet and IP-Adapter."""

from typing import Any

from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)

from tests.pipelines import tiny_parts as parts
from tests.pipelines import tiny_tokenizers as tokenizers
from tests.pipelines.tiny_adapters import load_tiny_ip_adapter
from tests.pipelines.tiny_entry import (
    HEAD_DIM,
    HEADS,
    HEIGHT,
    LATENT_CHANNELS,
    TRUE_CFG,
    WIDTH,
    TinyPipeline,
    mask,
    picture,
)

PACKED_CHANNELS = 4 * LATENT_CHANNELS
# The noise, the masked picture, and the mask at the pixels' resolution, packed like latents.
FILL_CHANNELS = 2 * PACKED_CHANNELS + 4 * 8 * 8

DENOISER_SETTINGS = {
    "in_channels": PACKED_CHANNELS,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "joint_attention_dim": parts.TEXT_DIM,
    "pooled_projection_dim": parts.TEXT_DIM,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


def _transformer(**settings: Any) -> FluxTransformer2DModel:
    settings = {"out_channels": PACKED_CHANNELS, "num_layers": 3, "num_single_layers": 4, **settings}
    return parts.randomised(FluxTransformer2DModel(**{**DENOISER_SETTINGS, **settings}))


def _pipe(
    pipeline_class: type[DiffusionPipeline], *, transformer: FluxTransformer2DModel | None = None, **components: Any
) -> DiffusionPipeline:
    defaults = {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        "vae": parts.image_vae(latent_channels=LATENT_CHANNELS),
        "text_encoder": parts.clip_text_encoder(),
        "tokenizer": tokenizers.clip_tokenizer(),
        "text_encoder_2": parts.t5_encoder(),
        "tokenizer_2": tokenizers.t5_tokenizer(),
        "transformer": transformer or _transformer(),
    }
    return pipeline_class(**{**defaults, **components})


def _schnell() -> DiffusionPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return _pipe(FluxPipeline, transformer=_transformer(guidance_embeds=False), scheduler=scheduler)


def _controlnet() -> DiffusionPipeline:
    controlnet = FluxControlNetModel(**DENOISER_SETTINGS, num_layers=3, num_single_layers=2)
    return _pipe(FluxControlNetPipeline, controlnet=parts.randomised(controlnet, seed=2))


def _ip_adapter() -> DiffusionPipeline:
    pipe = _pipe(
        FluxPipeline,
        image_encoder=parts.clip_vision_encoder(projection=True),
        feature_extractor=tokenizers.clip_image_processor(parts.VISION_SIZE),
    )
    load_tiny_ip_adapter(pipe)
    return pipe


def _inputs(**more: Any) -> dict[str, Any]:
    return {"height": HEIGHT, "width": WIDTH, "guidance_scale": 3.5, "max_sequence_length": 35, **more}


ENTRIES = (
    TinyPipeline(name="flux_dev", family="flux", make=lambda: _pipe(FluxPipeline), inputs=_inputs),
    TinyPipeline(
        name="flux_schnell", family="flux", make=_schnell, inputs=lambda: _inputs(guidance_scale=0.0), steps=4
    ),
    TinyPipeline(
        name="flux_true_cfg",
        family="flux",
        make=lambda: _pipe(FluxPipeline),
        inputs=lambda: _inputs(**TRUE_CFG),
        branches=2,
    ),
    TinyPipeline(
        name="flux_kontext",
        family="flux",
        make=lambda: _pipe(FluxKontextPipeline),
        inputs=lambda: _inputs(image=picture(), max_area=HEIGHT * WIDTH, _auto_resize=False),
    ),
    TinyPipeline(
        name="flux_fill",
        family="flux",
        make=lambda: _pipe(FluxFillPipeline, transformer=_transformer(in_channels=FILL_CHANNELS)),
        inputs=lambda: _inputs(image=picture(), mask_image=mask()),
    ),
    TinyPipeline(
        name="flux_img2img",
        family="flux",
        make=lambda: _pipe(FluxImg2ImgPipeline),
        inputs=lambda: _inputs(image=picture(), strength=0.75),
        steps=4,
    ),
    TinyPipeline(
        name="flux_inpaint",
        family="flux",
        make=lambda: _pipe(FluxInpaintPipeline),
        inputs=lambda: _inputs(image=picture(), mask_image=mask(), strength=0.75),
        steps=4,
    ),
    TinyPipeline(
        name="flux_controlnet",
        family="flux",
        make=_controlnet,
        inputs=lambda: _inputs(control_image=picture(), controlnet_conditioning_scale=0.7),
    ),
    TinyPipeline(
        name="flux_ip_adapter",
        family="flux",
        make=_ip_adapter,
        inputs=lambda: _inputs(ip_adapter_image=picture()),
    ),
)
