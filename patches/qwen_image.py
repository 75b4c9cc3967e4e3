"""Qwen-Image: text-to-image, Edit, EditPlus (2509, 2511)."""

from __future__ import annotations

from pipeboost.families import Blocks, Family, true_cfg_branches


FAMILY = Family(
    name="qwen_image",
    pipelines=(
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditInpaintPipeline",
        "QwenImageEditPlusPipeline",
    ),
    transformers=("QwenImageTransformer2DModel",),
    denoisers=("transformer",),
    text_encoders=("text_encoder",),
    blocks=(
        Blocks(
            path="transformer_blocks",
            returns="text_image",
            text_dims={"encoder_hidden_states": 1, "encoder_hidden_states_mask": 1, "image_rotary_emb.1": 0},
        ),
    ),
    padded_text=None,
    branches=true_cfg_branches,
    full_sizes=(),
)
