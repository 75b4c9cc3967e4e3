"""Whether forwards are replayed from CUDA graphs."""

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
    """Choose whether forwards are captured as CUDA graphs.

    Raises:
        UnsupportedError: what was asked for needs what this machine or model does not have.
    """
    asked = config.compile
    if asked is None:
        return Decision(
            "graphs", "off", "turned off with compile; CompileConfig(scope=None, graphs=True) has them alone"
        )
    wanted = "auto" if asked == "auto" else asked.graphs
    if wanted is False:
        return Decision("graphs", "off", "turned off")
    offload, caching = earlier["offload"].settings, earlier["cache"].settings
    against: dict[str, bool] = {
        "the pipeline is on the CPU": hardware.device == "cpu",
        "the cache decides on the host which blocks run": caching is not None and caching.extrapolate == "blocks",
        "the transformer's weights come and go": model.offloaded
        or (offload is not None and offload.transformers != "resident"),
    }
    reason = next((words for words, holds in against.items() if holds), None)
    if reason is not None:
        if wanted is True:
            raise UnsupportedError(f"compile.graphs=True is not possible here: {reason}; use graphs='auto' or False")
        return Decision("graphs", "off", f"a CUDA graph is not possible: {reason}")
    why = "a forward is captured at its third run, and replayed where that is faster when both are timed in turn"
    if wanted is True:
        why = "a forward is captured at its second run with the same shapes and settings"
    return Decision("graphs", "auto" if wanted == "auto" else "on", f"{why}; the report counts them", settings=wanted)
