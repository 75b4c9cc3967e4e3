"""`reuse_prompts`: one layer on a pipeline's `encode_prompt`, which gives back what the same call returned before.

Bit-identical to stock, because whatever the result could depend on is in the key: the arguments, the encoders' and
tokenizers' state, the attributes that the method reads, torch's numerical settings. A call is only remembered if it
left all of that as it was, drew no random number, and returned nothing but tensors and plain values.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch

from pipeboost.contract.call import Call, Slot, current_call
from pipeboost.core.config import ReuseConfig
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import stock_class
from pipeboost.features.reuse.key import METHOD, Key, Keys, names_in
from pipeboost.features.reuse.store import Entry, Store, Uncacheable

PROMPTS = Slot[dict[str, int]](lambda: {"hits": 0, "misses": 0, "passed": 0})


class PromptReuse:
    """The embeddings that one acceleration keeps, and the layer that keeps them.

    Args:
        settings: how much it may keep.
        owner: the acceleration; in the calls of others the layer is quiet. It is not kept alive.
        denoisers: attributes of the pipeline that hold its transformers: `encode_prompt` asks them for their dtype and
            configuration only, so that their weights do not count.
    """

    def __init__(self, settings: ReuseConfig, *, owner: object, denoisers: tuple[str, ...]) -> None:
        self.store = Store(settings.max_bytes)
        self._owner = weakref.ref(owner)
        self._keys = Keys(denoisers)

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptReuse:
        return self

    def clear(self) -> None:
        """Free all memory."""
        self.store.clear()
        self._keys.clear()

    def __call__(self, call_next: Callable[..., Any], pipe: Any, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        # Where gradients are on, the caller may want the graph that a copy does not have.
        ours = call is not None and call.owner is self._owner() and call.has("reuse") and not torch.is_grad_enabled()
        if call is None or not ours:
            return call_next(*args, **kwargs)
        counts = call[PROMPTS]
        key = self._keys.of(call, pipe, args, kwargs)
        if key is None:
            counts["passed"] += 1
            return call_next(*args, **kwargs)
        entry = self.store.get(key.digest)
        if entry is not None:
            counts["hits"] += 1
            return entry.repeat(pipe)
        counts["misses"] += 1
        return self._encode(call, pipe, key, call_next, args, kwargs)

    def _encode(
        self,
        call: Call,
        pipe: Any,
        key: Key,
        call_next: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        written = names_in(stock_class(pipe)).written
        before, random = _others(pipe, written), _random_state(call.device)
        returned = call_next(*args, **kwargs)
        after = _others(pipe, written)
        untouched = before.keys() == after.keys() and all(before[name] is after[name] for name in after)
        drawn = _random_state(call.device) != random
        if untouched and not drawn and self._keys.is_as_it_was(call, pipe, key, args, kwargs):
            with contextlib.suppress(Uncacheable):
                left = {name: value for name, value in vars(pipe).items() if name in written}
                self.store.put(key.digest, Entry.of(returned, left))
        return returned


def reuse_prompts(pipe: Any, prompts: PromptReuse, ledger: Ledger) -> None:
    """Look up what `pipe.encode_prompt` is asked, in calls of the acceleration that `prompts` belongs to.

    A pipeline and its shallow copies take the same `prompts`, and share what it keeps. What it did in a call can be
    read from `call[PROMPTS]`: `hits`, `misses`, and how many were `passed` on to stock because they could not be
    kept (given as embeddings, say, or encoded in training mode).

    Raises:
        AttributeError: the pipeline has no `encode_prompt`.
    """
    ledger.add_middleware(pipe, METHOD, prompts, place="pipe.reuse")


def _others(pipe: Any, written: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in vars(pipe).items() if name not in written}


def _random_state(device: torch.device) -> tuple[bytes, ...]:
    """The states of the generators that an encoder could draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return tuple(state.numpy().tobytes() for state in states)
