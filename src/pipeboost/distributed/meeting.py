"""Meeting: before ranks make groups together, each makes sure that the others have come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

from pipeboost.distributed.start import world
from pipeboost.errors import PipeboostError

PATIENCE = timedelta(minutes=10)
"""For ranks that load their weights more slowly than others."""
_meetings: Counter[tuple[int, ...]] = Counter()


def meet(ranks: Sequence[int], word: str) -> list[str]:
    """Wait until all of these ranks of the world have come here as often as this one.

    Returns:
        The word that each of them has brought.

    Raises:
        PipeboostError: some did not come.
    """
    everyone = world()
    members = tuple(ranks)
    place = f"pipeboost meeting of {members} {_meetings[members]}"
    _meetings[members] += 1
    keys = {rank: f"{place}: {rank}" for rank in members}
    everyone.store.set(keys[everyone.rank], word)
    try:
        everyone.store.wait(list(keys.values()), PATIENCE)
    except RuntimeError as error:
        late = [str(rank) for rank, key in keys.items() if not everyone.store.check([key])]
        # As if it had not been here: the next time it comes it meets whoever comes for the first time.
        everyone.store.delete_key(keys[everyone.rank])
        _meetings[members] -= 1
        raise PipeboostError(
            f"rank {', '.join(late) or 'unknown'} did not come to accelerate_pipeline within "
            f"{PATIENCE.total_seconds():.0f} s; every rank calls it at the same point of its program, or uses "
            "parallel=None"
        ) from error
    return [everyone.store.get(key).decode() for key in keys.values()]
