"""What must not be done while weights are split between ranks raises one sentence instead of giving rubbish."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from pipeboost.contract.call import current_call
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import Middleware, stock_class
from pipeboost.distributed import Group

_LOAD_FIRST = "load and fuse it before accelerate_pipeline(), or call pipe.acceleration.remove() first"
_REMOVE_FIRST = "call pipe.acceleration.remove() first"
_OF_MODELS = {
    **dict.fromkeys(("state_dict", "save_pretrained", "load_state_dict"), _REMOVE_FIRST),
    **dict.fromkeys(("load_lora_adapter", "load_adapter", "add_adapter", "_load_ip_adapter_weights"), _LOAD_FIRST),
    **dict.fromkeys(("fuse_lora", "unfuse_lora"), _REMOVE_FIRST),
    **dict.fromkeys(("fuse_qkv_projections", "resize_token_embeddings"), _REMOVE_FIRST),
}
_OF_PIPELINES = {
    **dict.fromkeys(("load_lora_weights", "load_ip_adapter"), _LOAD_FIRST),
    **dict.fromkeys(("fuse_lora", "unfuse_lora", "save_pretrained", "fuse_qkv_projections"), _REMOVE_FIRST),
}


def guard_model(model: nn.Module, group: Group, ledger: Ledger) -> None:
    """Make a model whose weights are split raise where it is called outside a call of ours, saved, loaded or fused."""
    ledger.add_middleware(model, "__call__", functools.partial(_only_in_a_call, group.size), place="component.guard")
    for door, way_out in _present(model, _OF_MODELS):
        ledger.add_middleware(model, door, _refusing(door, group.size, way_out), place="component.guard")
    if hasattr(stock_class(model), "set_attn_processor"):
        ledger.add_middleware(
            model, "set_attn_processor", functools.partial(_only_without_weights, group.size), place="component.guard"
        )


def guard_pipeline(pipe: Any, group: Group, ledger: Ledger) -> None:
    """Make what would load, fuse or save split weights raise at the pipeline, before it has changed anything."""
    for door, way_out in _present(pipe, _OF_PIPELINES):
        ledger.add_middleware(pipe, door, _refusing(door, group.size, way_out), place="pipe.parallel")


def _present(owner: Any, doors: dict[str, str]) -> Iterable[tuple[str, str]]:
    stock = stock_class(owner)
    return ((door, way_out) for door, way_out in doors.items() if callable(getattr(stock, door, None)))


def _only_in_a_call(ranks: int, call_next: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    call = current_call()
    if call is None or not call.has("parallel"):
        raise UnsupportedError(
            f"the weights of {type(model).__name__} are split over {ranks} ranks, so all of them call it together: "
            "call the pipeline, or the model inside `with pipe.acceleration.open():`; acceleration.remove() joins them"
        )
    return call_next(*args, **kwargs)


def _refusing(door: str, ranks: int, way_out: str) -> Middleware:
    def refuse(call_next: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(
            f"{type(owner).__name__}.{door}() cannot work on weights that are split over {ranks} ranks; {way_out}"
        )

    return refuse


def _only_without_weights(ranks: int, call_next: Callable[..., Any], model: Any, processor: Any, *args: Any) -> Any:
    given = processor.values() if isinstance(processor, dict) else (processor,)
    if any(isinstance(each, nn.Module) and next(each.parameters(), None) is not None for each in given):
        raise UnsupportedError(
            f"attention processors with weights of their own cannot be set on {type(model).__name__}, which is split "
            f"over {ranks} ranks; set them before accelerate_pipeline(), or call pipe.acceleration.remove() first"
        )
    return call_next(processor, *args)
