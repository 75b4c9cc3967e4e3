"""`cat([x[:, :n], x[:, n:]], dim=1)` is `x`: a script that takes text and image apart and joins them copies both."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from pipeboost.features.compile.rewrites.nodes import IN_PLACE, replace, storage_of, tensor_of

_WHOLE = slice(None, None, None)


def drop_cats_of_slices(graph: fx.Graph) -> int:
    """Rewrite a graph; return how many concatenations were what they were cut from."""
    count = 0
    for cat in graph.find_nodes(op="call_function", target=torch.cat):
        parts: Any = cat.args[0]
        dim = cat.kwargs.get("dim", cat.args[1] if len(cat.args) > 1 else 0)
        whole = _cut_from(parts, dim) if isinstance(parts, (list, tuple)) and isinstance(dim, int) else None
        if whole is not None and _shape(whole) == _shape(cat) and not _needs_memory(cat):
            replace(cat, whole)
            count += 1
    return count


def _shape(node: fx.Node) -> torch.Size | None:
    value = tensor_of(node)
    return None if value is None else value.shape


def _needs_memory(cat: fx.Node) -> bool:
    """Whether it may not be memory of something else: it is written over, or returned as it is or as a view."""
    own = storage_of(cat)
    written = [user.args[0] for user in cat.graph.nodes if user.target in IN_PLACE]
    kept = (*cat.graph.output_node().all_input_nodes, *written)
    return own is None or own in map(storage_of, kept)


def _cut_from(parts: Any, dim: int) -> fx.Node | None:
    """The tensor of which these are all slices along a dimension, in order; None where they are not."""
    begin, source = None, None
    for part in parts:
        if not isinstance(part, fx.Node) or part.target is not operator.getitem:
            return None
        of, index = cast(tuple[Any, Any], part.args)
        index = index if isinstance(index, tuple) else (index,)
        if not 0 <= dim < len(index) or not all(isinstance(each, slice) for each in index):
            return None
        cut = index[dim]
        others = (*index[:dim], *index[dim + 1 :])
        if cut.step is not None or any(other != _WHOLE for other in others) or cut.start != begin:
            return None
        if source is not None and (of is not source or begin is None):
            return None
        source, begin = of, cut.stop
    return source if begin is None and isinstance(source, fx.Node) else None
