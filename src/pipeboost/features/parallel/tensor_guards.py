"""What must not be done while weights are split between ranks raises one sentence instead of giving rubbish."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from pipeboost.contract.call import current_call
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import stock_class
from pipeboost.distributed import Group
from pipeboost.features.parallel.tensor_layout import has_weights

_LOAD_FIRST = "load and fuse it before accelerate_pipeline(), or call pipe.acceleration.remove() first"
_REMOVE_FIRST = "call pipe.acceleration.remove() first"
_REFUSED = {
    **dict.fromkeys(("state_dict", "save_pretrained", "load_state_dict", "resize_token_embeddings"), _REMOVE_FIRST),
    **dict.fromkeys(("fuse_lora", "unfuse_lora", "fuse_qkv_projections"), _REMOVE_FIRST),
    **dict.fromkeys(("load_lora_weights", "load_lora_adapter", "load_adapter", "add_adapter"), _LOAD_FIRST),
    **dict.fromkeys(("load_ip_adapter", "_load_ip_adapter_weights"), _LOAD_FIRST),
}
"""Methods of models and pipelines → what to do instead."""


def guard_model(model: nn.Module, group: Group, ledger: Ledger) -> None:
    """Make a model whose weights are split raise where it is called outside a call of ours, saved, loaded or fused."""
    ledger.add_middleware(model, "__call__", functools.partial(_only_in_a_call, group.size), place="component.guard")
    _refuse(model, group, ledger, "component.guard")
    if hasattr(stock_class(model), "set_attn_processor"):
        ledger.add_middleware(
            model, "set_attn_processor", functools.partial(_only_without_weights, group.size), place="component.guard"
        )


def guard_pipeline(pipe: Any, group: Group, ledger: Ledger) -> None:
    """Make what would load, fuse or save split weights raise at the pipeline, before it has changed anything."""
    _refuse(pipe, group, ledger, "pipe.parallel")


def _refuse(owner: Any, group: Group, ledger: Ledger, place: str) -> None:
    for method, way_out in _REFUSED.items():
        if callable(getattr(stock_class(owner), method, None)):
            sentence = f"{method}() cannot work on weights that are split over {group.size} ranks; {way_out}"
            ledger.add_middleware(owner, method, functools.partial(_refusal, sentence), place=place)


def _refusal(sentence: str, call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
    raise UnsupportedError(f"{type(owner).__name__}.{sentence}")


def _only_in_a_call(ranks: int, call_next: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    call = current_call()
    if call is None or not call.has("parallel"):
        raise UnsupportedError(
            f"the weights of {type(model).__name__} are split over {ranks} ranks, so all of them call it together: "
            "call the pipeline, or the model inside `with pipe.acceleration.open():`; acceleration.remove() joins them"
        )
    return call_next(*args, **kwargs)


def _only_without_weights(ranks: int, call_next: Callable[..., Any], model: Any, processor: Any, *args: Any) -> Any:
    if any(map(has_weights, processor.values() if isinstance(processor, dict) else (processor,))):
        raise UnsupportedError(
            f"attention processors with weights of their own cannot be set on {type(model).__name__}, which is split "
            f"over {ranks} ranks; set them before accelerate_pipeline(), or call pipe.acceleration.remove() first"
        )
    return call_next(processor, *args)
