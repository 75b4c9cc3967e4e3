"""Attention across ranks: Ulysses exchanges heads for tokens, ring passes keys and values around; both together, too.

A rank has queries, keys and values of its own tokens and gets the output for these. *Ulysses* (DeepSpeed-Ulysses): one
exchange gives each rank all tokens of its row of ranks for some of the heads, another one takes the output back. *Ring*
(Ring Attention): keys and values of the other rows come by one after the other while those before are attended to;
partial outputs are merged by their log-sum-exp in float32. Keys then come in another order than on one rank, the same
for masks, which changes nothing but rounding.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeboost.contract.call import current_call
from pipeboost.core.errors import UnsupportedError
from pipeboost.distributed import Group
from pipeboost.features.parallel.sequence_parallel import SHARDS
from pipeboost.kernels.merge import merge_partial

Attend = Callable[..., Any]
_QUERIES = 128
"""Of a head, that one block of an attention kernel deals with."""
_FILLED = 0.75
"""Share of a GPU's multiprocessors that have a block."""
_LONG = 1e12
"""Operations of an attention that take a GPU longer than the host takes to launch it in parts."""
_serials = itertools.count()
_across: weakref.WeakValueDictionary[int, UlyssesRing] = weakref.WeakValueDictionary()


class UlyssesRing:
    """Attention over the tokens of all ranks of a call's sequence group, by way of attention on one.

    One is like another, so pipelines with meshes of their own can share a transformer.
    """

    def __init__(self) -> None:
        self._attend: Callable[[], Attend | None] = lambda: None
        self._number = next(_serials)
        _across[self._number] = self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UlyssesRing)

    def __hash__(self) -> int:
        return hash(UlyssesRing)

    def serve(self, attend: Attend) -> None:
        """Use the bound method `attend(q, k, v, mask, *, scale, return_lse)` for attention on one rank."""
        self._attend = weakref.WeakMethod(attend)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float | None = None
    ) -> Tensor:
        """Compute the attention of this rank's queries to the keys of all, all `(batch, own tokens, heads, head_dim)`.

        Args:
            q: queries.
            k: keys.
            v: values.
            mask: over this rank's own keys: `(batch, 1, 1, own tokens)` or `(batch, own tokens)`.
            scale: of the scores.
        """
        if torch.compiler.is_compiling():
            return torch.ops.pipeboost.attend_across_ranks(q, k, v, mask, scale, self._number)
        return self.run(q, k, v, mask, scale)

    def run(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Do what a call does; compiled code comes here through an operator."""
        call, attend = current_call(), self._attend()
        assert call is not None
        assert attend is not None
        shards = call.get(SHARDS)
        if shards is None:  # a call that runs on one rank, of a pipeline that shares the transformer
            return attend(q, k, v, mask, scale=scale)
        assert call.mesh is not None
        ulysses, ring = call.mesh.group("ulysses"), call.mesh.group("ring")
        tokens, heads = shards.joint_sizes, q.shape[2]
        rows = [tokens[row * ulysses.size : (row + 1) * ulysses.size] for row in range(ring.size)]
        here = rows[ring.rank]
        if heads % ulysses.size:
            raise UnsupportedError(f"ulysses={ulysses.size} does not divide the {heads} heads of this attention")
        if mask is not None:
            mask = _over_keys(mask, q, k)
        if ulysses.size > 1 and mask is not None:
            mask = ulysses.all_gather(mask, 1, here)

        def attend_to_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if ring.size > 1:
                return _around_the_ring(attend, q, k, v, mask, [sum(row) for row in rows], scale, ring)
            out: Tensor = attend(q, k, v, None if mask is None else mask[:, None, None], scale=scale)
            return out

        if ulysses.size == 1:
            return attend_to_all(q, k, v)
        token_bytes = q.shape[0] * heads * q.shape[3] * q.element_size()
        peers = ulysses.peers(3 * sum(here) * token_bytes // ulysses.size, max(here) * token_bytes, q.device)
        if peers is None:
            return _tokens_for_heads(attend_to_all(*_heads_for_tokens(q, k, v, here, ulysses)), here, ulysses)
        sizes = (q.shape[0], sum(here), heads // ulysses.size, q.shape[3])
        if call.captures:
            # From here on, also where this rank runs what another one replays: they exchange in the same parts.
            peers.launched.add(sizes)
        parts = 1
        if ring.size == 1:
            parts = _parts(*sizes, peers.multiprocessors, launched=sizes in peers.launched)
        return peers.attended(q, k, v, here, attend_to_all, parts=parts)


def _parts(batch: int, tokens: int, heads: int, head_dim: int, multiprocessors: int, *, launched: bool) -> int:
    """Return in how many parts a rank's heads are exchanged, the same on all ranks.

    Two, where half of them fill a GPU, and where that costs nothing: a long attention keeps the GPU full while one part
    follows the other; a short one does so in a CUDA graph, if the parts take the GPU no more rounds than the whole.

    Args:
        multiprocessors: of that GPU.
        launched: whether it costs the host nothing to launch more kernels, since CUDA graphs do.
    """
    blocks = batch * -(-tokens // _QUERIES)
    half = heads // 2
    if half * blocks < _FILLED * multiprocessors:
        return 1
    whole, *parts = (-(-each * blocks // multiprocessors) for each in (heads, half, heads - half))
    long = 4 * batch * heads * tokens**2 * head_dim >= _LONG
    return 2 if long or (launched and sum(parts) <= whole) else 1


def _over_keys(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Return a mask as `(batch, own keys)`, of its own dtype."""
    batch, tokens = k.shape[:2]
    if mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1:
        mask = mask[:, 0, 0]
    if mask.ndim != 2 or mask.shape[1] != tokens:
        raise UnsupportedError(
            f"an attention mask of shape {tuple(mask.shape)} differs between queries or heads, which ranks that share "
            "a sequence cannot serve; use ParallelConfig(ulysses=1, ring=1)"
        )
    return mask.expand(batch, tokens).contiguous()


def _heads_for_tokens(q: Tensor, k: Tensor, v: Tensor, tokens: Sequence[int], group: Group) -> tuple[Tensor, ...]:
    """Return all tokens of the group's ranks for this rank's heads: `(batch, all tokens, heads / ranks, head_dim)`."""
    batch, own, heads, head_dim = q.shape
    split = (batch, own, group.size, heads // group.size, head_dim)
    stacked = torch.stack([tensor.reshape(split) for tensor in (q, k, v)])
    # Rank by rank, and token by token within: then all that arrives is in the order of the tokens.
    packed = stacked.permute(3, 2, 1, 0, 4, 5).reshape(group.size * own, -1)
    received = group.all_to_all(packed, [own] * group.size, tokens)
    return received.view(sum(tokens), batch, 3, heads // group.size, head_dim).permute(2, 1, 0, 3, 4).unbind(0)


def _tokens_for_heads(out: Tensor, tokens: Sequence[int], group: Group) -> Tensor:
    """Invert `_heads_for_tokens`: return this rank's own tokens with all heads."""
    batch, _, heads, head_dim = out.shape
    own = tokens[group.rank]
    packed = out.transpose(0, 1).reshape(sum(tokens), -1)
    received = group.all_to_all(packed, tokens, [own] * group.size)
    received = received.view(group.size, own, batch, heads, head_dim)
    return received.permute(2, 1, 0, 3, 4).reshape(batch, own, group.size * heads, head_dim)


def _around_the_ring(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    tokens: Sequence[int],
    scale: float | None,
    group: Group,
) -> Tensor:
    """Attend to the keys and values of all ranks, of which two at a time are here.

    Args:
        tokens: how many keys each rank has.
    """
    block = [k.contiguous(), v.contiguous()] + ([] if mask is None else [mask])
    out: Tensor | None = None
    lse = q.new_empty(0)
    for turn in range(group.size):
        coming, pending = block, None
        if turn + 1 < group.size:
            length = tokens[(group.rank - turn - 1) % group.size]
            coming = [tensor.new_empty((tensor.shape[0], length, *tensor.shape[2:])) for tensor in block]
            pending = group.shift(block, coming)
        keys, values = block[:2]
        part_mask = block[2][:, None, None] if mask is not None else None
        part, part_lse = attend(q, keys, values, part_mask, scale=scale, return_lse=True)
        out, lse = (part.float(), part_lse) if out is None else merge_partial(out, lse, part, part_lse)
        if pending is not None:
            pending.wait()
        block = coming
    assert out is not None
    return out.to(q.dtype)


@torch.library.custom_op("pipeboost::attend_across_ranks", mutates_args=())
def _attend_across_ranks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, number: int
) -> Tensor:
    return _across[number].run(q, k, v, mask, scale).contiguous()


_attend_across_ranks.register_fake(lambda q, *_: q.new_empty(q.shape))
