"""Wan: 2.1 text- and image-to-video, 2.2 with two experts, TI2V; FastWan has the same architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeboost.families import Blocks, Family


def branches(pipe: Any, arguments: Mapping[str, Any]) -> int:
    """Two forwards a step when the guidance scale is above 1; Wan's own default is 5."""
    return 2 if arguments.get("guidance_scale", 5.0) > 1 else 1


FAMILY = Family(
    name="wan",
    pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"),
    transformers=("WanTransformer3DModel",),
    denoisers=("transformer", "transformer_2"),
    text_encoders=("text_encoder",),
    blocks=(Blocks(path="blocks", returns="image", text_dims={}),),
    padded_text=None,
    branches=branches,
    full_sizes=(),
)
