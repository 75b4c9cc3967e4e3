"""Whether embeddings of prompts are kept."""

from __future__ import annotations

from pipeboost.contract.decision import Decision, Decisions
from pipeboost.contract.model_info import ModelInfo
from pipeboost.core.config import AccelerationConfig, ReuseConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Family
from pipeboost.core.hardware import Hardware


def decide(
    config: AccelerationConfig, model: ModelInfo, hardware: Hardware, family: Family, earlier: Decisions
) -> Decision:
    """Choose whether a prompt seen before is encoded again.

    Raises:
        UnsupportedError: what was asked for needs what this machine or model does not have.
    """
    asked, layout = config.reuse, earlier["parallel"].settings
    if asked is None:
        return Decision("reuse", "off", "turned off; every prompt is encoded anew")
    if layout is not None and layout.shares_text_encoders:
        if asked != "auto":
            raise UnsupportedError(
                "reuse would let a rank leave out an encoding that the others share with it; use reuse=None, or "
                "ParallelConfig(text_encoder=False)"
            )
        return Decision("reuse", "off", "the ranks share the text encoders, and encode every prompt together")
    if not model.encodes:
        if asked != "auto":
            raise UnsupportedError(
                f"reuse keeps what encode_prompt returns, which {model.pipeline} does not have; use reuse=None"
            )
        return Decision("reuse", "off", "the pipeline has no encode_prompt")
    settings = ReuseConfig() if asked == "auto" else asked
    why = f"same prompt, encoders and settings, same embeddings; keeps at most {settings.max_bytes / 2**20:.0f} MiB"
    return Decision("reuse", "prompts", why, settings=settings)
