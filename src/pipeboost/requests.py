"""The three ways to run a list of requests: one by one, overlapped in threads, on a mesh with ranks beside it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeboost.distributed.beside import Beside
from pipeboost.features.parallel.rank_team import Team
from pipeboost.runner import Calls, one_of_a_list, signature_of
from pipeboost.stages import Serving, asking, one_by_one, overlapped, with_what_finished, without_trajectory


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
        calls.require_no_list()
        applied.follow_device(pipe)  # which views of the pipeline cannot
    team = applied.team
    if overlap and team is not None and team.beside is not None and _overlap_beside(calls, team, requests):
        yield from _run_beside(calls, team, team.beside, pipe, requests)
        return
    alone = team is not None or applied.plan["offload"].on
    if not overlap or len(requests) < 2 or alone or one_by_one(requests) is not None:
        for request in requests:
            yield pipe(**request)
        return
    applied.bind(pipe)  # so that its views come with the doors that they share
    for output, finished in overlapped(pipe, requests, with_what_finished, calls.cancel_turns):
        calls.finished = finished or calls.finished
        yield output


def _overlap_beside(calls: Calls, team: Team, requests: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these requests overlap on a mesh with ranks beside it, as the first rank says."""
    applied = calls.applied
    against = {
        "there is only one": len(requests) < 2,
        "components are offloaded": applied.plan["offload"].on,
        "ranks exchange something in a stage outside the loop": applied.stages.meets_outside_the_loop,
        "ranks ask each other after each callback whether one has interrupted the call": any(
            request.get("callback_on_step_end") is not None for request in requests
        ),
    }
    reason = next((words for words, holds in against.items() if holds), one_by_one(requests))
    with calls.watched(team):
        return team.agreed_to_overlap(len(requests), reason)


def _run_beside(
    calls: Calls, team: Team, beside: Beside, pipe: Any, requests: Sequence[Mapping[str, Any]]
) -> Iterator[Any]:
    """On a mesh with ranks beside it: one loop at a time, so that all ranks go through them alike."""
    signature = signature_of(pipe)
    serving = None if team.mesh is not None else Serving(beside)
    excusing = contextlib.nullcontext() if serving is None else serving.excusing()
    with calls.a_list(), excusing, calls.watched(team):
        calls.applied.bind_on_all_ranks(pipe, "the start of run_many")
        given = [without_trajectory(signature, request)[0] for request in requests]
        bound = [team.agreed(signature, pipe, (), request) for request in given]
        outputs = _asked(calls, pipe, requests, bound) if serving is None else _served(calls, pipe, serving, bound)
        with asking(beside) if serving is None else contextlib.nullcontext():
            for output in outputs:
                try:
                    yield output
                except GeneratorExit:  # on every rank; the requests that are under way come to their end
                    outputs.close()
                    break
    if serving is not None:
        serving.raise_what_was_told()


def _asked(
    calls: Calls, pipe: Any, requests: Sequence[Mapping[str, Any]], bound: Sequence[inspect.BoundArguments]
) -> Generator[Any]:
    """The results of requests on a rank of the mesh."""

    def run(view: Any, request: Mapping[str, Any]) -> Any:
        with one_of_a_list(bound):
            return with_what_finished(view, request)

    results = overlapped(pipe, requests, run, calls.cancel_turns, at_once=1, together=True)
    with contextlib.closing(results):
        for output, finished in results:
            calls.finished = finished or calls.finished
            yield output


def _served(calls: Calls, pipe: Any, serving: Serving, bound: Sequence[inspect.BoundArguments]) -> Generator[Any]:
    """The results of requests on a rank beside, up to one that has failed on the mesh."""
    device = calls.applied.follow_device(pipe)
    with ThreadPoolExecutor(1, thread_name_prefix="pipeboost-serving") as pool:
        work = pool.submit(calls.serve, pipe, device, serving)
        try:
            for position, each in enumerate(bound):
                if not serving.has_returned(position):
                    break
                yield serving.outcome(position, dict(each.arguments), alone=False)
        finally:
            work.result()
