"""Qwen-Image: text-to-image, Edit, EditPlus (2509, 2511)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeboost.families import Blocks, Family


def branches(pipe: Any, arguments: Mapping[str, Any]) -> int:
    """Two forwards a step with true CFG: a scale above 1 and a negative prompt, given as text or as embeddings."""
    given = (
        arguments.get("negative_prompt") is not None or arguments.get("negative_prompt_embeds") is not None
    )
    return 2 if given and arguments.get("true_cfg_scale", 1.0) > 1 else 1


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
    branches=branches,
    full_sizes=(),
)
