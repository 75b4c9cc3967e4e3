"""`Sample`: some values of many tensors as one number each, taken with few kernels and one copy a device.

It shows writes through `.data`, such as those of peft's fuse, which change neither identity nor version of a tensor.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pipeboost.core.fingerprint import place_weights

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MOST = 2**18
"""Values of one tensor, about: one in each row even of the largest vocabularies."""
_FEWEST = 2**8
_DENSE = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


class Sample:
    """Tensors, held weakly, of which the same values are looked at wherever each of them lies at the time.

    Args:
        tensors: those for which `can_be_sampled`.
        spread: of a shape, how many values are taken, and every which one.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], spread: Callable[[torch.Size], tuple[int, int]]) -> None:
        self._tensors = [weakref.ref(each) for each in tensors]
        self._dense = list(map(_is_dense, tensors))
        spreads = [spread(each.shape) for each in tensors]
        self._sizes = [(count,) for count, _ in spreads]
        self._strides = [(stride,) for _, stride in spreads]
        self._lie: list[Any] = []
        self._groups: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []
        self._found = self.sums()

    def written(self) -> list[int]:
        """Return the `id` of each tensor of which some values are not what they were; one that is gone is none."""
        try:
            sums = self.sums()
        except RuntimeError:  # the memory of one has become smaller
            return [id(each()) for each in self._tensors]
        pairs = zip(self._tensors, sums, self._found, strict=True)
        return [id(each()) for each, now, before in pairs if now not in (None, before)]

    @torch.no_grad()
    def sums(self) -> list[int | None]:
        """Return the weighted sum of each tensor's values; None for one that is gone.

        Raises:
            RuntimeError: the memory of one has become smaller.
        """
        tensors = [each() for each in self._tensors]
        lie = [None if each is None else (each.device, each.dtype) for each in tensors]
        if lie != self._lie:
            self._lie, self._groups = lie, self._grouped(lie)
        result: list[int | None] = [None] * len(tensors)
        with torch._C.DisableTorchFunctionSubclass():
            views = [
                None if each is None else (each if dense else each.contiguous()).as_strided(size, stride)
                for each, dense, size, stride in zip(tensors, self._dense, self._sizes, self._strides, strict=True)
            ]
            for places, owners, weights in self._groups:
                values = torch.cat([view for place in places if (view := views[place]) is not None])
                terms = values.view(_WORDS[values.itemsize]) * weights
                sums = terms.new_zeros(len(places)).index_add_(0, owners, terms).tolist()
                for place, value in zip(places, sums, strict=True):
                    result[place] = value
        return result

    def _grouped(self, lie: list[Any]) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Return what one copy takes: which tensors, and for each of their values whose it is and its weight."""
        groups: dict[Any, list[int]] = {}
        for place, kind in enumerate(lie):
            if kind is not None:
                groups.setdefault(kind, []).append(place)
        result = []
        for (device, _), places in groups.items():
            sizes = torch.tensor([self._sizes[place] for place in places], device=device).flatten()
            owners = torch.arange(len(places), device=device).repeat_interleave(sizes)
            numbers = torch.arange(len(owners), device=device) - (sizes.cumsum(0) - sizes)[owners]
            result.append((places, owners, place_weights(numbers)))
        return result


@functools.lru_cache(maxsize=4096)
def every_row_and_column(shape: torch.Size) -> tuple[int, int]:
    """Return how many elements are taken, and every which one: one at least of each row and column, all of a few."""
    elements = shape.numel()
    columns = shape[-1] if shape else 1
    wanted = max(_FEWEST, columns, shape[0] if shape else 1)
    stride = max(elements // min(wanted, _MOST), 1)
    # One column after the other: a stride that shares a factor with the row's length would skip some for ever.
    while math.gcd(stride, columns) > 1:
        stride -= 1
    return -(-elements // stride), stride


def can_be_sampled(tensor: torch.Tensor) -> bool:
    """Whether a tensor has values, and memory in which they can be looked at."""
    strided = tensor.layout is torch.strided and tensor.device.type != "meta" and tensor.numel() > 0
    return strided and tensor.dtype.itemsize in _WORDS and not is_traceable_wrapper_subclass(tensor)


def _is_dense(tensor: torch.Tensor) -> bool:
    forms = [form for form in _DENSE if form is torch.contiguous_format or tensor.ndim == 4 + (form is _DENSE[2])]
    return any(tensor.is_contiguous(memory_format=form) for form in forms)
