"""Meeting: before ranks make groups together, each makes sure that the others have come, or hears why one will not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

from pipeboost.distributed.start import world
from pipeboost.distributed.watch_records import Failure, told_of
from pipeboost.errors import PipeboostError

PATIENCE = timedelta(minutes=10)
"""For ranks that load their weights more slowly than others."""
STAGE = "accelerate_pipeline"
_CAME = "came: "
_meetings: Counter[tuple[int, ...]] = Counter()


def meet(ranks: Sequence[int], word: str) -> list[str]:
    """Wait until all of these ranks of the world have come here as often as this one.

    Returns:
        The word that each of them has brought.

    Raises:
        RankFailedError: one has declined.
        PipeboostError: some did not come.
    """
    everyone, members = world(), tuple(ranks)
    keys = _come(members, _CAME + word)
    try:
        everyone.store.wait(list(keys.values()), PATIENCE)
    except RuntimeError as error:
        late = [str(rank) for rank, key in keys.items() if not everyone.store.check([key])]
        # As if it had not been here: the next time it comes it meets whoever comes for the first time.
        everyone.store.delete_key(keys[everyone.rank])
        _meetings[members] -= 1
        raise PipeboostError(
            f"rank {', '.join(late) or 'unknown'} did not come to {STAGE} within "
            f"{PATIENCE.total_seconds():.0f} s; every rank calls it at the same point of its program, or uses "
            "parallel=None"
        ) from error
    told = [everyone.store.get(key).decode() for key in keys.values()]
    declined = next((each for each in told if not each.startswith(_CAME)), None)
    if declined is not None:
        raise Failure(**json.loads(declined)).error()
    return [each.removeprefix(_CAME) for each in told]


def decline(ranks: Sequence[int], error: Exception) -> None:
    """Tell the ranks that come to the next meeting why this one does not, without waiting for them."""
    _come(tuple(ranks), json.dumps(vars(told_of(world().rank, STAGE, error))))


def _come(members: tuple[int, ...], word: str) -> dict[int, str]:
    """Leave a word at the next meeting; where the word of each rank is found."""
    everyone = world()
    place = f"pipeboost meeting of {members} {_meetings[members]}"
    _meetings[members] += 1
    keys = {rank: f"{place}: {rank}" for rank in members}
    everyone.store.set(keys[everyone.rank], word)
    return keys
