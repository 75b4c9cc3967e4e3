"""A sample of the content of weights, taken with few kernels and one copy a device, however many weights there are.

Of a weight it holds an element in each column, of an embedding one in each row too: textual inversion sets rows.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

MOST_SAMPLES = 2**18
"""Elements of one weight that are looked at, about: one in each row even of the largest vocabularies."""

_FEWEST_SAMPLES = 2**8
# Torch copies more than this with several CPU threads, and waking those can take longer than all else here.
_UNTHREADED = 2**14

Group = tuple[torch.device, torch.dtype]


class Samples:
    """Takes in tensors one by one, then gives the bytes of all samples, in the order the tensors came."""

    def __init__(self) -> None:
        self._groups: dict[Group, list[torch.Tensor]] = {}
        self._runs: list[tuple[Group, int]] = []

    def add(self, tensor: torch.Tensor, *, by_row: bool) -> None:
        """Take in a strided tensor."""
        sample = sample_of(tensor, by_row=by_row)
        count, group = sample.numel(), (tensor.device, tensor.dtype)
        if self._runs and self._runs[-1][0] == group:
            self._runs[-1] = (group, self._runs[-1][1] + count)
        else:
            self._runs.append((group, count))
            self._groups.setdefault(group, [])
        samples = self._groups[group]
        if count > _UNTHREADED:
            samples.extend(sample.split(_UNTHREADED))
        else:
            samples.append(sample)

    def update(self, result: Any) -> None:
        """Give the bytes to a hash of `hashlib`; waits for the devices."""
        with torch.no_grad():
            fetched = {
                group: torch.cat(samples).cpu().view(torch.uint8).numpy() for group, samples in self._groups.items()
            }
        # The order in which they came, so that it does not matter which of them an offloader has moved.
        starts = dict.fromkeys(fetched, 0)
        for group, count in self._runs:
            size = count * group[1].itemsize
            result.update(fetched[group][starts[group] : starts[group] + size])
            starts[group] += size


def sample_of(tensor: torch.Tensor, *, by_row: bool) -> torch.Tensor:
    """Some elements of a tensor, at least one of each column, and with `by_row` of each row; all of a small one."""
    count, stride = _spread(tensor.shape, by_row)
    if tensor.is_contiguous():
        return tensor.as_strided((count,), (stride,))
    return tensor.detach().reshape(-1)[::stride]


@functools.lru_cache(maxsize=4096)
def _spread(shape: torch.Size, by_row: bool) -> tuple[int, int]:
    """How many elements are taken, and every which one."""
    elements = shape.numel()
    columns = shape[-1] if shape else 1
    wanted = max(_FEWEST_SAMPLES, columns, shape[0] if by_row else 0)
    stride = max(elements // min(wanted, MOST_SAMPLES), 1)
    # One column after the other: a stride that shares a factor with the row's length would skip some for ever.
    while math.gcd(stride, columns) > 1:
        stride -= 1
    return -(-elements // stride), stride
