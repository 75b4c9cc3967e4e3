"""Ranks that work on one sample start with the same arguments and random state, or none of them starts."""

import re

import pytest
import torch

from pipeboost.core.fingerprint import digest
from tests.distributed import agreement_cases as cases
from tests.distributed.ranks import on_ranks

CONTRADICTIONS = {
    "prompts": "prompt='picture 0' on rank 0, but 'picture 1' on rank 1",
    "sizes": "height=64 on rank 0, but 80 on rank 1",
    "a size that is the default": "height=64 on rank 0, but 480 on rank 1",
    "a prompt on the last": "prompt=None on rank 0, but 'a cat' on rank 1",
    "another picture": "image=a picture 6x4 on rank 0, but a picture 6x4 on rank 1",
    "another tensor": "latents=a tensor (2, 2) of torch.float32 on rank 0",
    "another custom": "custom=a Custom on rank 0, but a Custom on rank 1",
    "a callback on the first": "callback=a callable on rank 0, but None on rank 1",
    "a generator on the last": "generator=None on rank 0, but a Generator on rank 1",
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_arguments_that_differ_raise_one_sentence_on_all_ranks_that_names_both_ways_out(case):
    found = on_ranks(2, cases.agree, case)
    assert found[0] == found[1]
    kind, text = found[0]
    assert kind == "DisagreementError"
    assert CONTRADICTIONS[case] in text
    assert "parallel=None" in text
    assert "ParallelConfig(replicas=...)" in text


@pytest.mark.parametrize("case", ["everything", "only the first"])
def test_every_kind_of_argument_is_the_same_on_all_ranks_wherever_it_was_given(case):
    first, second = on_ranks(2, cases.agree, case)
    for found in (first, second):
        assert [digest(picture) for picture in found["image"]] == [digest(each) for each in first["image"]]
        assert found["prompt"] == ["a cat", "a dog"]
        assert found["height"] == 64
        assert found["sigmas"].tolist() == [1.0, 0.75, 0.5]
        assert torch.equal(found["latents"], torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T)
        assert found["latents"].stride() == (1, 3)
        assert torch.equal(found["attention_kwargs"]["states"][0], torch.ones(2, dtype=torch.bool))
        assert found["attention_kwargs"]["ids"] == {1, 2, 3}
        assert found["custom"].value == {"a": 1}
        assert [drawn.tolist() for drawn in found["drawn"]] == [drawn.tolist() for drawn in first["drawn"]]
    assert torch.equal(first["drawn"][0], torch.rand(2, generator=torch.Generator().manual_seed(3)))
    assert first["kept generator"]
    assert second["kept generator"] == (case == "everything")


def test_an_unexpected_name_is_handed_on_so_that_stock_can_refuse_it_on_all_ranks():
    assert [found["scale"] for found in on_ranks(2, cases.agree, "an unexpected name")] == [0.5, 0.5]


@pytest.mark.parametrize("case", ["seeds", "lists of seeds", "one generator twice"])
def test_generators_draw_what_those_of_the_first_rank_draw(case):
    first, second = on_ranks(2, cases.agree, case)
    assert [each.tolist() for each in first["drawn"]] == [each.tolist() for each in second["drawn"]]
    assert second["kept generator"] == (case == "seeds")
    own = cases.arguments_of(case, 0)["generator"]
    expected = [torch.rand(2, generator=each) for each in (own if isinstance(own, list) else [own])]
    assert [each.tolist() for each in first["drawn"]] == [each.tolist() for each in expected]


@pytest.mark.parametrize("case", ["a prompt on all", "seeds"])
def test_the_global_random_state_is_that_of_the_first_rank(case):
    first, second = on_ranks(2, cases.random_state, case)
    assert first == second
    assert first[0] == torch.rand(2, generator=torch.Generator().manual_seed(0)).tolist()


def test_what_cannot_be_sent_raises_on_all_ranks_and_is_named():
    found = on_ranks(2, cases.agree, "an unpicklable")
    assert found[0] == found[1]
    assert re.match(r"image cannot be sent to other ranks \(.*lock.*\); let every rank make its own", found[0][1])


def test_a_call_after_a_contradiction_works():
    assert all(found["height"] == 64 for found in on_ranks(2, cases.raise_then_agree))


def test_three_ranks_of_four_take_what_the_first_has():
    found = on_ranks(4, cases.agree, "only the first", {"cfg": 2, "tensor": 2})
    assert [each["prompt"] for each in found] == [["a cat", "a dog"]] * 4


def test_replicas_keep_prompts_of_their_own():
    assert on_ranks(4, cases.of_replicas, "prompts") == ["picture 0", "picture 0", "picture 1", "picture 1"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("qwen_image", "nothing on the others"),
        ("wan21_i2v", "nothing on the others"),
        ("qwen_image", "no generator"),
        ("qwen_image", "other seeds"),
        ("wan21_t2v", "a scheduler that draws"),
    ],
)
def test_an_accelerated_pipeline_gives_every_rank_what_the_first_ranks_call_gives_alone(name, kind):
    found = on_ranks(2, cases.accelerated, name, {"cfg": 2}, kind)
    assert [each["difference"] for each in found] == [0.0, 0.0]


def test_an_accelerated_pipeline_refuses_prompts_that_differ_on_all_ranks_and_the_next_call_works():
    found = on_ranks(2, cases.accelerated, "qwen_image", {"cfg": 2}, "another prompt on the last")
    assert (
        "prompt='a small red fox walking in the snow' on rank 0, but 'two golden robots' on rank 1" in found[0]["error"]
    )
    assert found[0]["error"] == found[1]["error"]
    assert torch.equal(found[0]["again"], found[1]["again"])


@pytest.mark.parametrize("kind", ["same", "rounding", "all nan", "zeros"])
def test_latents_that_agree_but_for_rounding_pass(kind):
    assert on_ranks(2, cases.latents, kind, {"ring": 2}) == [None, None]


@pytest.mark.parametrize("kind", ["one token", "another sample", "another shape", "one nan"])
def test_latents_that_differ_raise_on_all_ranks_and_name_the_rank(kind):
    found = on_ranks(4, cases.latents, kind, {"cfg": 2, "ulysses": 2})
    assert len(set(found)) == 1
    assert "the latents of rank 3 are not those of rank 0" in found[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        ("a", b"a"),
        ([1, 2], (1, 2)),
        ([[1], 2], [1, [2]]),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        ({"a": 1}, {"a": 2}),
        ({"a", "b"}, {"a", "c"}),
        (cases.Custom(1), cases.Custom(2)),
    ],
    ids=["dtype", "bytes", "tuple", "nesting", "shape", "tensor dtype", "value", "set", "object"],
)
def test_a_digest_tells_values_apart(one, other):
    assert digest(one) != digest(other)


def test_a_digest_tells_no_difference_where_there_is_none():
    loop: list[object] = []
    loop.append(loop)
    for make in (
        lambda: {"b": torch.arange(4).reshape(2, 2).T, "a": {3, 1, "x"}},
        lambda: [float("nan"), None, cases.Custom([1]), object(), print, torch.float16],
        lambda: torch.zeros(0, 3),
        lambda: loop,
    ):
        assert digest(make()) == digest(make())
    assert digest(torch.arange(6).reshape(2, 3).T) == digest(torch.arange(6).reshape(2, 3).T.contiguous())
