"""Tiny Qwen-Image: text to image with and without guidance, editing of one picture and of several."""

import functools
from typing import Any

from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

from tests.pipelines import tiny_parts as parts
from tests.pipelines import tiny_tokenizers as tokenizers
from tests.pipelines.tiny_entry import (
    HEAD_DIM,
    HEADS,
    HEIGHT,
    LATENT_CHANNELS,
    TRUE_CFG,
    WIDTH,
    TinyPipeline,
    picture,
)


def _pipe(pipeline_class: type[DiffusionPipeline], **components: Any) -> DiffusionPipeline:
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=parts.TEXT_DIM,
        axes_dims_rope=(4, 6, 6),
    )
    return pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=parts.qwen_vae(),
        text_encoder=parts.qwen_vl(),
        tokenizer=tokenizers.qwen_tokenizer(),
        transformer=parts.randomised(transformer),
        **components,
    )


def _edit(pipeline_class: type[DiffusionPipeline]) -> DiffusionPipeline:
    _shrink_reference_pictures()
    return _pipe(pipeline_class, processor=tokenizers.qwen_processor())


@functools.cache
def _shrink_reference_pictures() -> None:
    # The edit pipelines resize every reference to a fixed megapixel, of which the tiny VAE alone takes seconds. Their
    # rule stays, with areas 256 times smaller: 64x64 pixels or so for the VAE, 32x32 for the text encoder.
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        stock = module.calculate_dimensions
        module.calculate_dimensions = lambda area, ratio, stock=stock: stock(area / 256, ratio)


def _inputs(**more: Any) -> dict[str, Any]:
    return {"height": HEIGHT, "width": WIDTH, **TRUE_CFG, **more}


ENTRIES = (
    TinyPipeline(
        name="qwen_image", family="qwen_image", make=lambda: _pipe(QwenImagePipeline), inputs=_inputs, branches=2
    ),
    TinyPipeline(
        name="qwen_image_no_cfg",
        family="qwen_image",
        make=lambda: _pipe(QwenImagePipeline),
        inputs=lambda: {"height": HEIGHT, "width": WIDTH, "true_cfg_scale": 1.0},
    ),
    TinyPipeline(
        name="qwen_image_edit",
        family="qwen_image",
        make=lambda: _edit(QwenImageEditPipeline),
        inputs=lambda: _inputs(image=picture()),
        branches=2,
    ),
    TinyPipeline(
        name="qwen_image_edit_plus",
        family="qwen_image",
        make=lambda: _edit(QwenImageEditPlusPipeline),
        inputs=lambda: _inputs(image=[picture(), picture(seed=1, width=64)]),
        branches=2,
    ),
)
