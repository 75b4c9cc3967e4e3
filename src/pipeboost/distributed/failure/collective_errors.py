"""`CollectiveErrors`: what ranks do each for itself, and go on from only if all of them have managed it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pipeboost.distributed.collectives.mesh import Mesh
from pipeboost.distributed.failure.records import failure_from


class CollectiveErrors:
    """The ranks of a sample do something together; an error on one is an error on all.

    Inside, ranks may fail alone; all leave it together, by what they have raised or `RankFailedError`. They learn of an
    error over `mesh.control` and stay in step, so that they can take back together what they have done. Outside,
    nothing is exchanged.

    Args:
        mesh: whose ranks they are; nothing is exchanged where it has one rank a sample.
        stage: what they do, for the error.
    """

    def __init__(self, mesh: Mesh, stage: str) -> None:
        self._control, self._stage, self._over = mesh.control, stage, True

    def __enter__(self) -> None:
        self._over = self._control.size == 1

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            self._exchange(error)
        finally:
            self._over = True

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Tell the others of an error at once, before anything is taken back; each error once."""
        try:
            yield
        except BaseException as error:
            self._exchange(error)
            raise

    def require_all(self) -> None:
        """Wait until all ranks are here, as before they exchange something else; raises as leaving this does."""
        self._exchange(None)

    def _exchange(self, error: BaseException | None) -> None:
        if self._over:
            return
        self._over = True  # should this raise
        rank = self._control.ranks[self._control.rank]
        own = None if error is None else failure_from(error, rank, self._stage)
        first = next(filter(None, self._control.all_gather_objects(own)), None)
        self._over = first is not None
        if error is None and first is not None:
            raise first.error()
