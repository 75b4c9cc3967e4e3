"""Tensor parallelism: each rank keeps its share of a model's weights, and sums its products with the others'.

What must not be done while weights are split between ranks raises one sentence instead of giving rubbish.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeboost.contract.call import current_call
from pipeboost.contract.model_info import Split
from pipeboost.core.errors import PipeboostError, RankFailedError, UnsupportedError
from pipeboost.core.ledger import Ledger
from pipeboost.core.sample import Sample, can_be_sampled
from pipeboost.core.seams import stock_class
from pipeboost.core.sharding import TensorSharding
from pipeboost.distributed import Group
from pipeboost.features.parallel.tensor_layers import become_share, become_whole
from pipeboost.features.parallel.tensor_layout import Layout, has_weights, layout_of

_SAMPLES = 16


class Shares:
    """The shares of one model's weights on this rank. Holds its layers, not the model.

    Attributes:
        layout: what is split.
        names: of the parameters of which this rank has a share.
        whole_bytes: size of these when they were whole.
        own_bytes: size of the shares.
        begun: whether anything was split on this rank.
    """

    def __init__(self, model: nn.Module, layout: Layout, group: Group) -> None:
        self.layout, self._group, self._cuts = layout, group, layout.cuts
        named = model.named_parameters(remove_duplicate=False)
        self.names = frozenset(name for name, parameter in named if parameter in self._cuts)
        self.whole_bytes = layout.bytes
        self.own_bytes = self.whole_bytes // group.size
        self._sizes = [parameter.numel() for parameter in self._cuts]
        self._counts = [(module, name, getattr(module, name)) for module, name in layout.counts]
        self.begun = self._joined = False

    def split(self) -> None:
        """Keep this rank's share of every layer. Talks to nobody; `join` takes back also what was done in part."""
        self.begun = True
        # Parameters stay the objects they are, so ties and the user's references hold; only their data is exchanged.
        with torch.inference_mode(False):
            for parameter, (dim, parts) in self._cuts.items():
                parameter.data = _share_of(parameter.data, dim, parts, self._group)
        for layer in self.layout.layers:
            become_share(layer.module, layer.role, self._group)
        for module, name, whole in self._counts:
            setattr(module, name, whole // self._group.size)

    def join(self, way_out: str) -> None:
        """Make every layer whole again, once. A collective operation; some may be whole already on some ranks.

        Args:
            way_out: for where it cannot be done, as the end of a sentence.
        """
        if self._joined:
            return
        held = {each for layer in self.layout.layers for each in layer.module.parameters(recurse=False)}
        # The user's is what they have put in a parameter's place; with other values it is still ours.
        states = [
            {size: "whole", size // self._group.size: "share"}.get(each.numel(), "theirs") if each in held else "theirs"
            for each, size in zip(self._cuts, self._sizes, strict=True)
        ]
        everywhere, mixed = zip(*self._group.all_gather_objects(states), strict=True), False
        with torch.inference_mode(False):
            for (parameter, cut), state, found in zip(self._cuts.items(), states, everywhere, strict=True):
                mixed |= {"share", "theirs"} <= set(found)
                if "share" in found and "theirs" not in found:
                    share = parameter.data if state == "share" else _share_of(parameter.data, *cut, self._group)
                    whole = _whole_of(share, *cut, self._group)
                    if state == "share":
                        parameter.data = whole
        for layer in self.layout.layers:
            become_whole(layer.module)
        for module, name, whole in self._counts:
            if getattr(module, name) == whole // self._group.size:
                setattr(module, name, whole)
        if mixed:
            raise PipeboostError(
                f"a weight of {self.layout.model} was replaced on some ranks and not on others, so it cannot be joined "
                f"there; {way_out}"
            )
        self._joined = True


_shares: weakref.WeakKeyDictionary[nn.Module, Shares] = weakref.WeakKeyDictionary()


def shard_weights(
    model: nn.Module,
    sharding: TensorSharding,
    group: Group,
    ledger: Ledger,
    *,
    ready: Callable[[], None] = lambda: None,
    reporting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Shares:
    """Keep this rank's share of a model's weights and free the rest; the model computes the same with the others.

    Every rank of the group calls it, with the same weights, at the same point of its program, and so it undoes it:
    the inverse gathers the shares on every rank, and waits for the ranks that have not come to it yet. What the
    user put in a parameter's place meanwhile stays. Outside a call with the feature `"parallel"` the model raises, and
    so it does where it is saved, copied or given a LoRA.

    Args:
        model: a transformer or a text encoder; pipelines that share it share the change, if they share the group.
        sharding: of its family, or `families.text_encoder_sharding(model)`.
        group: the ranks of the mesh axis `tensor`.
        ledger: takes the inverse.
        ready: called when this rank has found nothing against it, before it talks to the others; may raise.
        reporting: around what may fail on one rank from then on, Ctrl-C included: the others learn of it before
            anything is taken back, which takes all of them.

    Raises:
        ConfigurationError: the size of the group does not divide the heads or a width.
        UnsupportedError: the model has none of the layers, or they are quantised, offloaded, fused or have a LoRA; the
            ranks have different weights; the model is shared with a pipeline that splits it otherwise.
    """
    # The ledger of a shared change must not keep its model alive.
    reference = weakref.ref(model)

    def apply(inner: Ledger) -> None:
        layout = layout_of(model, sharding)
        layout.check(group.size)
        ready()
        shares, guards = Shares(model, layout, group), Ledger()

        def join() -> None:
            joined = reference()
            try:
                with _without_interrupts():
                    shares.join(_reload(joined))
            except (RuntimeError, RankFailedError) as error:
                if shares.begun:  # the guards stay, so that the model goes on to raise
                    raise PipeboostError(
                        f"the weights of {layout.model} cannot be joined, because their ranks no longer talk to each "
                        f"other; {_reload(joined)}"
                    ) from error
            guards.undo()
            if joined is not None:
                _shares.pop(joined, None)

        with reporting():
            # No rank begins to split before all have this.
            inner.record(f"weights of {layout.model} split over {group.size} ranks", join)
            _refuse_different_weights(model, group)
            guard_model(model, group, guards)
            _shares[model] = shares
            shares.split()

    taken = "that has split its weights over a mesh of its own; accelerate one of the two"
    ledger.share(model, "tensor parallel", (group.size, group.name), apply, explain=lambda _: taken)
    return _shares[model]


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Inside, Ctrl-C waits: a rank that left in the middle would leave the others waiting for it, out of step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def split_of(model: nn.Module, sharding: TensorSharding) -> Split:
    """Return what tensor parallelism splits of a model, split or whole.

    Raises:
        UnsupportedError: its weights cannot be split at all.
    """
    shares = _shares.get(model)
    layout = layout_of(model, sharding) if shares is None else shares.layout
    return Split(layout.bytes if shares is None else shares.whole_bytes, layout.degrees)


def shares_of(model: nn.Module) -> Shares | None:
    """Return this rank's shares of a model's weights; None where they are whole."""
    return _shares.get(model)


def _reload(model: Any) -> str:
    """Say how to have the whole weights again, as the end of a sentence."""
    config = getattr(model, "config", None)
    folder = str(getattr(config, "_name_or_path", None) or "")
    if not folder or not Path(folder).is_dir():
        return "load the model again"
    loading = f"{stock_class(model).__name__}.from_pretrained({folder!r}, torch_dtype={model.dtype})"
    return f"load the model again, from where it was loaded: {loading}"


def _share_of(whole: torch.Tensor, dim: int, parts: tuple[int, ...], group: Group) -> torch.Tensor:
    shares = [part.chunk(group.size, dim)[group.rank] for part in whole.split(parts, dim)]
    # A copy always, or the whole would stay in memory behind its view.
    return torch.cat(shares, dim) if len(shares) > 1 else shares[0].clone(memory_format=torch.contiguous_format)


def _whole_of(share: torch.Tensor, dim: int, parts: tuple[int, ...], group: Group) -> torch.Tensor:
    """Return the parameter whose shares the ranks have, on the device where this rank has its own."""
    there = share if share.device.type == group.device else share.to(group.device)
    width = share.shape[dim]
    gathered = group.all_gather(there, dim, [width] * group.size).split(width, dim)
    of_rank = [each.split([part // group.size for part in parts], dim) for each in gathered]
    ordered = [pieces[part] for part in range(len(parts)) for pieces in of_rank]
    return torch.cat(ordered, dim).to(share.device)


def _refuse_different_weights(model: nn.Module, group: Group) -> None:
    """Refuse ranks that have built a model from different random seeds: they would join shares of different models."""
    plain = ((name, each) for name, each in model.named_parameters() if type(each.data) is torch.Tensor)
    named = {name: each for name, each in plain if can_be_sampled(each)}
    sums = Sample(list(named.values()), _spread).sums()
    own = {name: (each.shape, each.dtype, total) for (name, each), total in zip(named.items(), sums, strict=True)}
    everyone = group.all_gather_objects(own)
    names = dict.fromkeys(name for each in everyone for name in each)
    different = next((name for name in names if len({each.get(name) for each in everyone}) > 1), None)
    if different is not None:
        raise UnsupportedError(
            f"the ranks have different weights of {stock_class(model).__name__} ({different}); load the same "
            "checkpoint on every rank, or set the same seed before building the model"
        )


def _spread(shape: torch.Size) -> tuple[int, int]:
    return min(shape.numel(), _SAMPLES), max((shape.numel() - 1) // (_SAMPLES - 1), 1)


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
