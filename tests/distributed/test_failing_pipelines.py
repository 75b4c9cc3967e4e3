"""A pipeline's call that fails on one of two ranks ends on both, wherever that is."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.distributed import failing_pipeline_cases
from tests.distributed.failing_pipeline_cases import STAGES, TIMEOUT
from tests.distributed.failure_ranks import on_mortal_ranks
from tests.parameters import exhaustive

NAME = "qwen_image"
FAILURES = [("kill later", 0), ("sleep", 1), *exhaustive(("kill later", 1), ("sleep", 0))]


def test_each_rank_in_turn_raises_at_each_stage_and_the_pipeline_can_be_accelerated_anew():
    answers = [outcome.answer for outcome in on_mortal_ranks(2, failing_pipeline_cases.raising_calls, NAME)]
    for rank in (0, 1):
        for stage in STAGES:
            failed, other = (answers[index]["raised"][rank, stage] for index in (rank, 1 - rank))
            assert (failed["raised"], failed["text"]) == ("ValueError", f"boom on rank {rank}")
            if "returned" in other:  # it needed nothing of the other any more
                assert stage == "decoding"
                continue
            assert (other["raised"], other["rank"], other["stage"]) == ("RankFailedError", rank, stage)
            assert f"ValueError: boom on rank {rank}" in other["traceback"]
    assert [answer["differences"] for answer in answers] == [[0.0] * 7] * 2


@pytest.mark.parametrize(("kind", "rank"), FAILURES)
def test_a_rank_that_is_killed_or_sleeps_at_any_stage_is_named_and_no_rank_hangs(kind, rank):
    with ThreadPoolExecutor(len(STAGES)) as threads:
        runs = {stage: threads.submit(_failing, kind, rank, stage) for stage in STAGES}
    for stage, run in runs.items():
        outcomes = run.result()
        other = outcomes[1 - rank].answer
        told = other["first"] if "raised" in other["first"] else other["second"]
        assert (told["raised"], told["rank"], told["stage"]) == ("RankFailedError", rank, stage), told
        assert told["signal"] == ("SIGKILL" if kind == "kill later" else None)
        assert outcomes[rank].exit_code == (-9 if kind == "kill later" else 1)
        assert other["first"]["seconds"] < TIMEOUT + 10


def test_after_a_prompt_that_the_script_refuses_the_next_call_has_the_same_groups():
    for outcome in on_mortal_ranks(2, failing_pipeline_cases.bad_prompts, NAME):
        raised = {refused["raised"] for refused in outcome.answer["refused"]}
        assert not raised & {"RankFailedError", "PipeboostError"}
        assert outcome.answer["difference"] == 0.0


def _failing(kind: str, rank: int, stage: str):
    return on_mortal_ranks(2, failing_pipeline_cases.failing_calls, NAME, kind, rank, stage)
