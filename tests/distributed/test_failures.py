"""A call on several ranks that fails on one ends on all, and tells what happened."""

import os
import socket
import subprocess
import sys

import pytest

from pipeboost.distributed.failure.records import Ended, Failure, Operation, Record, first_error, in_step, late_rank
from tests.distributed import failure_cases
from tests.distributed.failure_cases import PLACES, TIMEOUT
from tests.distributed.failure_ranks import on_mortal_ranks
from tests.parameters import exhaustive

SOON = TIMEOUT + 8
"""Seconds in which a call has ended on a machine that does much else."""


def _fail(size: int, kind: str, rank: int, place: str, **options):
    return on_mortal_ranks(size, failure_cases.failing_call, size, kind, rank, place, **options)


@pytest.mark.parametrize(("place", "rank"), [("start", 0), ("middle", 1), ("operator", 0), ("end", 1)])
def test_an_exception_on_one_rank_ends_the_call_on_all_with_its_traceback(place, rank):
    outcomes = _fail(2, "raise", rank, place)
    failed, other = outcomes[rank].answer, outcomes[1 - rank].answer
    assert failed["first"]["raised"] == "ValueError"
    assert failed["first"]["text"] == f"boom on rank {rank}"
    assert other["first"]["raised"] == "RankFailedError"
    assert (other["first"]["rank"], other["first"]["stage"]) == (rank, PLACES[place])
    assert f"ValueError: boom on rank {rank}" in other["first"]["text"]
    assert "failure_cases.py" in other["first"]["traceback"]
    assert failed["threads"] == other["threads"] == []
    for answer in (failed, other):
        assert answer["first"]["seconds"] < SOON
        if place == "end":  # all ranks have come equally far
            assert answer["second"]["returned"] == 2.0
        else:
            assert answer["second"]["raised"] == "PipeboostError"
            assert "start the ranks again" in answer["second"]["text"]
        assert answer["anew"]["returned"] == 2.0


@pytest.mark.parametrize(("place", "rank"), [("start", 0), ("operator", 1), *exhaustive(("middle", 1), ("end", 1))])
def test_a_killed_rank_is_named_with_its_signal_and_last_stage(place, rank):
    outcomes = _fail(2, "kill", rank, place)
    assert outcomes[rank].exit_code == -9
    other = outcomes[1 - rank].answer
    told = other["first"] if "raised" in other["first"] else other["second"]  # where it had come to the end first
    assert (told["raised"], told["rank"]) == ("RankFailedError", rank)
    assert (told["signal"], told["stage"]) == ("SIGKILL", PLACES[place])
    assert told["text"] == f"rank {rank} was killed by SIGKILL in {PLACES[place]!r}"
    assert other["first"]["seconds"] < SOON


@pytest.mark.parametrize(("place", "rank"), [("operator", 1), ("end", 0), *exhaustive(("start", 0))])
def test_a_rank_that_does_not_come_is_named_and_its_process_ends(place, rank):
    outcomes = _fail(2, "sleep", rank, place)
    other = outcomes[1 - rank].answer
    told = other["second"] if place == "end" else other["first"]
    assert (told["raised"], told["rank"], told["stage"]) == ("RankFailedError", rank, PLACES[place])
    assert f"rank {rank} has not come to" in told["text"]
    assert outcomes[rank].exit_code == 1
    assert "failure_cases.py" in outcomes[rank].printed  # where it sleeps
    assert all(outcome.seconds < 2 * SOON for outcome in outcomes)


@pytest.mark.parametrize("kind", ["stop", "stop busy"])
def test_a_stopped_rank_gives_no_sign_of_life_whatever_it_said_that_it_does(kind):
    outcomes = _fail(2, kind, 1, "middle", stuck=1)
    assert outcomes[0].answer["first"]["seconds"] < 3 * TIMEOUT + 8
    told = outcomes[0].answer["first"]
    assert (told["raised"], told["rank"], told["stage"]) == ("RankFailedError", 1, "denoising")


@pytest.mark.parametrize("kind", ["kill", pytest.param("stop", marks=pytest.mark.exhaustive)])
def test_the_rank_that_keeps_the_store_may_be_the_one_that_fails(kind):
    outcomes = _fail(2, f"{kind} later", 0, "middle", stuck=0 if kind == "stop" else None, tcp=True)
    told = outcomes[1].answer["first"]
    assert (told["raised"], told["rank"], told["stage"]) == ("RankFailedError", 0, "denoising")


@pytest.mark.parametrize("kind", ["raise", "kill", pytest.param("sleep", marks=pytest.mark.exhaustive)])
def test_a_rank_of_another_machine_is_named_too(kind):
    outcomes = on_mortal_ranks(2, failure_cases.failing_call_between_machines, kind, 1, "middle")
    told = outcomes[0].answer["first"]
    assert (told["raised"], told["rank"], told["stage"]) == ("RankFailedError", 1, "denoising")


def test_all_connections_of_a_group_end_though_one_has_ended_before():
    assert on_mortal_ranks(3, failure_cases.aborting, stuck=2)[0].answer is True


def test_a_rank_that_is_killed_before_the_rendezvous_is_named_with_its_signal():
    told = on_mortal_ranks(2, failure_cases.killed_before_rendezvous)[0].answer
    assert (told["raised"], told["rank"], told["signal"]) == ("RankFailedError", 1, "SIGKILL")


def test_a_process_that_keeps_the_store_and_stands_still_is_not_waited_for_without_limit():
    for told in on_mortal_ranks(2, failure_cases.stopped_before_rendezvous, stuck=0, tcp=True)[1].answer:
        assert told["text"] == "the process that keeps the ranks' store has not answered for 1 s"


@pytest.mark.parametrize("killed", [0, *exhaustive(1)])
def test_a_rank_that_is_killed_before_it_has_said_anything_is_not_waited_for(killed):
    """Ranks that no launcher watches; rank 0 would keep the store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.killed_early", str(killed)],
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "RANK_"))},
                **{"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        assert "has no process on this machine" in ranks[1 - killed].communicate(timeout=100)[0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_a_rank_that_exits_is_named_with_its_exit_code():
    told = _fail(2, "exit", 1, "middle")[0].answer["first"]
    assert told["text"] == "rank 1 has exited with code 3 in 'denoising'"


@pytest.mark.parametrize("place", PLACES)
def test_after_an_exception_on_all_ranks_alike_the_next_call_works(place):
    for rank, outcome in enumerate(_fail(2, "raise", -1, place)):
        assert outcome.answer["first"]["raised"] == "ValueError"
        assert outcome.answer["first"]["text"] == f"boom on rank {rank}"
        assert ("returned" in outcome.answer["second"]) == (place != "operator")  # there, a transfer is under way


@pytest.mark.parametrize("kind", ["raise", "kill", pytest.param("sleep", marks=pytest.mark.exhaustive)])
def test_ranks_that_wait_for_others_name_the_one_that_failed(kind):
    outcomes = _fail(4, kind, 2, "middle")
    for rank in (0, 1, 3):
        told = outcomes[rank].answer["first"]
        assert (told["raised"], told["rank"], told["stage"]) == ("RankFailedError", 2, "denoising")


def test_an_uncaught_failure_ends_every_process_with_an_error_code():
    outcomes = on_mortal_ranks(2, failure_cases.uncaught, 0)
    assert [outcome.exit_code for outcome in outcomes] == [1, 1]
    assert all("ValueError: boom on rank 0" in outcome.printed for outcome in outcomes)


def test_a_rank_that_loads_or_compiles_is_waited_for():
    outcomes = on_mortal_ranks(2, failure_cases.slow_but_busy)
    assert [outcome.answer for outcome in outcomes] == [2.0, 2.0]


def test_calls_leave_no_thread_and_no_descriptor():
    for outcome in on_mortal_ranks(2, failure_cases.left_over):
        assert outcome.answer == {"threads": 0, "descriptors": 0}


def _record(operation: str = "", number: int = 0, members: tuple[int, ...] = (0, 1), **facts) -> Record:
    waiting = {Operation(operation, members): number} if operation else {}
    return Record(call=1, counts=dict(waiting), waiting=waiting, description=operation, **facts)


def test_who_waits_for_a_rank_that_waits_itself_waits_for_the_last_one():
    records = {0: _record("a", 3), 1: _record("b", 7, (1, 2)), 2: Record(call=1)}
    assert late_rank(0, records) == 2


def test_ranks_that_wait_for_each_other_blame_nobody():
    assert late_rank(0, {0: _record("a", 3), 1: _record("b", 7)}) is None
    assert late_rank(0, {0: _record("a", 3), 1: _record("a", 3)}) is None


def test_ranks_are_in_step_only_if_they_began_the_same_operations():
    operation = Operation("a", (0, 1))
    both = {operation: 3}
    assert in_step({0: Ended(1, both), 1: Ended(1, both)})
    assert not in_step({0: Ended(1, both), 1: Ended(1, {operation: 2})})
    assert not in_step({0: Ended(1, both), 1: Ended(1, both, open=1)})
    assert in_step({0: Ended(1, both), 1: Ended(1, both), 2: Ended(1, {})})


def test_the_first_error_counts_and_only_of_this_call():
    def ended(call: int, time: float, rank: int) -> Record:
        return Record(ended=Ended(call, {}, 0, time, Failure(rank, "", "raised")))

    records = {0: ended(2, 5.0, 0), 1: ended(2, 4.0, 1), 2: ended(1, 1.0, 2)}
    assert first_error(records, 2).rank == 1


def test_who_waits_for_a_rank_that_has_left_waits_for_that_one_first():
    everyone = (0, 1, 2)
    counts = {Operation("a", everyone): 2}
    gone = Record(call=1, ended=Ended(1, counts), counts=counts)
    assert late_rank(0, {0: _record("a", 3, everyone), 1: Record(call=1), 2: gone}) == 2
    assert late_rank(0, {0: _record("a", 2, everyone), 1: gone, 2: gone}) is None
