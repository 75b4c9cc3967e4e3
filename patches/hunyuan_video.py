"""HunyuanVideo: text- and image-to-video. Its text is padded, and every block gets a mask over image and text."""

from __future__ import annotations

from pipeboost.families import Blocks, Family, PaddedText, true_cfg_branches


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
    padded_text=PaddedText(embeds="encoder_hidden_states", mask="encoder_attention_mask", block_mask="attention_mask"),
    branches=true_cfg_branches,
    full_sizes=(),
)
