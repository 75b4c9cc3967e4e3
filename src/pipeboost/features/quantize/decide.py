"""Whether linears run in 8 bits: not in this version."""

from __future__ import annotations

from pipeboost.contract.decision import Decision, Decisions
from pipeboost.contract.model_info import ModelInfo
from pipeboost.core.config import AccelerationConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Family
from pipeboost.core.hardware import Hardware


def decide(
    config: AccelerationConfig, model: ModelInfo, hardware: Hardware, family: Family, earlier: Decisions
) -> Decision:
    """Refuse what is not here yet.

    Raises:
        UnsupportedError: what was asked for needs what this machine or model does not have.
    """
    if config.quantize not in (None, "auto"):
        raise UnsupportedError("quantize='fp8' is not in this version yet; use quantize=None")
    return Decision("quantize", "off", "fp8 linears are not in this version yet")
