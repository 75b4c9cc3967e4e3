"""Tiny stock pipelines of every family and variant that pipeboost supports, the ground on which the parity tests stand.

    from tests.pipelines.tiny import TINY

    @pytest.mark.parametrize("name", TINY)
    def test_claim(name):
        entry = TINY[name]
        pipe = entry.build()                 # random weights, the same ones every time
        before = entry.call(pipe)            # a tensor; `entry.call_kwargs()` gives the arguments instead

All are fp32 on the CPU, with four attention heads of 16, three or four blocks of each kind, and the real text encoder,
VAE, tokenizer and scheduler classes. The parts are in `tiny_parts`, the tokenizers in `tiny_tokenizers`, LoRA and
IP-Adapter in `tiny_adapters`.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image

from tests.pipelines import tiny_parts as parts
from tests.pipelines import tiny_tokenizers as tokenizers

PROMPT = "a small red fox walking in the snow"
OTHER_PROMPT = "a photo of two golden robots flying over the xylophone city at night, soft light"
NEGATIVE_PROMPT = "low quality, blurry"

HEADS = 4
HEAD_DIM = 16
# Height and width differ, so that exchanging them shows; both are multiples of 16.
HEIGHT, WIDTH, FRAMES = 64, 96, 5
LATENT_CHANNELS = 4
PACKED_CHANNELS = LATENT_CHANNELS * 4
ROPE_AXES = (4, 6, 6)


@dataclass(frozen=True)
class TinyPipeline:
    """One variant: how to build it and how to call it.

    `family` is the model family's name or None for a model that pipeboost has no family for; `branches` is how often
    the script calls its denoiser in one step; `steps` is the default number of steps of a call.
    """

    name: str
    build: Callable[[], DiffusionPipeline]
    family: str | None
    inputs: Callable[[], Mapping[str, Any]] = field(default=dict)
    branches: int = 1
    steps: int = 2

    def call_kwargs(self, *, seed: int = 0, steps: int | None = None, **overrides: Any) -> dict[str, Any]:
        """Arguments of one call with a fresh generator; `overrides` replace or add arguments."""
        kwargs = {
            "prompt": PROMPT,
            "num_inference_steps": steps or self.steps,
            "generator": torch.Generator("cpu").manual_seed(seed),
            "output_type": "pt",
        }
        return {**kwargs, **self.inputs(), **overrides}

    def call(
        self, pipe: DiffusionPipeline, *, seed: int = 0, steps: int | None = None, **overrides: Any
    ) -> torch.Tensor:
        """The first output of one call: images `(batch, channels, height, width)`, videos with frames after batch."""
        output = pipe(**self.call_kwargs(seed=seed, steps=steps, **overrides))[0]
        return output if isinstance(output, torch.Tensor) else torch.as_tensor(np.asarray(output))


TINY: dict[str, TinyPipeline] = {}


def _register(
    name: str,
    build: Callable[[], DiffusionPipeline],
    *,
    family: str | None,
    inputs: Callable[[], Mapping[str, Any]],
    branches: int = 1,
    steps: int = 2,
) -> None:
    def quiet_build() -> DiffusionPipeline:
        with parts.seeded(0):
            pipe = build()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    TINY[name] = TinyPipeline(name, quiet_build, family, inputs, branches, steps)


def picture(*, seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A reference picture: a smooth gradient with noise on it."""
    noise = np.random.default_rng(seed).normal(0, 24, (height, width, 3))
    rows, columns = np.mgrid[0:height, 0:width]
    gradient = np.stack([rows * 255 / height, columns * 255 / width, np.full((height, width), 128)], axis=-1)
    return Image.fromarray((gradient + noise).clip(0, 255).astype(np.uint8))


def mask() -> Image.Image:
    """A mask picture whose right half is to be painted anew."""
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    pixels[:, WIDTH // 2 :] = 255
    return Image.fromarray(pixels)


def forward_inputs(
    pipe: DiffusionPipeline, entry: TinyPipeline, *, component: str = "transformer", seed: int = 0, **overrides: Any
) -> dict[str, Any]:
    """Keyword arguments of the first call that a stock one-step generation makes to `pipe.<component>`.

    Tensors are detached copies, so `getattr(pipe, component)(**inputs)` can be repeated at will.
    """
    captured: list[dict[str, Any]] = []

    def capture(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not captured:
            captured.append({**dict(zip(_forward_names(module), args, strict=False)), **kwargs})

    module = getattr(pipe, component)
    hook = module.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        entry.call(pipe, seed=seed, **{"steps": 1, "output_type": "latent", **overrides})
    finally:
        hook.remove()
    if not captured:
        raise ValueError(f"{entry.name} made no call to {component!r} in one step; give steps={entry.steps}")
    return {name: _detached(value) for name, value in captured[0].items()}


def _forward_names(module: torch.nn.Module) -> list[str]:
    code = type(module).forward
    while hasattr(code, "__wrapped__"):
        code = code.__wrapped__
    return list(code.__code__.co_varnames[1 : code.__code__.co_argcount])


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_detached(item) for item in value)
    return value


def _flow_scheduler(**settings: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**settings)


# FLUX


def _flux_transformer(*, in_channels: int = PACKED_CHANNELS, guidance: bool = True) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=PACKED_CHANNELS,
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=parts.TEXT_DIM,
        pooled_projection_dim=parts.TEXT_DIM,
        guidance_embeds=guidance,
        axes_dims_rope=ROPE_AXES,
    ).eval()
    parts.randomise(model, seed=1)
    return model


def _flux(
    pipeline_class: type[DiffusionPipeline],
    *,
    in_channels: int = PACKED_CHANNELS,
    guidance: bool = True,
    **components: Any,
) -> DiffusionPipeline:
    return pipeline_class(
        scheduler=_flow_scheduler(use_dynamic_shifting=True, shift=3.0) if guidance else _flow_scheduler(shift=1.0),
        vae=parts.image_vae(latent_channels=LATENT_CHANNELS),
        text_encoder=parts.clip_text_encoder(),
        tokenizer=tokenizers.clip_tokenizer(),
        text_encoder_2=parts.t5_encoder(),
        tokenizer_2=tokenizers.t5_tokenizer(),
        transformer=_flux_transformer(in_channels=in_channels, guidance=guidance),
        **components,
    )


def _flux_controlnet() -> DiffusionPipeline:
    controlnet = FluxControlNetModel(
        in_channels=PACKED_CHANNELS,
        num_layers=3,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=parts.TEXT_DIM,
        pooled_projection_dim=parts.TEXT_DIM,
        guidance_embeds=True,
        axes_dims_rope=list(ROPE_AXES),
    ).eval()
    parts.randomise(controlnet, seed=2)
    return _flux(FluxControlNetPipeline, controlnet=controlnet)


def _flux_inputs(**more: Any) -> dict[str, Any]:
    return {"height": HEIGHT, "width": WIDTH, "guidance_scale": 3.5, "max_sequence_length": 35, **more}


def _true_cfg() -> dict[str, Any]:
    return {"negative_prompt": NEGATIVE_PROMPT, "true_cfg_scale": 4.0}


_register("flux_dev", lambda: _flux(FluxPipeline), family="flux", inputs=_flux_inputs)
_register(
    "flux_schnell",
    lambda: _flux(FluxPipeline, guidance=False),
    family="flux",
    inputs=lambda: _flux_inputs(guidance_scale=0.0),
    steps=4,
)
_register(
    "flux_true_cfg",
    lambda: _flux(FluxPipeline),
    family="flux",
    inputs=lambda: _flux_inputs(**_true_cfg()),
    branches=2,
)
_register(
    "flux_kontext",
    lambda: _flux(FluxKontextPipeline),
    family="flux",
    inputs=lambda: _flux_inputs(image=picture(), max_area=HEIGHT * WIDTH, _auto_resize=False),
)
_register(
    "flux_fill",
    # The noise, the masked picture and the mask at pixel resolution, packed like latents.
    lambda: _flux(FluxFillPipeline, in_channels=2 * PACKED_CHANNELS + 8 * 8 * 4),
    family="flux",
    inputs=lambda: _flux_inputs(image=picture(), mask_image=mask()),
)
_register(
    "flux_img2img",
    lambda: _flux(FluxImg2ImgPipeline),
    family="flux",
    inputs=lambda: _flux_inputs(image=picture(), strength=0.75),
    steps=4,
)
_register(
    "flux_inpaint",
    lambda: _flux(FluxInpaintPipeline),
    family="flux",
    inputs=lambda: _flux_inputs(image=picture(), mask_image=mask(), strength=0.75),
    steps=4,
)
_register(
    "flux_controlnet",
    _flux_controlnet,
    family="flux",
    inputs=lambda: _flux_inputs(control_image=picture(), controlnet_conditioning_scale=0.7),
)


# Qwen-Image


def _qwen_transformer() -> QwenImageTransformer2DModel:
    model = QwenImageTransformer2DModel(
        in_channels=PACKED_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=parts.TEXT_DIM,
        axes_dims_rope=ROPE_AXES,
    ).eval()
    parts.randomise(model, seed=1)
    return model


def _qwen(pipeline_class: type[DiffusionPipeline], **components: Any) -> DiffusionPipeline:
    return pipeline_class(
        scheduler=_flow_scheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=parts.qwen_vae(),
        text_encoder=parts.qwen_vl(),
        tokenizer=tokenizers.qwen_tokenizer(),
        transformer=_qwen_transformer(),
        **components,
    )


def _qwen_edit(pipeline_class: type[DiffusionPipeline]) -> DiffusionPipeline:
    _shrink_reference_pictures()
    return _qwen(pipeline_class, processor=tokenizers.qwen_processor())


@functools.cache
def _shrink_reference_pictures() -> None:
    # The edit pipelines resize every reference to a fixed megapixel, of which the tiny VAE alone takes seconds. Their
    # rule stays, with areas 256 times smaller: 64x64 pixels for the VAE, 32x32 for the text encoder.
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        stock = module.calculate_dimensions
        module.calculate_dimensions = lambda area, ratio, stock=stock: stock(area / 256, ratio)


def _qwen_inputs(**more: Any) -> dict[str, Any]:
    return {"height": HEIGHT, "width": WIDTH, **_true_cfg(), **more}


_register("qwen_image", lambda: _qwen(QwenImagePipeline), family="qwen_image", inputs=_qwen_inputs, branches=2)
_register(
    "qwen_image_no_cfg",
    lambda: _qwen(QwenImagePipeline),
    family="qwen_image",
    inputs=lambda: {"height": HEIGHT, "width": WIDTH, "true_cfg_scale": 1.0},
)
_register(
    "qwen_image_edit",
    lambda: _qwen_edit(QwenImageEditPipeline),
    family="qwen_image",
    inputs=lambda: _qwen_inputs(image=picture()),
    branches=2,
)
_register(
    "qwen_image_edit_plus",
    lambda: _qwen_edit(QwenImageEditPlusPipeline),
    family="qwen_image",
    inputs=lambda: _qwen_inputs(image=[picture(), picture(seed=1, width=64)]),
    branches=2,
)


# Wan


def _wan_transformer(
    *, in_channels: int = LATENT_CHANNELS, image: bool = False, seed: int = 1
) -> WanTransformer3DModel:
    dim = HEADS * HEAD_DIM
    model = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=in_channels,
        out_channels=LATENT_CHANNELS,
        text_dim=parts.TEXT_DIM,
        freq_dim=32,
        ffn_dim=2 * dim,
        num_layers=4,
        image_dim=32 if image else None,
        added_kv_proj_dim=dim if image else None,
        rope_max_seq_len=64,
    ).eval()
    parts.randomise(model, seed=seed)
    return model


def _wan(pipeline_class: type[DiffusionPipeline], *, flow_shift: float = 3.0, **components: Any) -> DiffusionPipeline:
    return pipeline_class(
        tokenizer=tokenizers.t5_tokenizer(),
        text_encoder=parts.umt5_encoder(),
        vae=parts.wan_vae(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=flow_shift
        ),
        **components,
    )


# The noise, four mask channels (one a frame of a latent) and the encoded picture.
_WAN_IMAGE_CHANNELS = 2 * LATENT_CHANNELS + 4


def _wan_experts(pipeline_class: type[DiffusionPipeline], *, in_channels: int) -> DiffusionPipeline:
    # Four steps at shift 3 visit timesteps 999, 899, 749 and 500 or so: two for each expert.
    return _wan(
        pipeline_class,
        transformer=_wan_transformer(in_channels=in_channels),
        transformer_2=_wan_transformer(in_channels=in_channels, seed=2),
        boundary_ratio=0.875,
    )


def _wan_inputs(**more: Any) -> dict[str, Any]:
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    return {**size, "guidance_scale": 4.0, "negative_prompt": NEGATIVE_PROMPT, "max_sequence_length": 32, **more}


_register(
    "wan21_t2v",
    lambda: _wan(WanPipeline, transformer=_wan_transformer()),
    family="wan",
    inputs=_wan_inputs,
    branches=2,
)
_register(
    "wan21_i2v",
    lambda: _wan(
        WanImageToVideoPipeline,
        transformer=_wan_transformer(in_channels=_WAN_IMAGE_CHANNELS, image=True),
        image_encoder=parts.clip_vision_encoder(),
        image_processor=tokenizers.clip_image_processor(parts.VISION_SIZE),
    ),
    family="wan",
    inputs=lambda: _wan_inputs(image=picture()),
    branches=2,
)
_register(
    "wan22_t2v",
    lambda: _wan_experts(WanPipeline, in_channels=LATENT_CHANNELS),
    family="wan",
    inputs=lambda: _wan_inputs(guidance_scale_2=3.0),
    branches=2,
    steps=4,
)
_register(
    "wan22_i2v",
    lambda: _wan_experts(WanImageToVideoPipeline, in_channels=_WAN_IMAGE_CHANNELS),
    family="wan",
    inputs=lambda: _wan_inputs(image=picture(), guidance_scale_2=3.0),
    branches=2,
    steps=4,
)
_register(
    "wan22_ti2v_text",
    lambda: _wan(WanPipeline, transformer=_wan_transformer(), expand_timesteps=True),
    family="wan",
    inputs=_wan_inputs,
    branches=2,
)
_register(
    "wan22_ti2v_image",
    lambda: _wan(WanImageToVideoPipeline, transformer=_wan_transformer(), expand_timesteps=True),
    family="wan",
    inputs=lambda: _wan_inputs(image=picture()),
    branches=2,
)


# HunyuanVideo


def _hunyuan_transformer(
    *, in_channels: int = LATENT_CHANNELS, guidance: bool = True, image_condition: str | None = None
) -> HunyuanVideoTransformer3DModel:
    model = HunyuanVideoTransformer3DModel(
        in_channels=in_channels,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=3,
        num_single_layers=4,
        num_refiner_layers=2,
        mlp_ratio=2.0,
        guidance_embeds=guidance,
        text_embed_dim=parts.TEXT_DIM,
        pooled_projection_dim=parts.TEXT_DIM,
        rope_axes_dim=ROPE_AXES,
        image_condition_type=image_condition,
    ).eval()
    parts.randomise(model, seed=1)
    return model


def _hunyuan(pipeline_class: type[DiffusionPipeline], **components: Any) -> DiffusionPipeline:
    return pipeline_class(
        tokenizer=tokenizers.llama_tokenizer(),
        vae=parts.hunyuan_video_vae(),
        scheduler=_flow_scheduler(shift=7.0),
        text_encoder_2=parts.clip_text_encoder(),
        tokenizer_2=tokenizers.clip_tokenizer(),
        **components,
    )


def _hunyuan_image(**transformer: Any) -> DiffusionPipeline:
    return _hunyuan(
        HunyuanVideoImageToVideoPipeline,
        text_encoder=parts.llava(),
        transformer=_hunyuan_transformer(**transformer),
        image_processor=tokenizers.clip_image_processor(parts.LLAVA_SIZE),
    )


def _hunyuan_inputs(**more: Any) -> dict[str, Any]:
    # The text is padded to 35 tokens, of which the prompt fills some 9: the attention mask has work to do.
    return {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "max_sequence_length": 35, **more}


_register(
    "hunyuan_video",
    lambda: _hunyuan(HunyuanVideoPipeline, text_encoder=parts.llama(), transformer=_hunyuan_transformer()),
    family="hunyuan_video",
    inputs=lambda: _hunyuan_inputs(guidance_scale=6.0),
)
_register(
    "hunyuan_video_true_cfg",
    lambda: _hunyuan(HunyuanVideoPipeline, text_encoder=parts.llama(), transformer=_hunyuan_transformer()),
    family="hunyuan_video",
    inputs=lambda: _hunyuan_inputs(guidance_scale=1.0, **_true_cfg()),
    branches=2,
)
_register(
    "hunyuan_video_i2v",
    lambda: _hunyuan_image(in_channels=2 * LATENT_CHANNELS + 1, guidance=False, image_condition="latent_concat"),
    family="hunyuan_video",
    inputs=lambda: _hunyuan_inputs(image=picture(), guidance_scale=1.0, **_true_cfg()),
    branches=2,
)
_register(
    "hunyuan_video_i2v_token_replace",
    lambda: _hunyuan_image(image_condition="token_replace"),
    family="hunyuan_video",
    inputs=lambda: _hunyuan_inputs(image=picture(), guidance_scale=6.0),
)


# Models without a family


def _sd3() -> DiffusionPipeline:
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * parts.TEXT_DIM,
        caption_projection_dim=HEADS * HEAD_DIM,
        pooled_projection_dim=2 * parts.TEXT_DIM,
        pos_embed_max_size=16,
    ).eval()
    parts.randomise(model, seed=1)
    return StableDiffusion3Pipeline(
        transformer=model,
        scheduler=_flow_scheduler(shift=3.0),
        vae=parts.image_vae(latent_channels=LATENT_CHANNELS),
        text_encoder=parts.clip_text_encoder(projection=True),
        tokenizer=tokenizers.clip_tokenizer(),
        text_encoder_2=parts.clip_text_encoder(projection=True),
        tokenizer_2=tokenizers.clip_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _pixart_sigma() -> DiffusionPipeline:
    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=4,
        cross_attention_dim=HEADS * HEAD_DIM,
        caption_channels=parts.TEXT_DIM,
        sample_size=16,
        use_additional_conditions=False,
    ).eval()
    parts.randomise(model, seed=1)
    return PixArtSigmaPipeline(
        tokenizer=tokenizers.t5_tokenizer(),
        text_encoder=parts.t5_encoder(),
        vae=parts.image_vae(latent_channels=LATENT_CHANNELS),
        transformer=model,
        scheduler=DPMSolverMultistepScheduler(),
    )


def _stable_diffusion() -> DiffusionPipeline:
    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=parts.TEXT_DIM,
        attention_head_dim=8,
        norm_num_groups=4,
    ).eval()
    return StableDiffusionPipeline(
        unet=model,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        vae=parts.image_vae(latent_channels=LATENT_CHANNELS),
        text_encoder=parts.clip_text_encoder(),
        tokenizer=tokenizers.clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _image_inputs(**more: Any) -> dict[str, Any]:
    return {"height": HEIGHT, "width": WIDTH, "guidance_scale": 4.0, "negative_prompt": NEGATIVE_PROMPT, **more}


_register("sd3", _sd3, family=None, inputs=_image_inputs)
_register(
    "pixart_sigma",
    _pixart_sigma,
    family=None,
    inputs=lambda: _image_inputs(max_sequence_length=35, use_resolution_binning=False, clean_caption=False),
)
_register("stable_diffusion", _stable_diffusion, family=None, inputs=_image_inputs)
