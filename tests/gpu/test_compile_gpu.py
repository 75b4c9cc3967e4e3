"""Compile on a GPU: as exact as stock's own compile, and no graph beyond one a block class."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, HunyuanVideoTransformer3DModel, QwenImageTransformer2DModel
from torch import nn

from pipeboost.contract.call import open_call
from pipeboost.contract.registry import families
from pipeboost.core.config import CompileConfig
from pipeboost.core.families import Family
from pipeboost.core.ledger import Ledger
from pipeboost.features.compile import compile_model

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def family(name: str) -> Family:
    return next(family for family in families() if family.name == name)


def on_gpu(build: Any, **config: Any) -> nn.Module:
    """A bf16 model on the GPU whose weights give activations near 1."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = build(**config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.02)
    return model.to(torch.bfloat16)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def flux_inputs(side: int = 32, *, seed: int = 0) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    return {
        "hidden_states": draw(1, side * side, 64, seed=seed),
        "encoder_hidden_states": draw(1, 512, 4096, seed=seed + 1),
        "pooled_projections": draw(1, 768, seed=seed + 2),
        "timestep": torch.tensor([0.5], device="cuda", dtype=torch.bfloat16),
        "guidance": torch.tensor([3.5], device="cuda"),
        "img_ids": ids.to("cuda", torch.bfloat16),
        "txt_ids": torch.zeros(512, 3, device="cuda", dtype=torch.bfloat16),
        "return_dict": False,
    }


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    return ((output.double() - reference.double()).norm() / reference.double().norm()).item()


def test_flux_in_a_call_is_as_near_to_eager_as_stock_compile() -> None:
    model = on_gpu(FluxTransformer2DModel, guidance_embeds=True, num_layers=4, num_single_layers=8)
    stock_compiled = copy.deepcopy(model)
    stock_compiled.compile_repeated_blocks(fullgraph=True)
    inputs = flux_inputs()
    eager = model(**inputs)[0]
    stock_error = relative_error(stock_compiled(**inputs)[0], eager)
    with Ledger() as ledger:
        report = compile_model(model, CompileConfig(), family("flux"), ledger)
        with open_call(None, owner=None):
            ours = model(**inputs)[0]
            assert report.counters.graphs == 2
            model(**flux_inputs(seed=7))
            assert report.counters.graphs == 2
            model(**flux_inputs(side=24))
            assert report.counters.graphs == 4
        assert relative_error(ours, eager) <= 1.2 * stock_error
        assert torch.equal(model(**inputs)[0], eager)
        ledger.undo()
    assert torch.equal(model(**inputs)[0], eager)


def test_qwen_image_runs_prompts_of_any_length_on_one_graph() -> None:
    model = on_gpu(QwenImageTransformer2DModel, num_layers=4)
    with Ledger() as ledger:
        report = compile_model(model, CompileConfig(), family("qwen_image"), ledger)
        for text in (7, 200, 64, 33):
            inputs = {
                "hidden_states": draw(1, 1024, 64),
                "encoder_hidden_states": draw(1, text, 3584),
                "timestep": torch.tensor([0.5], device="cuda", dtype=torch.bfloat16),
                "img_shapes": [[(1, 32, 32)]],
                "return_dict": False,
            }
            eager = model(**inputs)[0]
            with open_call(None, owner=None):
                assert relative_error(model(**inputs)[0], eager) < 5e-2
            assert report.counters.graphs == 1
        ledger.undo()


def test_hunyuan_video_runs_prompts_of_any_length_on_one_graph_a_block_class() -> None:
    model = on_gpu(HunyuanVideoTransformer3DModel, guidance_embeds=True, num_layers=2, num_single_layers=4)
    with Ledger() as ledger:
        report = compile_model(model, CompileConfig(), family("hunyuan_video"), ledger)
        for text in (7, 200, 64):
            inputs = {
                "hidden_states": draw(1, 16, 5, 32, 32),
                "encoder_hidden_states": draw(1, text, 4096),
                "encoder_attention_mask": torch.ones(1, text, device="cuda", dtype=torch.long),
                "pooled_projections": draw(1, 768),
                "timestep": torch.tensor([500.0], device="cuda", dtype=torch.bfloat16),
                "guidance": torch.tensor([6000.0], device="cuda"),
                "return_dict": False,
            }
            eager = model(**inputs)[0]
            with open_call(None, owner=None):
                assert relative_error(model(**inputs)[0], eager) < 5e-2
            assert report.counters.graphs == 2
        ledger.undo()


def test_weights_that_leave_and_come_back_need_no_new_graph() -> None:
    model = on_gpu(FluxTransformer2DModel, guidance_embeds=True, num_layers=1, num_single_layers=2)
    with Ledger() as ledger:
        report = compile_model(model, CompileConfig(), family("flux"), ledger)
        inputs = flux_inputs()
        with open_call(None, owner=None):
            before = model(**inputs)[0]
            model.to("cpu")
            model.to("cuda")
            assert torch.equal(model(**inputs)[0], before)
        assert report.counters.graphs == 2
        ledger.undo()
