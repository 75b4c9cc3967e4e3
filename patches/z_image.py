"""Z-Image: text- and image-to-image, inpainting. A step's guidance branches are one batch, as lists of samples."""

from __future__ import annotations

from pipeboost.families import BatchedBranches, Family, stage_doors

FAMILY = Family(
    name="z_image",
    pipelines=("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
    transformers=("ZImageTransformer2DModel",),
    denoisers=("transformer",),
    doors=stage_doors(text_outputs=("prompt_embeds", "negative_prompt_embeds")),
    guided=True,
    batched=BatchedBranches(samples=("x", "t", "cap_feats")),
)
