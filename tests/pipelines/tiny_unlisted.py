"""Tiny pipelines whose class no family lists, around transformers that one does."""

from diffusers import (
    DiffusionPipeline,
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    HunyuanSkyreelsImageToVideoPipeline,
    LTX2InContextPipeline,
    LucyEditPipeline,
    QwenImageControlNetInpaintPipeline,
    QwenImageControlNetModel,
    ZImageControlNetInpaintPipeline,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
)

from tests.pipelines import tiny_flux, tiny_hunyuan_video, tiny_ltx2, tiny_qwen_image, tiny_wan, tiny_z_image
from tests.pipelines import tiny_parts as parts
from tests.pipelines.tiny_entry import HEAD_DIM, HEADS, LATENT_CHANNELS, TinyPipeline, mask, picture


def _flux_control(pipeline_class: type[DiffusionPipeline]) -> DiffusionPipeline:
    transformer = tiny_flux._transformer(in_channels=2 * tiny_flux.PACKED_CHANNELS)
    return tiny_flux._pipe(pipeline_class, transformer=transformer)


def _qwen_controlnet() -> DiffusionPipeline:
    controlnet = QwenImageControlNetModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=parts.TEXT_DIM,
        axes_dims_rope=(4, 6, 6),
        extra_condition_channels=4,
    )
    controlnet = parts.randomised(controlnet, seed=2)
    return tiny_qwen_image._pipe(QwenImageControlNetInpaintPipeline, controlnet=controlnet)


def _z_controlnet(pipeline_class: type[DiffusionPipeline], *, channels: int = LATENT_CHANNELS) -> DiffusionPipeline:
    stock = tiny_z_image._pipe(tiny_z_image.ZImagePipeline)
    controlnet = ZImageControlNetModel(
        control_layers_places=[0, 2],
        control_refiner_layers_places=[0],
        control_in_dim=channels,
        dim=HEADS * HEAD_DIM,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
    )
    return pipeline_class(**stock.components, controlnet=parts.randomised(controlnet, seed=2))


def _lucy() -> DiffusionPipeline:
    return tiny_wan._pipe(LucyEditPipeline, transformer=tiny_wan._transformer(in_channels=2 * LATENT_CHANNELS))


def _skyreels() -> DiffusionPipeline:
    transformer = tiny_hunyuan_video._transformer(in_channels=2 * LATENT_CHANNELS)
    return tiny_hunyuan_video._pipe(
        HunyuanSkyreelsImageToVideoPipeline, text_encoder=parts.llama(), transformer=transformer
    )


def _ltx2() -> DiffusionPipeline:
    components = tiny_ltx2._pipe().components
    components.pop("duration_head", None)
    return LTX2InContextPipeline(**components)


UNLISTED = {
    entry.name: entry
    for entry in (
        TinyPipeline(
            name="flux_control_img2img",
            family="flux",
            make=lambda: _flux_control(FluxControlImg2ImgPipeline),
            inputs=lambda: tiny_flux._inputs(image=picture(), control_image=picture(seed=1), strength=0.75),
            steps=4,
        ),
        TinyPipeline(
            name="flux_control_inpaint",
            family="flux",
            make=lambda: _flux_control(FluxControlInpaintPipeline),
            inputs=lambda: tiny_flux._inputs(
                image=picture(), control_image=picture(seed=1), mask_image=mask(), strength=0.75
            ),
            steps=4,
        ),
        TinyPipeline(
            name="qwen_image_controlnet_inpaint",
            family="qwen_image",
            make=_qwen_controlnet,
            inputs=lambda: tiny_qwen_image._inputs(control_image=picture(), control_mask=mask()),
            branches=2,
        ),
        TinyPipeline(
            name="z_image_controlnet",
            family="z_image",
            make=lambda: _z_controlnet(ZImageControlNetPipeline),
            inputs=lambda: tiny_z_image._inputs(control_image=picture()),
        ),
        TinyPipeline(
            name="z_image_controlnet_inpaint",
            family="z_image",
            # The picture to change and its mask go along with what controls.
            make=lambda: _z_controlnet(ZImageControlNetInpaintPipeline, channels=2 * LATENT_CHANNELS + 1),
            inputs=lambda: tiny_z_image._inputs(image=picture(), mask_image=mask(), control_image=picture(seed=1)),
        ),
        TinyPipeline(
            name="lucy_edit",
            family="wan",
            make=_lucy,
            inputs=lambda: tiny_wan._inputs(video=[picture(seed=seed) for seed in range(5)]),
            branches=2,
        ),
        TinyPipeline(
            name="skyreels_i2v",
            family="hunyuan_video",
            make=_skyreels,
            inputs=lambda: tiny_hunyuan_video._inputs(image=picture(), guidance_scale=6.0),
        ),
        TinyPipeline(name="ltx2_in_context", family="ltx2", make=_ltx2, inputs=tiny_ltx2._inputs, branches=3),
    )
}
