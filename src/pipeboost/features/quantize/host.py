"""Host memory for weights that wait: pinned, cut from pieces of a power of two, to which torch rounds each up."""

from __future__ import annotations

import torch

from pipeboost.core.errors import UnsupportedError

CHUNK = 512 * 2**20
_ALIGNMENT = 512


class HostMemory:
    """Copies of tensors on the host. A piece of memory is given back once no copy in it is left.

    Attributes:
        nbytes: how much was taken in all.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._rest = torch.empty(0, dtype=torch.uint8)

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy of a tensor on a GPU.

        Raises:
            UnsupportedError: the host cannot pin the memory.
        """
        size = -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if size > self._rest.numel():
            try:
                self._rest = torch.empty(max(CHUNK, size), dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                raise UnsupportedError(
                    f"the host cannot pin {(self.nbytes + size) / 2**30:.1f} GiB for the weights as they were "
                    f"({error}); use QuantizeConfig(reversible=False), which keeps none, or quantize=None"
                ) from error
        memory, self._rest = self._rest[: tensor.nbytes], self._rest[size:]
        self.nbytes += size
        copy = memory.view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)
