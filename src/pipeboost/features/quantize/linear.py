"""`Float8Linear`: a linear whose weight has 8 bits, and its activations too where there are many of them.

Each row of the weight and each row of the activations has a scale of its own, its largest value over the largest that
float8_e4m3fn has (448), so that an outlier costs the precision of one row alone. The product comes from
`torch._scaled_mm`. A few rows, as modulations get them (one for each sample), are bound by reading the weight: these
stay as they are and only the weight has 8 bits.

It is written so that torch.compile makes one kernel of the quantisation and what computed the activations, and no
kernel of its own of a weight that is read for a few rows. Nothing in it differs between blocks but tensors.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pipeboost.core.errors import UnsupportedError
from pipeboost.kernels.float8 import quantise_rows, to_float8

MULTIPLE = 16
"""What both widths of a linear have to be multiples of, for the tensor cores."""
FEW_ROWS = 64
"""Two-dimensional activations of at most so many rows keep their precision."""

_ROWS_READ_TOGETHER = 4
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


class Float8Linear(nn.Module):
    """A linear in 8 bits, in the place of another one whose bias and hooks it shares.

    Its weight and scale are buffers: whatever asks a model for the dtype of its parameters gets that of the others.
    Deep copies and pickles of it are plain linears with the weight as it was.

    Args:
        linear: the one it stands for; it is not changed.
        device: where to quantise, if that is not where the weight lies.
        reversible: whether the linear is kept.

    Attributes:
        weight: `(out_features, in_features)`, float8_e4m3fn.
        weight_scale: `(out_features, 1)`, float32.
        bias: the parameter of the linear.
        dtype: of the weight as it was.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, *, device: torch.device | None = None, reversible: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        own = linear.weight.device
        with torch.no_grad():
            weight, scale = to_float8(linear.weight.detach().to(device or own))
        self.register_buffer("weight", weight.to(own))
        self.register_buffer("weight_scale", scale.to(own))
        self.register_parameter("bias", linear.bias)
        self.training = linear.training
        self._pipeboost_original = (linear,) if reversible else ()
        for name in _HOOKS:  # so that handles of hooks go on to work, whichever of the two they were given by
            setattr(self, name, getattr(linear, name))

    @property
    def original(self) -> nn.Linear | None:
        """The linear it stands for; None where that was not kept."""
        return next(iter(self._pipeboost_original), None)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return `features @ weight.T + bias` for features `(..., in_features)`, in their dtype."""
        if features.ndim < 3 and features.numel() <= FEW_ROWS * self.in_features:
            return self._of_few_rows(features)
        rows = features.reshape(-1, self.in_features)
        if not len(rows):  # as where another rank has all of a short text
            return features.new_empty((*features.shape[:-1], self.out_features))
        quantised, scale = quantise_rows([rows], [False])
        # The kernels for a scale a row have bfloat16 alone for what they return on a GPU.
        dtype = torch.bfloat16 if features.is_cuda or features.dtype is torch.float16 else features.dtype
        bias = self.bias if self.bias is not None and self.bias.dtype is dtype else None
        product = torch._scaled_mm(
            quantised,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.weight_scale.t(),
            bias=bias,
            out_dtype=dtype,
            use_fast_accum=True,
        ).to(features.dtype)
        if self.bias is not None and bias is None:
            product = product + self.bias
        return product.view(*features.shape[:-1], self.out_features)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight in another dtype, as near to the original as 8 bits are."""
        return (self.weight.float() * self.weight_scale).to(dtype)

    def whole(self) -> nn.Linear:
        """Return a plain linear with the original weight, where this one's lies.

        Raises:
            UnsupportedError: the original was not kept.
        """
        if self.original is None:
            raise UnsupportedError(
                "the weights were quantised with QuantizeConfig(reversible=False), which keeps no others, so the model "
                "cannot be copied or pickled; load it again"
            )
        return _linear_with(self, self.original.weight.detach().to(self.weight.device), self.original)

    def extra_repr(self) -> str:
        """Say what `nn.Linear` says."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _of_few_rows(self, features: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() and features.ndim == 2 and features.shape[0] <= _ROWS_READ_TOGETHER:
            # As a reduction it is one kernel, which reads the weight as it lies. What made the features is not to be
            # computed again for each row of the weight, and a strided view is of memory.
            rows = features.contiguous()
            rows = rows.as_strided(rows.shape, rows.stride())
            product = (rows[:, None, :].float() * self.weight.float()).sum(-1) * self.weight_scale.view(-1)
            return (product if self.bias is None else product + self.bias).to(features.dtype)
        return F.linear(features, self.dequantised(features.dtype), self.bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Float8Linear:
        """Move the weight where the others are moved, but leave its dtype and that of its scale."""
        buffers = dict(self._buffers)
        self._buffers.clear()
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(buffers)
        for name, buffer in buffers.items():
            assert buffer is not None
            self._buffers[name] = fn(buffer.view(torch.uint8)).view(buffer.dtype)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        whole: Any = self.whole()
        _, _, *state = whole.__reduce_ex__(protocol)
        # pickle lets `copyreg.__newobj__` name only the object's own class, so the older reconstructor names another.
        return (copyreg._reconstructor, (nn.Linear, object, None), *state)  # type: ignore[attr-defined]


def dequantised_linear(quantised: Float8Linear) -> nn.Linear:
    """Return a plain linear with the weight that is left of the original in 8 bits."""
    return _linear_with(quantised, quantised.dequantised(quantised.dtype), None)


def _linear_with(quantised: Float8Linear, weight: torch.Tensor, original: nn.Linear | None) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.in_features, linear.out_features = quantised.in_features, quantised.out_features
    requires_grad = original is not None and original.weight.requires_grad
    linear.weight = nn.Parameter(weight, requires_grad=requires_grad)
    linear.register_parameter("bias", quantised.bias)
    linear.training = quantised.training
    for name in _HOOKS:
        setattr(linear, name, getattr(quantised, name))
    return linear
