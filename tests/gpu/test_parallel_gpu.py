"""Several ranks over NCCL: what one GPU computes, CUDA graphs with transfers in them, and failures that end on all."""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.distributed import failure_ranks
from tests.distributed.failing_pipeline_cases import STAGES, TIMEOUT
from tests.gpu import parallel_gpu_cases as cases

RANKS = min(4, torch.cuda.device_count())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(RANKS < 2, reason="needs several CUDA devices")]
LAYOUTS = {
    2: [{"ulysses": 2}, {"ring": 2}, {"tensor": 2}],
    4: [{"ulysses": 4}, {"ring": 4}, {"ulysses": 2, "ring": 2}, {"ulysses": 2, "tensor": 2}, {"tensor": 4}],
}
GUIDED = {2: [{"cfg": 2}], 4: [{"cfg": 2, "ulysses": 2}, {"cfg": 2, "ring": 2}]}
LIMIT = 300.0
"""Seconds: on four GPUs fourteen meshes are made, by processes that have just begun to import."""
PIPELINES = {"flux_dev": False, "qwen_image": True, "wan22_t2v": True, "hunyuan_video": False}
on_mortal_ranks = functools.partial(failure_ranks.on_mortal_ranks, start="spawn")


@pytest.mark.parametrize("name", PIPELINES)
def test_layouts_give_what_one_gpu_gives_from_graphs_too_and_come_off(name):
    check(RANKS, name, LAYOUTS[RANKS] + (GUIDED[RANKS] if PIPELINES[name] else []))


@pytest.mark.parametrize("name", PIPELINES)
def test_heads_in_two_parts_give_what_one_gpu_gives_from_graphs_too(name):
    check(2, name, [{"ulysses": 2}], parts=True)


def check(ranks, name, layouts, **how):
    for outcome in on_mortal_ranks(ranks, cases.layouts, name, layouts, limit=LIMIT, **how):
        assert outcome.answer is not None, outcome.printed
        for layout, found in zip(layouts, outcome.answer, strict=True):
            print(name, layout, found)
            assert found["shared"] < 1e-4
            assert found["graphs"] == found["graphs, other prompt"] == 0.0, layout
            assert found["replayed"] > 0
            assert ("into the other GPUs' memory" in found["carrier"]) == ("ulysses" in layout), found["carrier"]
            assert found["removed"] == 0.0


@pytest.mark.parametrize("name", ["flux_dev", "qwen_image"])
def test_compiled_blocks_share_tokens(name):
    for outcome in on_mortal_ranks(RANKS, cases.compiled, name, {"ulysses": RANKS}, limit=LIMIT):
        assert outcome.answer is not None, outcome.printed
        assert max(outcome.answer.values()) < 1e-4, outcome.answer


def test_ranks_that_have_mapped_memory_elsewhere_before_map_each_others():
    for outcome in on_mortal_ranks(RANKS, cases.after_unequal_pasts, "flux_dev", limit=LIMIT):
        assert outcome.answer is not None, outcome.printed
        assert outcome.answer["shared"] < 1e-4
        assert "into the other GPUs' memory" in outcome.answer["carrier"], outcome.answer


def test_adapters_never_meet_a_stale_graph_with_transfers_in_it():
    for outcome in on_mortal_ranks(2, cases.adapters, {"ulysses": 2}, limit=LIMIT):
        assert outcome.answer is not None, outcome.printed
        found = outcome.answer
        print(found)
        assert max(found["differences"]) < 1e-4
        # A graph of before would give the latents of before; the third change disables what the fourth enables.
        assert min(found["apart"][:3]) > 1e-3
        assert found["dropped"] >= len(found["differences"]) - 1
        assert found["replayed"] > 2 * len(found["differences"])


@pytest.mark.parametrize("layout", [{"ulysses": 2}, {"tensor": 2}, {"cfg": 2}], ids=lambda layout: next(iter(layout)))
def test_remove_gives_the_memory_back(layout):
    for outcome in on_mortal_ranks(2, cases.memory_that_stays, "qwen_image", layout, limit=LIMIT):
        assert outcome.answer is not None, outcome.printed
        print(layout, outcome.answer)
        # Workspaces of libraries come with the first round and stay; what a round leaves would come again. Torch keeps
        # two lists of addresses of every memory that GPUs have shared (CUDAPeerAllocInfo), the least block for each.
        tables = 2 * 2 * 512 if "ulysses" in layout else 0
        assert outcome.answer["allocated"][2] <= outcome.answer["allocated"][0] + tables
        assert outcome.answer["used"][2] <= outcome.answer["used"][1]


@pytest.mark.parametrize("kind", ["raise", "kill later", "sleep"])
def test_a_rank_that_fails_at_any_stage_is_named_and_no_rank_hangs(kind):
    with ThreadPoolExecutor(len(STAGES)) as threads:
        runs = {
            stage: threads.submit(on_mortal_ranks, 2, cases.failing_calls, "qwen_image", kind, 1, stage, limit=90.0)
            for stage in STAGES
        }
    for stage, run in runs.items():
        outcomes = run.result()
        assert outcomes[0].answer is not None, outcomes[0].printed
        other = outcomes[0].answer
        told = other["first"] if "raised" in other["first"] else other["second"]
        assert (told["raised"], told["rank"], told["stage"]) == ("RankFailedError", 1, stage), told
        assert told["signal"] == ("SIGKILL" if kind == "kill later" else None)
        assert other["first"]["seconds"] < TIMEOUT + 10
