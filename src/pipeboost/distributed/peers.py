"""`Peers`: memory that the GPUs of a group on one machine write into directly, over NVLink or PCIe.

NCCL's exchange of heads for tokens takes a copy that packs, the transfer, and one that unpacks; here a kernel writes
each row where it belongs, on whichever GPU that is. Needs torch's symmetric memory, and Triton.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from pipeboost.distributed.lanes import Lane
from pipeboost.distributed.neighbours import this_process
from pipeboost.distributed.renumbered import Renumbered
from pipeboost.distributed.start import world
from pipeboost.distributed.waiting import expecting, follow

if TYPE_CHECKING:
    from pipeboost.distributed.groups import Group

Made = TypeVar("Made")

MOST_RANKS = 8
MOST_BYTES = 4 * 2**30
"""Of a rank's memory for the others of a group, all `Peers` together; more is left to NCCL, which needs it for the time
of a transfer only."""
_BOARD = 256
"""Bytes in front, where ranks write how often they came."""
_LEAST = 2**20
"""Bytes of an inbox: enough to try it."""
HIDDEN_PROGRAMS = 24
EXPOSED_PROGRAMS = 528
"""That send heads or tokens at a time."""
_MEETING = "meeting of the GPUs' memory"
_PATIENCE = 10.0
"""Seconds for the first exchange, in which kernels are compiled."""


class _Part(NamedTuple):
    """Some of a rank's heads.

    Attributes:
        first: the first of them.
        heads: how many they are.
        last: whether no others follow.
    """

    first: int
    heads: int
    last: bool


def _parts(heads: int, count: int) -> list[_Part]:
    """So many heads in so many parts, as equal as can be, the first of two the larger."""
    begins = [heads * part // count for part in range(count + 1)]
    return [_Part(heads - end, end - begin, begin == 0) for begin, end in itertools.pairwise(begins)][::-1]


class Peers:
    """What the ranks of a group have for each other: a board, and two inboxes.

    All ranks make it at the same point of their programs, and then the same calls in the same order, each after what
    came before it on its GPU. Two inboxes, so that a rank's output never arrives where another still reads what came
    before it.

    Args:
        group: of GPUs of one machine.
        sizes: bytes of the two inboxes.
        memory: of this rank, zeros: a board and the two inboxes, one after another.
        addresses: where the memory of each rank is, as this one's GPU sees it.
        multiprocessors: of the smallest of the GPUs.

    Attributes:
        multiprocessors: as given.
        heads_bytes, tokens_bytes: the most that may arrive here of other ranks' tokens, and of this one's.
        starts: tokens of each rank → where they begin, on the GPU.
        launched: sizes of attentions that were rehearsed for a CUDA graph, on all ranks alike.
    """

    def __init__(
        self,
        group: Group,
        sizes: tuple[int, int],
        memory: torch.Tensor,
        addresses: Sequence[int],
        multiprocessors: int = 1,
    ) -> None:
        self.heads_bytes, self.tokens_bytes = sizes
        self.multiprocessors = multiprocessors
        self._group = group
        self._memory, device = memory, memory.device
        self._boards = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._heads_inboxes = self._boards + _BOARD
        self._tokens_inboxes = self._heads_inboxes + self.heads_bytes
        self._lanes = Lane.new(device, first=True), Lane.new(device)
        self._halt = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._round = torch.zeros(1, dtype=torch.int32, device=device)
        self.starts: dict[tuple[int, ...], torch.Tensor] = {}
        self.launched: set[tuple[int, ...]] = set()

    def attended(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tokens: Sequence[int],
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        parts: int = 1,
    ) -> torch.Tensor:
        """Attention by heads: each rank has all tokens of its heads for as long as it attends to them.

        In several parts one is attended to while the next is under way.

        Args:
            q, k, v: of this rank's tokens, `(batch, own tokens, heads, head_dim)`.
            tokens: how many each rank has.
            attend: gets q, k and v as `(batch, all tokens, some of this rank's heads, head_dim)`, which are theirs only
                until it returns, and gives the same of its output.
            parts: in how many a rank's heads are dealt with; at most as many as there are heads.

        Returns:
            `(batch, own tokens, heads, head_dim)`.
        """
        group, (heads, head_dim) = self._group, q.shape[2:]
        q, k, v = (each if each.stride()[2:] == (head_dim, 1) else each.contiguous() for each in (q, k, v))
        self._starts_of(tuple(tokens))  # which waits for the GPU where they are new: not once it waits for others
        here, links, beside = (Lane.current(q.device), *self._lanes) if parts > 1 else (Lane(None),) * 3
        lanes = [here, beside]
        for lane in (links, beside):
            lane.after(here.mark())
        outs = []
        try:
            arrived = []
            with links.on():
                for part in _parts(heads // group.size, parts):
                    self._send_heads((q, k, v), tokens, part)
                    self._meet()
                    arrived.append((part, links.mark()))
                follow(group, "exchange of heads for tokens")
            for number, (part, mark) in enumerate(arrived):
                # Two parts at a time: where the last blocks of one leave multiprocessors free, those of the next begin.
                lane = lanes[number % 2]
                lane.after(mark)
                with lane.on():
                    outs.append(attend(*self._heads(q, sum(tokens), part)).contiguous())
                links.after(lane.mark())
                with links.on():
                    self._send_tokens(outs[-1], tokens, heads, part)
            with links.on():
                self._meet()
                follow(group, "exchange of tokens for heads")
        finally:  # whoever goes on after an error goes on after all lanes, and a capture ends with all of them
            for lane in (links, beside):
                here.after(lane.mark())
        begin = _BOARD + self.heads_bytes
        return self._memory[begin : begin + q.nbytes].view(q.dtype).view(q.shape).clone()

    def halt(self) -> None:
        """Let this rank's GPU wait for nobody any more; what it computes from then on is worth nothing."""
        self._halt[0] = 1

    def _send_heads(self, qkv: Sequence[torch.Tensor], tokens: Sequence[int], part: _Part) -> None:
        from pipeboost.distributed.peer_kernels import BLOCK, WARPS, send_heads

        group, (batch, own, heads, head_dim) = self._group, qkv[0].shape
        total, row, apart = sum(tokens), part.heads * head_dim, heads // group.size * head_dim
        begun = part.first * head_dim
        strides = [stride for each in qkv for stride in each.stride()[:2]]
        items = 3 * batch * -(-own * row // BLOCK) * group.size
        send_heads[self._programs(items, hidden=part.first > 0),](
            *(each[:, :, part.first :] for each in qkv), self._heads_inboxes, 3 * batch * total * begun,
            batch, own, sum(tokens[: group.rank]), total, *strides, apart, group.rank,
            RANKS=group.size, ROW=row, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip

    def _heads(self, like: torch.Tensor, total: int, part: _Part) -> tuple[torch.Tensor, ...]:
        """What has arrived of q, k and v."""
        batch, _, _, head_dim = like.shape
        begin, nbytes = (
            3 * batch * total * heads * head_dim * like.element_size() for heads in (part.first, part.heads)
        )
        received = self._memory[_BOARD + begin : _BOARD + begin + nbytes].view(like.dtype)
        return received.view(3, batch, total, part.heads, head_dim).unbind(0)

    def _send_tokens(self, out: torch.Tensor, tokens: Sequence[int], heads: int, part: _Part) -> None:
        from pipeboost.distributed.peer_kernels import BLOCK, WARPS, send_tokens

        group, (batch, total, _, head_dim) = self._group, out.shape
        column = (group.rank * (heads // group.size) + part.first) * head_dim
        items = batch * -(-max(tokens) * part.heads * head_dim // BLOCK) * group.size
        send_tokens[self._programs(items, hidden=not part.last),](
            out, self._tokens_inboxes, self._starts_of(tuple(tokens)), batch, max(tokens), total,
            heads * head_dim, column, group.rank,
            RANKS=group.size, ROW=part.heads * head_dim, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip

    def _programs(self, items: int, *, hidden: bool) -> int:
        """How many programs send: few where attention runs beside them, which wants the multiprocessors."""
        return min(items, HIDDEN_PROGRAMS if hidden else EXPOSED_PROGRAMS)

    def _meet(self) -> None:
        """Have this rank's GPU wait until the others' have come here too; what they wrote before is there then."""
        from pipeboost.distributed.peer_kernels import meet

        meet[(1,)](self._boards, self._group.rank, self._round, self._halt, RANKS=self._group.size, num_warps=1)

    def _starts_of(self, tokens: tuple[int, ...]) -> torch.Tensor:
        if tokens not in self.starts:
            starts = [sum(tokens[:rank]) for rank in range(len(tokens) + 1)]
            self.starts[tokens] = torch.tensor(starts, dtype=torch.int32, device=self._boards.device)
        return self.starts[tokens]


def connect(group: Group, heads_bytes: int, tokens_bytes: int, device: torch.device, name: str) -> Peers | str:
    """Make the memory of all ranks of a group and try it; on every rank the reason where it does not serve one of them.

    Every rank of the group calls it, with the same sizes.
    """
    if group.size > MOST_RANKS:
        return f"the group has more than {MOST_RANKS} ranks"
    said = dist.PrefixStore(f"{group.name} {name}", world().store)
    host = this_process().host
    machine = host if host and find_spec("triton") is not None else "no Triton"
    machines = _all_say(said, "machine", machine, group)
    if "no Triton" in machines:
        return "a rank has no Triton"
    if len(set(machines)) > 1:
        return "the ranks are on several machines"
    sizes = (rounded(heads_bytes), rounded(tokens_bytes))
    with _registered(group, name) as registered:
        memory, trouble = _managed(lambda: _room(_BOARD + sum(sizes), device, registered))
        # All have their own before any looks for the others', which would wait for it.
        if any(_all_say(said, "room", trouble, group)):
            return "a GPU has no room"
        assert memory is not None
        found, trouble = _managed(lambda: _addresses(memory))
    troubles = [word for word in _all_say(said, "trouble", trouble, group) if word]
    if troubles:
        return f"a GPU does not reach another's memory: {troubles[0]}"
    assert found is not None
    multiprocessors = min(map(int, _all_say(said, "multiprocessors", str(_multiprocessors(device)), group)))
    peers = Peers(group, sizes, memory, found, multiprocessors)
    right = _arrives(peers, group, device)
    if not all(_all_say(said, "right", "yes" if right else "", group)):
        return "what one GPU wrote into another's memory did not arrive"
    return peers


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def rounded(nbytes: int) -> int:
    """The size of an inbox for so many bytes."""
    return max(-(-nbytes // _BOARD) * _BOARD, _LEAST)


def _managed(make: Callable[[], Made]) -> tuple[Made | None, str]:
    """What was made, or why it could not be."""
    try:
        return make(), ""
    except RuntimeError as error:
        return None, str(error).splitlines()[0] or type(error).__name__


def _arrives(peers: Peers, group: Group, device: torch.device) -> bool:
    """Whether numbers arrive where they belong: a machine may forbid what its driver promises."""
    ranks, own, heads, head_dim = group.size, 16, 3, 8
    tokens, here = [own] * ranks, slice(group.rank * heads, (group.rank + 1) * heads)
    # Every number says which tensor, token, head and place it is of.
    numbers = torch.arange(3 * ranks * own * ranks * heads * head_dim, device=device, dtype=torch.int32).float()
    whole = numbers.view(3, 1, ranks * own, ranks * heads, head_dim)
    mine = whole[:, :, group.rank * own : (group.rank + 1) * own]
    received: list[torch.Tensor] = []

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        received.append(torch.stack(qkv))
        return qkv[0]

    q, k, v = mine.unbind(0)
    back = peers.attended(q, k, v, tokens, attend, parts=2)
    if device.type == "cuda" and not _done_within(_PATIENCE, device, group):
        peers.halt()
        return False
    return torch.equal(torch.cat(received, 3), whole[:, :, :, here]) and torch.equal(back, mine[0])


def _done_within(seconds: float, device: torch.device, group: Group) -> bool:
    """Whether the GPU has done what it was given, after so many seconds at most."""
    done, until = torch.cuda.current_stream(device).record_event(), time.monotonic() + seconds
    with expecting(group, "first exchange in the GPUs' memory") as check:
        while not done.query():
            if time.monotonic() > until:
                return False
            check()
            time.sleep(0.001)
    return True


@contextlib.contextmanager
def _registered(group: Group, name: str) -> Iterator[str]:
    """Inside, torch's registry has the ranks under the name that this yields: it looks their store up there."""
    from torch._C._distributed_c10d import _register_process_group, _SymmetricMemory, _unregister_process_group

    registered: Any = f"{group.name} {name}"
    waiting = functools.partial(expecting, group, _MEETING)
    store = Renumbered(dist.PrefixStore(f"{registered} memory", world().store), waiting)
    ranks = dist.ProcessGroup(store, group.rank, group.size)  # the registry's reference keeps nothing
    _register_process_group(registered, ranks)
    try:
        _SymmetricMemory.set_group_info(registered, group.rank, group.size, store)
        yield registered
    finally:
        _unregister_process_group(registered)


def _room(nbytes: int, device: torch.device, registered: str) -> torch.Tensor:
    """Memory of this rank that other ranks may map, zeros."""
    from torch._C._distributed_c10d import _SymmetricMemory

    memory = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device, registered)
    memory.zero_()
    torch.cuda.synchronize(device)
    return memory


def _addresses(memory: torch.Tensor) -> list[int]:
    """Where the memory of each rank is, once all have come here."""
    from torch._C._distributed_c10d import _SymmetricMemory

    return list(_SymmetricMemory.rendezvous(memory).buffer_ptrs)


def _all_say(store: Any, about: str, word: str, group: Group) -> list[str]:
    """What each rank of the group says; outside its collectives, since one of them may have failed."""
    store.set(f"{about} {group.rank}", f"={word}")
    keys = [f"{about} {rank}" for rank in range(group.size)]
    with expecting(group, _MEETING) as check:
        while not store.check(keys):
            check()
            time.sleep(0.001)
    return [store.get(key).decode().removeprefix("=") for key in keys]
