"""Rendezvous: before ranks make groups, each makes sure that the others have arrived, or learns why one will not."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from pipeboost.core.errors import PipeboostError
from pipeboost.distributed.authentication import ForgeryError, shared_secret, sign, verify
from pipeboost.distributed.failure.records import Failure, failure_from
from pipeboost.distributed.local_processes import STAGE, Absence, Process, patience, this_process
from pipeboost.distributed.start import answer_of_store, world

_PROCESS = "pipeboost process of rank {}"
_serials: Counter[tuple[str, tuple[int, ...]]] = Counter()


def announce() -> None:
    """Tell the other ranks which process this is, so that they notice should it die before a rendezvous."""
    _write(_PROCESS.format(world().rank), this_process()._asdict())


def rendezvous(about: str, ranks: Sequence[int], word: str) -> list[str]:
    """Wait until all of these ranks of the world have come here as often as this one.

    Args:
        about: what they meet about; rendezvous about other things are counted by themselves.
        ranks: of the world, in the same order on all of them.
        word: that this one brings.

    Returns:
        The word that each of them has brought.

    Raises:
        RankFailedError: one has declined, or died.
        PipeboostError: some did not come, or the store does not answer.
    """
    place = _come(about, ranks, {"word": word})
    words: dict[int, str] = {}
    absence, until = Absence(_announced), time.monotonic() + patience()
    while missing := [rank for rank in ranks if rank not in words]:
        for rank in missing:
            message = _read(f"{place} {rank}")
            if message is not None and "word" not in message:
                raise Failure(**message).error()
            if message is not None:
                words[rank] = message["word"]
        if time.monotonic() > until:
            # As if it had not been here: the next time it comes it meets whoever comes for the first time.
            answer_of_store(lambda: world().store.delete_key(f"{place} {world().rank}"))
            _serials[about, tuple(ranks)] -= 1
            raise PipeboostError(
                f"rank {', '.join(map(str, missing))} did not come to {STAGE} within {patience():.0f} s; every rank "
                "calls it at the same point of its program, or uses parallel=None"
            )
        absence.check(missing)
        time.sleep(0.01)
    return [words[rank] for rank in ranks]


def decline(about: str, ranks: Sequence[int], error: Exception) -> None:
    """Tell the ranks that come to the next rendezvous why this one does not, without waiting for them."""
    _come(about, ranks, failure_from(error, world().rank, STAGE)._asdict())


def _come(about: str, ranks: Sequence[int], message: dict[str, Any]) -> str:
    """Leave a message at the next rendezvous; return where those of all ranks are found, before their numbers."""
    members = tuple(ranks)
    place = f"pipeboost rendezvous of {members} about {about} {_serials[about, members]}:"
    _serials[about, members] += 1
    _write(f"{place} {world().rank}", message)
    return place


def _announced(rank: int) -> Process | None:
    message = _read(_PROCESS.format(rank))
    return None if message is None else Process(**message)


def _write(key: str, message: dict[str, Any]) -> None:
    signed = sign(json.dumps(message).encode(), key, shared_secret())
    answer_of_store(lambda: world().store.set(key, signed))


def _read(key: str) -> dict[str, Any] | None:
    """What a rank has left in the store; what others left there counts as nothing."""
    store = world().store
    try:
        content = answer_of_store(lambda: store.get(key) if store.check([key]) else b"")
        message: dict[str, Any] = json.loads(verify(content, key, shared_secret()))
    except dist.DistError as error:
        raise PipeboostError(f"the store where the ranks meet cannot be reached any more: {error}") from error
    except (ForgeryError, ValueError):
        return None
    return message
