"""Compile under stock pipelines: the stock script runs unchanged, and a second request compiles nothing."""

import pytest
import torch
from diffusers import DiffusionPipeline

from pipeboost.contract.call import open_call
from pipeboost.contract.registry import family_of
from pipeboost.core.config import CompileConfig
from pipeboost.core.ledger import Ledger
from pipeboost.features.compile import CompiledModel, compile_model
from tests.parameters import often
from tests.pipelines.tiny import OTHER_PROMPT, TINY

# How many graphs a request costs at first: one a block class, and one more for each set of arguments that differs in
# more than sizes (Wan2.2's TI2V hands its blocks one timestep a token with an image, its experts share their graphs).
GRAPHS = {
    "flux_true_cfg": 2,
    "flux_controlnet": 2,
    "flux_ip_adapter": 2,
    "qwen_image": 1,
    "qwen_image_edit_plus": 1,
    "wan21_i2v": 1,
    "wan22_t2v": 1,
    "wan22_ti2v_image": 1,
    "hunyuan_video": 2,
    "hunyuan_video_i2v_token_replace": 2,
}


def compile_pipe(pipe: DiffusionPipeline, ledger: Ledger) -> list[CompiledModel]:
    """Compile all transformers as they are, with a backend of their own, so that no other test's graphs fit them."""
    family = family_of(pipe)
    settings = CompileConfig(backend=lambda graph, _: graph.forward, rewrites=())
    return [compile_model(model, settings, family, ledger) for model in family.models(pipe).values()]


def graphs(reports: list[CompiledModel]) -> int:
    return sum(report.counters.graphs for report in reports)


@pytest.mark.parametrize("name", often(["flux_true_cfg", "wan22_ti2v_image"], GRAPHS))
def test_a_second_request_compiles_nothing_and_equals_stock(name: str) -> None:
    entry = TINY[name]
    pipe = entry.build()
    first = entry.call(pipe)
    second = entry.call(pipe, prompt=OTHER_PROMPT, seed=1, steps=entry.steps + 1)
    with Ledger() as ledger:
        reports = compile_pipe(pipe, ledger)
        with open_call(pipe, owner=None):
            assert torch.equal(entry.call(pipe), first)
            assert graphs(reports) == GRAPHS[name]
            assert torch.equal(entry.call(pipe, prompt=OTHER_PROMPT, seed=1, steps=entry.steps + 1), second)
            assert graphs(reports) == GRAPHS[name]
        ledger.undo()
    assert torch.equal(entry.call(pipe), first)


@pytest.mark.parametrize("name", ["sd3", "pixart_sigma"])
def test_a_model_without_a_family_compiles_the_blocks_that_diffusers_declares_or_its_longest_lists(name: str) -> None:
    entry = TINY[name]
    pipe = entry.build()
    stock = entry.call(pipe)
    with Ledger() as ledger:
        (report,) = compile_pipe(pipe, ledger)
        with open_call(pipe, owner=None):
            assert torch.equal(entry.call(pipe), stock)
            made = graphs([report])
            entry.call(pipe, prompt=OTHER_PROMPT, seed=1)
            assert graphs([report]) == made
        assert report.modules == len(pipe.transformer.transformer_blocks)
        ledger.undo()
