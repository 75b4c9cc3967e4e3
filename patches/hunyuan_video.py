"""HunyuanVideo: text- and image-to-video. Its text is padded, and every block gets a mask over image and text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeboost.families import Blocks, Family, PaddedText


def branches(pipe: Any, arguments: Mapping[str, Any]) -> int:
    """Two forwards a step with true CFG: a scale above 1 and a negative prompt, given as text or as embeddings."""
    given = arguments.get("negative_prompt") is not None or (
        arguments.get("negative_prompt_embeds") is not None
        and arguments.get("negative_pooled_prompt_embeds") is not None
    )
    return 2 if given and arguments.get("true_cfg_scale", 1.0) > 1 else 1


FAMILY = Family(
    name="hunyuan_video",
    pipelines=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
    transformers=("HunyuanVideoTransformer3DModel",),
    denoisers=("transformer",),
    text_encoders=("text_encoder", "text_encoder_2"),
    blocks=(
        Blocks(
            path="transformer_blocks", returns="image_text", text_dims={"encoder_hidden_states": 1, "attention_mask": 3}
        ),
        Blocks(
            path="single_transformer_blocks",
            returns="image_text",
            text_dims={"encoder_hidden_states": 1, "attention_mask": 3},
        ),
    ),
    padded_text=PaddedText(
        embeds="encoder_hidden_states", mask="encoder_attention_mask", block_mask="attention_mask"
    ),
    branches=branches,
    full_sizes=(),
)
