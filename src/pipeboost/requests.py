"""The two ways to run a list of requests: one by one, and overlapped in threads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeboost.runner import Calls
from pipeboost.stages import one_by_one, overlapped, with_what_finished


def run_list(calls: Calls, pipe: Any, requests: Sequence[Mapping[str, Any]], *, overlap: bool) -> Iterator[Any]:
    """Run `pipe(**request)` for each request and yield what they return, in order.

    Args:
        requests: arguments of each call.
        overlap: whether they overlap where that gives the results of one call after the other, to the bit.

    Raises:
        Exception: what a request raises, in its turn; the requests after it are not run.
    """
    applied = calls.applied
    overlap = overlap and applied.active and not calls.are_paused
    if overlap:
        applied.follow_device(pipe)  # which views of the pipeline cannot
    alone = applied.team is not None or applied.plan["offload"].on
    if not overlap or len(requests) < 2 or alone or one_by_one(requests) is not None:
        for request in requests:
            yield pipe(**request)
        return
    applied.bind(pipe)  # so that its views come with the doors that they share
    for output, finished in overlapped(pipe, requests, with_what_finished, calls.cancel_turns):
        calls.finished = finished or calls.finished
        yield output
