"""Prompt reuse: what `encode_prompt` returned for the same prompt and the same encoders is not computed again.

`reuse_prompts` is the verb; a `PromptReuse` is the cache of one acceleration, and the layer on its pipeline's door.
"""

from pipeboost.features.reuse.attach import PromptReuse, reuse_prompts

__all__ = ["PromptReuse", "reuse_prompts"]
