"""Rendezvous: before ranks make groups, each makes sure that the others have come, or hears why one will not."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from pipeboost.core.errors import PipeboostError
from pipeboost.distributed.authentication import ForgeryError, shared_secret, sign, verify
from pipeboost.distributed.failure.absence import STAGE, Absence, patience
from pipeboost.distributed.failure.local_processes import Process, this_process
from pipeboost.distributed.failure.records import Failure, describe_ranks, failure_from
from pipeboost.distributed.start import world

_meetings: Counter[tuple[str, tuple[int, ...]]] = Counter()


def announce() -> None:
    """Tell the other ranks which process this is, so that they notice should it die before it comes to a meeting."""
    _say(_process_of(world().rank), this_process()._asdict())


def meet(about: str, ranks: Sequence[int], word: str) -> list[str]:
    """Wait until all of these ranks of the world have come here as often as this one.

    Args:
        about: what they meet; meetings about other things are counted by themselves.
        ranks: of the world, in the same order on all of them.
        word: that this one brings.

    Returns:
        The word that each of them has brought.

    Raises:
        RankFailedError: one has declined, or died.
        PipeboostError: some did not come.
    """
    members = tuple(ranks)
    keys = _come(about, members, {"word": word})
    told: dict[int, str] = {}
    absence, since = Absence(_announced), time.monotonic()
    while missing := [rank for rank in members if rank not in told]:
        for rank in missing:
            said = _said(keys[rank])
            if said is not None and "word" not in said:
                raise Failure(**said).error()
            if said is not None:
                told[rank] = said["word"]
        if time.monotonic() > since + patience():
            # As if it had not been here: the next time it comes it meets whoever comes for the first time.
            world().store.delete_key(keys[world().rank])
            _meetings[about, members] -= 1
            raise PipeboostError(
                f"{describe_ranks(missing)} did not come to {STAGE} within {patience():.0f} s; every rank calls it at "
                "the same point of its program, or uses parallel=None"
            )
        absence.check(missing)
        time.sleep(0.005)
    return [told[rank] for rank in members]


def decline(about: str, ranks: Sequence[int], error: Exception) -> None:
    """Tell the ranks that come to the next meeting why this one does not, without waiting for them."""
    _come(about, tuple(ranks), failure_from(error, world().rank, STAGE)._asdict())


def _come(about: str, members: tuple[int, ...], said: dict[str, Any]) -> dict[int, str]:
    """Leave a word at the next meeting; where the word of each rank is found."""
    place = f"pipeboost meeting of {members} about {about} {_meetings[about, members]}"
    _meetings[about, members] += 1
    keys = {rank: f"{place}: {rank}" for rank in members}
    _say(keys[world().rank], said)
    return keys


def _process_of(rank: int) -> str:
    return f"pipeboost process of rank {rank}"


def _announced(rank: int) -> Process | None:
    said = _said(_process_of(rank))
    return None if said is None else Process(**said)


def _say(key: str, said: dict[str, Any]) -> None:
    world().store.set(key, sign(json.dumps(said).encode(), key, shared_secret()))


def _said(key: str) -> dict[str, Any] | None:
    """What a rank has left in the store; what others left there counts as nothing."""
    store = world().store
    try:
        message = store.get(key) if store.check([key]) else b""
    except dist.DistError as error:
        raise PipeboostError(f"the store where the ranks meet cannot be reached any more: {error}") from error
    try:
        said: dict[str, Any] = json.loads(verify(message, key, shared_secret()))
    except (ForgeryError, ValueError):
        return None
    return said
