"""Tiny Z-Image: text to image, and image to image, with their two guidance branches in one batch."""

from typing import Any

from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ZImageImg2ImgPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import Qwen3Config, Qwen3Model

from tests.pipelines import tiny_parts as parts
from tests.pipelines import tiny_tokenizers as tokenizers
from tests.pipelines.tiny_entry import (
    HEAD_DIM,
    HEADS,
    HEIGHT,
    LATENT_CHANNELS,
    NEGATIVE_PROMPT,
    WIDTH,
    TinyPipeline,
    picture,
)


def _text_encoder() -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=len(tokenizers.qwen_chat_tokenizer()),
        hidden_size=parts.TEXT_DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=parts.INITIALIZER_RANGE,
    )
    return Qwen3Model(config).eval()


def _pipe(pipeline_class: type[DiffusionPipeline]) -> DiffusionPipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=HEADS * HEAD_DIM,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=parts.TEXT_DIM,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 16, 16],
    )
    return pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.image_vae(latent_channels=LATENT_CHANNELS),
        text_encoder=_text_encoder(),
        tokenizer=tokenizers.qwen_chat_tokenizer(),
        transformer=parts.randomised(transformer),
    )


def _inputs(**more: Any) -> dict[str, Any]:
    size = {"height": HEIGHT, "width": WIDTH, "max_sequence_length": 48}
    return {**size, "guidance_scale": 4.0, "negative_prompt": NEGATIVE_PROMPT, **more}


ENTRIES = (
    TinyPipeline(name="z_image", family="z_image", make=lambda: _pipe(ZImagePipeline), inputs=_inputs),
    TinyPipeline(
        name="z_image_img2img",
        family="z_image",
        make=lambda: _pipe(ZImageImg2ImgPipeline),
        inputs=lambda: _inputs(image=picture(), strength=0.5),
        steps=4,
    ),
)
