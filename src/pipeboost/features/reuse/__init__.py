"""Prompt reuse: what `encode_prompt` returned for the same prompt and the same encoders is not computed again."""
