"""`Strip`, a rank's part of the map that a VAE works on, and `FunctionsOfStrip`: torch's that look beyond a pixel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pipeboost.distributed import Group
from pipeboost.features.parallel.sequence_parallel import sizes


class Strip:
    """How the ranks of a group share a map, all along one dimension, and this rank's place.

    A row is the smallest piece that is shared: one of the latent map, which is several pixels.

    Args:
        group: the ranks.
        dim: -2 where each has some rows of the map, -1 where each has some columns; both are called rows here.
        rows: of all ranks.
        breadth: extent of the latent map along the other dimension.
        device: where the map is.
    """

    def __init__(self, group: Group, *, dim: int, rows: int, breadth: int, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.dim = dim
        self.rows = sizes(rows, group.size)
        self.breadth = breadth

    @property
    def own_rows(self) -> int:
        """How many rows this rank has."""
        return self.rows[self.group.rank]

    @cached_property
    def shares(self) -> Tensor:
        """The part of the map that each rank has, `(ranks,)`, float64."""
        return torch.tensor(self.rows, dtype=torch.float64, device=self.device) / sum(self.rows)

    def extents(self, own: int) -> list[int]:
        """Return how much each rank has of what this one has `own` of: pixels along `dim`, or tokens."""
        scale, rest = divmod(own, self.own_rows)
        assert rest == 0, f"{own} does not consist of {self.own_rows} equal parts"
        return [scale * rows for rows in self.rows]

    def cut(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a map that all ranks have."""
        scale = whole.shape[self.dim] // sum(self.rows)
        start = sum(self.rows[: self.group.rank])
        return whole.narrow(self.dim, scale * start, scale * self.own_rows).contiguous()

    def gather(self, own: Tensor) -> Tensor:
        """Return the whole map, on all ranks."""
        return self.group.all_gather(own, own.ndim + self.dim, self.extents(own.shape[self.dim]))

    def fill_borders(self, padded: Tensor, *, before: int, after: int, above: int, below: int) -> None:
        """Write the nearest pixels of the adjacent strips over this one's padding, which stays at the edges of the map.

        Args:
            padded: this rank's pixels with padding.
            before: pixels of padding before its own along `dim`, of which the last `above` are wanted.
            after: the same behind its own, of which the first `below` are wanted.
        """
        own = padded.shape[self.dim] - before - after
        self.extents(own)
        previous, following = self.group.rank - 1, self.group.rank + 1
        sent, received, borders = [], [], []
        for rank, count, start, wanted, place in (
            (previous, below, before, above, before - above),
            (following, above, before + own - above, below, before + own),
        ):
            if 0 <= rank < self.group.size and count:
                sent.append((padded.narrow(self.dim, start, count).contiguous(), rank))
            if 0 <= rank < self.group.size and wanted:
                borders.append(padded.narrow(self.dim, place, wanted))
                received.append((torch.empty_like(borders[-1], memory_format=torch.contiguous_format), rank))
        self.group.exchange(sent, received).wait()
        for border, (pixels, _) in zip(borders, received, strict=True):
            border.copy_(pixels)


_PIECES = 8


class FunctionsOfStrip(TorchFunctionMode):
    """Inside, this thread's convolutions, group norms and attention compute one strip of the map.

    Convolutions see the border pixels of the ranks on both sides, group norms have the statistics of the whole map,
    and scaled dot product attention has the keys and values of all ranks. `vae.py` says which modules may
    call them, and how.

    Attributes:
        attended: how often scaled dot product attention was called.
    """

    def __init__(self, strip: Strip) -> None:
        super().__init__()
        self.strip = strip
        self.attended = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = _OF_STRIP.get(function)
        return function(*args, **(kwargs or {})) if ours is None else ours(self, *args, **(kwargs or {}))

    def _convolve(
        self,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        strides: tuple[int, ...],
        padding: tuple[int, ...],
        *more: Any,
    ) -> Tensor:
        convolve = F.conv2d if weight.ndim == 4 else F.conv3d
        dim, kernel, stride = self.strip.dim, weight.shape[self.strip.dim], strides[self.strip.dim]
        if kernel == 1:
            return convolve(states, weight, bias, strides, padding, *more)
        own_padding = list(padding)
        if own_padding[dim]:
            before = after = own_padding[dim]
            own_padding[dim] = 0
            states = F.pad(states, (0, 0, before, after) if dim == -2 else (before, after))
        else:
            # The extent without padding is even where the stride is 2.
            before, after = (kernel // 2, kernel // 2) if stride == 1 else (1 - states.shape[dim] % 2, 1)
        # The last output begins `stride` pixels before the end of the strip, less what lies before the first.
        self.strip.fill_borders(states, before=before, after=after, above=before, below=kernel - stride - before)
        return convolve(states, weight, bias, strides, tuple(own_padding), *more)

    def _normalise(
        self, states: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        batch, channels = states.shape[:2]
        dtype = torch.promote_types(states.dtype, torch.float32)
        values = states.reshape(batch, num_groups, -1)
        # A few groups at a time, so that no copy of the whole in float32 is needed.
        pieces = values.split(values.shape[1] if states.dtype == dtype else -(-values.shape[1] // _PIECES), dim=1)
        variances_means = [torch.var_mean(piece.to(dtype), dim=-1, correction=0) for piece in pieces]
        variance, mean = (torch.cat(parts, dim=1) for parts in zip(*variances_means, strict=True))
        # Means and variances of the ranks merge without cancellation (Chan, Golub and LeVeque, 1979).
        own = torch.stack([mean, variance])[None]
        means, variances = self.strip.group.all_gather(own, 0, [1] * self.strip.group.size).double().unbind(1)
        shares = self.strip.shares[:, None, None]
        total_mean = (shares * means).sum(0)
        total_variance = (shares * (variances + (means - total_mean).square())).sum(0)
        # A batch norm with given statistics does the rest in one kernel, each sample's channels being channels of one.
        spread = channels // num_groups
        result = F.batch_norm(
            states.reshape(1, batch * channels, *states.shape[2:]),
            total_mean.to(dtype).repeat_interleave(spread),
            total_variance.to(dtype).repeat_interleave(spread),
            None if weight is None else weight.to(dtype).repeat(batch),
            None if bias is None else bias.to(dtype).repeat(batch),
            eps=eps,
        )
        return result.view(states.shape)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        self.attended += 1
        tokens = self.strip.extents(key.shape[-2])
        if attn_mask is not None:
            attn_mask = self._mask_of_all(attn_mask, tokens)
        both = self.strip.group.all_gather(torch.cat([key, value], dim=-1), key.ndim - 2, tokens)
        key, value = both.split([key.shape[-1], value.shape[-1]], dim=-1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)

    def _mask_of_all(self, mask: Tensor, tokens: list[int]) -> Tensor:
        """A mask over own keys as one over all: each frame's column, as often as a rank has pixels in a frame."""
        pixels = [rows * self.strip.breadth for rows in self.strip.rows]
        frames = [count // pixel for count, pixel in zip(tokens, pixels, strict=True)]
        of_frames = mask[..., :: pixels[self.strip.group.rank]]
        assert of_frames.shape[-1] == frames[0], "masked attention is over the latent map"
        return torch.cat([of_frames.repeat_interleave(pixel, dim=-1) for pixel in pixels], dim=-1)


_OF_STRIP: dict[Any, Callable[..., Tensor]] = {
    F.conv2d: FunctionsOfStrip._convolve,
    F.conv3d: FunctionsOfStrip._convolve,
    F.group_norm: FunctionsOfStrip._normalise,
    F.scaled_dot_product_attention: FunctionsOfStrip._attend,
}
