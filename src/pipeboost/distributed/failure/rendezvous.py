"""Meeting: before ranks make groups together, each makes sure that the others have come, or hears why one will not."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

from pipeboost.core.errors import PipeboostError
from pipeboost.distributed.failure.records import Failure, told_of
from pipeboost.distributed.start import world

PATIENCE = timedelta(minutes=10)
"""For ranks that load their weights more slowly than others."""
STAGE = "accelerate_pipeline"
_CAME = "came: "
_meetings: Counter[tuple[str, tuple[int, ...]]] = Counter()


def meet(about: str, ranks: Sequence[int], word: str) -> list[str]:
    """Wait until all of these ranks of the world have come here as often as this one.

    Args:
        about: what they meet; meetings about other things are counted by themselves.
        ranks: of the world, in the same order on all of them.
        word: that this one brings.

    Returns:
        The word that each of them has brought.

    Raises:
        RankFailedError: one has declined.
        PipeboostError: some did not come.
    """
    everyone, members = world(), tuple(ranks)
    keys = _come(about, members, _CAME + word)
    told: dict[int, str] = {}
    until = time.monotonic() + PATIENCE.total_seconds()
    while len(told) < len(keys):
        for rank, key in keys.items():
            if rank not in told and everyone.store.check([key]):
                told[rank] = everyone.store.get(key).decode()
                if not told[rank].startswith(_CAME):
                    raise Failure(**json.loads(told[rank])).error()
        if time.monotonic() > until:
            # As if it had not been here: the next time it comes it meets whoever comes for the first time.
            everyone.store.delete_key(keys[everyone.rank])
            _meetings[about, members] -= 1
            late = ", ".join(str(rank) for rank in keys if rank not in told)
            raise PipeboostError(
                f"rank {late} did not come to {STAGE} within {PATIENCE.total_seconds():.0f} s; every rank calls it at "
                "the same point of its program, or uses parallel=None"
            )
        time.sleep(0.005)
    return [told[rank].removeprefix(_CAME) for rank in keys]


def decline(about: str, ranks: Sequence[int], error: Exception) -> None:
    """Tell the ranks that come to the next meeting why this one does not, without waiting for them."""
    _come(about, tuple(ranks), json.dumps(vars(told_of(world().rank, STAGE, error))))


def _come(about: str, members: tuple[int, ...], word: str) -> dict[int, str]:
    """Leave a word at the next meeting; where the word of each rank is found."""
    everyone = world()
    place = f"pipeboost meeting of {members} about {about} {_meetings[about, members]}"
    _meetings[about, members] += 1
    keys = {rank: f"{place}: {rank}" for rank in members}
    everyone.store.set(keys[everyone.rank], word)
    return keys
