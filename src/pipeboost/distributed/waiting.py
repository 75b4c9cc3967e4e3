"""Waiting for other ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeboost.distributed.groups import Group


def finish(work: Any, group: Group, what: str) -> None:
    """Wait for a collective operation: on a CPU until it is done, on a GPU the current stream does."""
    work.wait()
