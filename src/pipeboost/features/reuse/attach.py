"""`PromptReuse`: middleware on a pipeline's `encode_prompt`, which gives back what the same call returned before.

Bit-identical to stock, because whatever the result could depend on is in the key: the arguments, the encoders' and
tokenizers' state, the pipeline's attributes, torch's numerical settings. A call is only remembered if it left all of
that as it was, drew no random number, and returned nothing but tensors and plain values.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch

from pipeboost.contract.call import Slot, current_call
from pipeboost.core.config import ReuseConfig
from pipeboost.core.fingerprint import identity
from pipeboost.features.reuse.key import Keys
from pipeboost.features.reuse.store import Entry, Store, Uncacheable

PROMPTS = Slot[dict[str, int]](lambda: {"hits": 0, "misses": 0, "passed": 0})


class PromptReuse:
    """The embeddings that one acceleration keeps, shared by its pipeline and the pipeline's shallow copies.

    What it did in a call can be read from `call[PROMPTS]`: `hits`, `misses`, and how many were `passed` on to
    stock because they could not be kept (given as embeddings, say, or encoded in training mode).

    Args:
        settings: how much it may keep.
        owner: the acceleration; in the calls of others nothing is reused. It is not kept alive.
        denoisers: attributes of the pipeline that hold its transformers.
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
        entry = self.store.get(key)
        if entry is not None:
            counts["hits"] += 1
            return entry.repeat(pipe)
        counts["misses"] += 1
        before, random = dict(vars(pipe)), _random_state()
        returned = call_next(*args, **kwargs)
        # Where it is given a scale for LoRAs, it leaves it on the pipeline.
        scale = kwargs.get("lora_scale")
        left = {name: value for name, value in vars(pipe).items() if name == "_lora_scale" and value is scale}
        ids, now = ({name: id(value) for name, value in each.items()} for each in (before | left, vars(pipe)))
        if ids == now and _random_state() == random and self._keys.of(call, pipe, args, kwargs) == key:
            with contextlib.suppress(Uncacheable):
                self.store.put(key, Entry.of(returned, left))
        return returned


def _random_state() -> Hashable:
    """Return the states of the generators that an encoder could draw from."""
    return identity((torch.default_generator, *torch.cuda.default_generators))
