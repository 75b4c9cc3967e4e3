"""The norms of queries or keys, their rotary embedding and the joining of text and image, in one pass over memory.

A norm is `torch.rms_norm` or written out, `x * rsqrt(mean(x ** 2) + eps) * weight`, over a head or all heads. Pairs of
neighbouring numbers are rotated in one of three ways of writing it: `x * cos + turned * sin`, as complex numbers, or by
filling the even and the odd numbers of an empty tensor.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any, NamedTuple

import torch
from torch import fx

from pipeboost.features.compile.rewrites.nodes import (
    erase_unused,
    operands,
    replace,
    suits_our_kernels,
    tensor_of,
    without_casts,
)
from pipeboost.kernels import norms  # noqa: F401 - declares the operator

_HEAD_DIMS = (16, 32, 64, 128, 256)
_WHOLE = slice(None, None, None)


class _Rotation(NamedTuple):
    """Of a tensor, by tables of cosines and sines, or by complex numbers; `writes` fill what it returns."""

    x: Any
    cos: fx.Node | None
    sin: fx.Node | None
    complex: fx.Node | None = None
    writes: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class _Part:
    """Tokens with a norm: `x[index]`, and their rotation if they have one, which may be of all parts `jointly`."""

    x: fx.Node
    weight: fx.Node
    eps: float
    across_heads: bool
    index: Any = None
    rotation: _Rotation | None = None
    jointly: bool = False


def fuse_norms_and_rotations(graph: fx.Graph) -> int:
    """Rewrite a graph; return how many tensors of queries or keys became the output of one kernel."""
    count = 0
    for node in reversed(list(graph.nodes)):
        value = None if node._erased else tensor_of(node)
        if value is None or value.dim() != 4 or not suits_our_kernels(value):
            continue
        if not isinstance(value.shape[-1], int) or value.shape[-1] not in _HEAD_DIMS:
            continue
        parts = _parts(node)
        rotations = [part.rotation for part in parts if part.rotation is not None]
        alike = len({part.across_heads for part in parts}) == 1
        fits = all(map(_fits, rotations)) and all(_is_of_heads(part, value) for part in parts)
        if not rotations or not alike or not fits:
            continue
        # An empty tensor has its numbers only once they were written.
        writes = [write for each in rotations for write in each.writes]
        with graph.inserting_before(max(writes).next if node.target is torch.empty_like else node):
            heads = [_heads(graph, part, int(value.shape[-1])) for part in parts]
            tables = [_tables(graph, parts[: place + 1], heads[: place + 1]) for place in range(len(parts))]
            weights, eps = [part.weight for part in parts], [part.eps for part in parts]
            arguments: Any = (heads, weights, *map(list, zip(*tables, strict=True)), eps, parts[0].across_heads)
            result = graph.call_function(torch.ops.pipeboost.norm_rotary.default, arguments)
        replace(node, result, users=lambda user, writes=writes: user not in writes)  # type: ignore[misc]
        erase_unused(graph, [write for write in writes if write.args[0].users.keys() <= set(writes)])  # type: ignore[union-attr]
        count += 1
    return count


def _parts(node: Any) -> list[_Part]:
    """What a tensor of heads consists of, along its tokens; empty where it is something else."""
    node = without_casts(node)
    if not isinstance(node, fx.Node):
        return []
    if node.target is torch.cat and (node.kwargs.get("dim", 0) == 1 or node.args[1:] == (1,)):
        joined = [_parts(each) for each in node.args[0]]  # type: ignore[union-attr]
        return [part for parts in joined for part in parts] if all(joined) else []
    rotation = _by_tables(node) or _by_complex_numbers(node) or _by_writing(node)
    if rotation is not None:
        if _shape(rotation.x) != _shape(node):
            return []
        inner = _parts(rotation.x)
        free = all(part.rotation is None for part in inner) and (len(inner) == 1 or rotation.complex is None)
        return [changed(part, rotation=rotation, jointly=len(inner) > 1) for part in inner] if free else []
    if node.target is operator.getitem and _is_of_tokens(node.args[1]):
        inner = _parts(node.args[0])
        free = len(inner) == 1 and inner[0].index is None and inner[0].rotation is None
        return [changed(inner[0], index=node.args[1])] if free else []
    found = _norm(node)
    return [] if found is None else [found]


def _is_of_tokens(index: Any) -> bool:
    """Whether an index takes a slice of the tokens, and all else."""
    slices = isinstance(index, tuple) and all(isinstance(each, slice) for each in index)
    return slices and all(each == _WHOLE for place, each in enumerate(index) if place != 1)


def _norm(node: fx.Node) -> _Part | None:
    if node.target == "unflatten" and node.args[1:2] in ((2,), (-1,)):
        whole = without_casts(node.args[0])
        found = _rms_norm(whole)
        return None if found is None or tensor_of(whole) is None else _Part(*found, across_heads=True)
    found = _rms_norm(node) or _written_out(node)
    return None if found is None else _Part(*found, across_heads=False)


def _rms_norm(node: Any) -> tuple[Any, fx.Node, float] | None:
    """Input, weight and eps of an RMS norm over the last dimension."""
    value = tensor_of(node)
    if value is None or node.target is not torch.rms_norm or len(node.args) != 4:
        return None
    x, shape, weight, eps = node.args
    return (x, weight, eps) if weight is not None and _is_number(eps) and tuple(shape) == (value.shape[-1],) else None


def _written_out(node: fx.Node) -> tuple[Any, fx.Node, float] | None:
    """The same of one that is written out, as in Diffusers' `RMSNorm`."""
    shape = _shape(node) or ()
    weight, normed = operands(node, operator.mul, lambda each: _shape(each) == shape[-1:])
    factor, x = operands(without_casts(normed), operator.mul, lambda each: _target(each) is torch.rsqrt)
    if factor is None:
        return None
    mean, eps = operands(factor.args[0], operator.add, lambda each: _target(each) == "mean")
    square = None if mean is None else mean.args[0]
    if square is None or mean.args[1:] != (-1,) or mean.kwargs.get("keepdim") is not True or not _is_number(eps):
        return None
    if _target(square) != "pow" or square.args[1:] != (2,):
        return None
    return (x, weight, float(eps)) if without_casts(square.args[0]) is without_casts(x) else None


def _by_tables(node: fx.Node) -> _Rotation | None:
    """`x * cos + turned * sin`, where `turned` has the pairs `(-odd, even)`."""
    if node.target is not operator.add:
        return None
    for plain, other in (node.args, reversed(node.args)):
        turned, sin = operands(other, operator.mul, lambda each: _turned(each) is not None)
        source = _turned(turned)
        if source is not None:
            x, cos = operands(plain, operator.mul, lambda each: without_casts(each) is source)  # noqa: B023
            return None if x is None else _Rotation(source, cos, sin)
    return None


def _turned(node: Any) -> Any:
    """The tensor of which these are the pairs, turned by a right angle."""
    stack = _argument(without_casts(node), "flatten")
    if _target(stack) is not torch.stack or len(stack.args[0]) != 2 or stack.kwargs.get("dim") != -1:
        return None
    odd, even = stack.args[0]
    odd = odd.args[0] if _target(odd) is operator.neg else None
    pairs = [_half(each) for each in (even, odd)]
    return without_casts(pairs[0][0]) if None not in pairs and pairs[0][0] is pairs[1][0] and pairs[0][1] == 0 else None  # type: ignore[index]


def _half(node: Any) -> tuple[Any, int] | None:
    """The tensor whose even (0) or odd (1) numbers these are."""
    if _target(node) is not operator.getitem or _target(node.args[0]) != "unbind" or node.args[0].args[1:] != (-1,):
        return None
    pairs = node.args[0].args[0]
    shape = _shape(pairs)
    if _target(pairs) not in ("reshape", "unflatten") or shape is None or shape[-1] != 2:
        return None
    return pairs.args[0], node.args[1]


def _by_complex_numbers(node: fx.Node) -> _Rotation | None:
    """`view_as_real(view_as_complex(x) * frequencies)`."""
    product = _argument(_argument(node, "flatten"), torch.view_as_real)
    numbers, frequencies = operands(product, operator.mul, lambda each: _target(each) is torch.view_as_complex)
    pairs: Any = None if numbers is None else numbers.args[0]
    table = tensor_of(frequencies)
    if _target(pairs) != "reshape" or table is None or not table.is_complex() or table.is_conj():
        return None
    return _Rotation(without_casts(pairs.args[0]), None, None, complex=frequencies)


def _by_writing(node: fx.Node) -> _Rotation | None:
    """An empty tensor whose even numbers become `even * cos - odd * sin`, its odd ones `even * sin + odd * cos`."""
    writes = {str(user.args[1]): user for user in node.users if user.target is operator.setitem}
    places = [str((Ellipsis, slice(start, None, 2))) for start in (0, 1)]
    if node.target is not torch.empty_like or sorted(writes) != sorted(places):
        return None
    difference, total = (writes[place].args[2] for place in places)
    if _target(difference) is not operator.sub or _target(total) is not operator.add:
        return None
    products = [_of_half(each) for each in (*difference.args, *total.args)]  # type: ignore[union-attr]
    if None in products:
        return None
    (x, first, cos), *others = products  # type: ignore[misc]
    sin = others[0][2]  # type: ignore[index]
    if first != 0 or others != [(x, 1, sin), (x, 0, sin), (x, 1, cos)]:
        return None
    return _Rotation(without_casts(x), cos, sin, writes=tuple(writes.values()))


def _of_half(node: Any) -> tuple[Any, int, Any] | None:
    """Tensor, half (0: its even numbers) and table, where a node is the product of the last two."""
    half, table = operands(node, operator.mul, lambda each: _half(without_casts(each)) is not None)
    found = _half(without_casts(half))
    return None if found is None else (*found, table)


def _is_of_heads(part: _Part, value: torch.Tensor) -> bool:
    """Whether the norm of a part is of the heads of a value in its precision: all of a token side by side, or each."""
    x = tensor_of(part.x)
    if x is None or x.dtype != value.dtype or x.device != value.device or x.shape[0] != value.shape[0]:
        return False
    if part.across_heads:
        return x.dim() == 3 and x.shape[2] == value.shape[2] * value.shape[3]
    return x.dim() == 4 and x.shape[2:] == value.shape[2:]


def _fits(rotation: _Rotation) -> bool:
    """Whether its tables have a number for each token and each pair, or each number, the same for samples and heads."""
    of = _shape(rotation.x) or ()
    if len(of) != 4:
        return False
    dim = of[3]
    for table in (rotation.complex,) if rotation.complex is not None else (rotation.cos, rotation.sin):
        shape = _shape(table)
        if shape is None or shape[-1] not in ((dim // 2,) if rotation.complex is not None else (dim, dim // 2)):
            return False
        if (*(1,) * (4 - len(shape)), *shape)[:-1] != (1, of[1], 1):
            return False
    return True


def _heads(graph: fx.Graph, part: _Part, dim: int) -> fx.Node:
    value = tensor_of(part.x)
    x = part.x
    if value is not None and value.dim() == 3:
        x = graph.call_method("unflatten", (x, 2, (-1, dim)))
    return x if part.index is None else graph.call_function(operator.getitem, (x, part.index))


def _tables(graph: fx.Graph, parts: list[_Part], heads: list[fx.Node]) -> tuple[Any, Any]:
    """Cosines and sines of the tokens of the last of these parts."""
    part = parts[-1]
    rotation = part.rotation
    if rotation is None:
        return None, None
    if rotation.complex is not None:
        real = graph.call_function(torch.view_as_real, (rotation.complex,))
        return tuple(graph.call_method("select", (real, -1, place)) for place in (0, 1))  # type: ignore[return-value]
    if not part.jointly:
        return rotation.cos, rotation.sin
    begin: Any = 0
    for other, before in zip(parts[:-1], heads[:-1], strict=True):
        if other.rotation is rotation:
            begin = graph.call_function(operator.add, (begin, graph.call_method("size", (before, 1))))
    tokens = graph.call_method("size", (heads[-1], 1))
    return tuple(  # type: ignore[return-value]
        graph.call_method("narrow", (table, _token_dim(table), begin, tokens)) for table in (rotation.cos, rotation.sin)
    )


def _token_dim(table: Any) -> int:
    return len(_shape(table) or ()) - 3


def _argument(node: Any, target: Any) -> Any:
    """The first argument of a call of this; None where a node is something else."""
    return node.args[0] if _target(node) == target else None


def _target(node: Any) -> Any:
    return node.target if isinstance(node, fx.Node) else None


def _shape(node: Any) -> tuple[Any, ...] | None:
    value = tensor_of(node)
    return None if value is None else tuple(value.shape)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
