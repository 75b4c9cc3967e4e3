"""Residency on a GPU: pinned copies on a stream of their own, the same bits, and memory that really falls."""

import copy

import pytest
import torch
from torch import nn

from pipeboost import OffloadConfig, accelerate_pipeline
from pipeboost.contract.call import open_call
from pipeboost.contract.registry import generic_family
from pipeboost.core.ledger import Ledger
from pipeboost.features.offload.place import Placement, _placed, place
from tests.pipelines.tiny import TINY, load_tiny_lora

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
MIB = 2**20
EXACT = {"quality": "exact", "reuse": None}


class Tower(nn.Module):
    """Linears of 32 MiB each, in a list of blocks, between two of its own."""

    def __init__(self, blocks=12):
        super().__init__()
        self.first = nn.Linear(4096, 4096, dtype=torch.bfloat16)
        self.blocks = nn.ModuleList(nn.Linear(4096, 4096, dtype=torch.bfloat16) for _ in range(blocks))
        self.last = nn.Linear(4096, 4096, dtype=torch.bfloat16)

    def forward(self, sample):
        sample = self.first(sample)
        for block in self.blocks:
            sample = sample + block(sample)
        return self.last(sample)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return Tower().to(CUDA)


def placed(module, policy, ledger, path="text_encoder"):
    place(path, module, Placement(CUDA, policy, policy, policy), generic_family("P", {"transformer": True}), ledger)


def peak_of(run):
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("policy", ["stage", "layerwise"])
def test_waiting_weights_are_pinned_take_no_device_memory_and_come_back_to_the_bit(tower, policy):
    sample = torch.randn(64, 4096, device=CUDA, dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    expected = tower(sample)
    weights = {name: value.clone().cpu() for name, value in tower.state_dict().items()}
    with Ledger() as ledger:
        placed(tower, policy, ledger)
        assert torch.cuda.memory_allocated() < before - 400 * MIB
        assert all(chunk.host.is_pinned() for chunk in _placed[tower]._store.chunks)
        for _ in range(5):
            assert torch.equal(tower(sample), expected)
        assert tower.first.weight.device.type == "cpu"
        ledger.undo()
    assert all(value.device == CUDA for value in tower.state_dict().values())
    assert all(torch.equal(value.cpu(), weights[name]) for name, value in tower.state_dict().items())
    assert torch.equal(tower(sample), expected)


def test_streaming_takes_the_memory_of_two_blocks(tower):
    sample = torch.randn(64, 4096, device=CUDA, dtype=torch.bfloat16)
    with Ledger() as ledger:
        placed(tower, "stage", ledger)
        _, whole = peak_of(lambda: tower(sample))
        ledger.undo()
    with Ledger() as ledger:
        placed(tower, "layerwise", ledger)
        _, streamed = peak_of(lambda: tower(sample))
        ledger.undo()
    assert whole > 14 * 32 * MIB
    assert streamed < 4.5 * 32 * MIB


def test_a_slot_is_not_overwritten_while_its_block_computes(tower):
    """Large inputs make the computation slower than the copies, small ones the copies slower than it."""
    for rows in (16, 32768):
        sample = torch.randn(rows, 4096, device=CUDA, dtype=torch.bfloat16)
        expected = tower(sample)
        with Ledger() as ledger:
            placed(tower, "layerwise", ledger)
            with open_call(None, owner=None):
                results = [tower(sample) for _ in range(4)]
            ledger.undo()
        assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("policy", ["stage", "layerwise"])
@pytest.mark.parametrize("name", ["flux_dev", "flux_controlnet", "qwen_image", "wan22_t2v", "hunyuan_video"])
def test_pipelines_are_bit_identical_whether_they_were_on_the_gpu_or_not(name, policy, where):
    entry = TINY[name]
    stock = entry.call(entry.build().to("cuda"))
    pipe = accelerate_pipeline(entry.build().to(where), offload=policy, **EXACT)
    assert pipe._execution_device == CUDA
    for _ in range(2):
        assert torch.equal(entry.call(pipe).cpu(), stock.cpu())
    with pipe.acceleration.paused():
        assert torch.equal(entry.call(pipe).cpu(), stock.cpu())
    pipe.acceleration.remove()
    assert pipe.transformer.device.type == where
    assert torch.equal(entry.call(pipe.to("cuda")).cpu(), stock.cpu())


def test_memory_falls_after_each_stage_and_after_the_call():
    entry = TINY["wan22_t2v"]
    pipe = accelerate_pipeline(entry.build(), offload="stage", **EXACT)
    entry.call(pipe)
    seen = []

    def look(_, step, timestep, kwargs):
        seen.append({path for path, module in pipe.components.items() if getattr(module, "device", None) == CUDA})
        return kwargs

    before = torch.cuda.memory_allocated()
    entry.call(pipe, callback_on_step_end=look)
    assert seen == [{"transformer"}] * 2 + [{"transformer_2"}] * 2
    assert torch.cuda.memory_allocated() <= before
    assert {load.component for load in pipe.acceleration.report().loads} >= {"transformer", "transformer_2", "vae"}


@pytest.mark.parametrize("policy", ["stage", "layerwise"])
def test_compiled_blocks_need_no_graph_beyond_the_first_ones(policy):
    entry = TINY["flux_dev"]
    resident = accelerate_pipeline(entry.build().to("cuda"))
    expected = entry.call(resident)
    pipe = accelerate_pipeline(entry.build(), offload=policy)
    assert pipe.acceleration.plan["compile"].choice == "regional"
    for _ in range(2):
        assert (entry.call(pipe).float().cpu() - expected.float().cpu()).abs().max() == 0
    assert sum(counters["graphs"] for counters in pipe.acceleration.report().compiled.values()) <= 2


@pytest.mark.parametrize("policy", ["stage", "layerwise"])
def test_a_lora_loaded_between_calls_is_picked_up(policy):
    entry = TINY["flux_dev"]
    reference = entry.build().to("cuda")
    load_tiny_lora(reference)
    expected = entry.call(reference)
    pipe = accelerate_pipeline(entry.build(), offload=policy, **EXACT)
    entry.call(pipe)
    load_tiny_lora(pipe)
    assert torch.equal(entry.call(pipe).cpu(), expected.cpu())


def test_auto_on_a_gpu_with_room_adds_no_layer_and_without_room_places():
    entry = TINY["flux_dev"]
    pipe = accelerate_pipeline(entry.build().to("cuda"), **EXACT)
    assert not pipe.acceleration.plan["offload"].on
    assert "predicted peak" in str(pipe.acceleration.plan)
    assert not any(module in _placed for module in pipe.components.values() if isinstance(module, nn.Module))


def test_a_pipeline_on_the_cpu_runs_on_the_gpu_only_under_a_policy():
    entry = TINY["flux_dev"]
    pipe = accelerate_pipeline(entry.build(), **EXACT)
    assert pipe._execution_device.type == "cpu"
    accelerate_pipeline(pipe, offload=OffloadConfig("stage", vae="resident"), **EXACT)
    assert pipe._execution_device == CUDA
    assert pipe.vae.device == CUDA
    expected = entry.call(entry.build().to("cuda"))
    assert torch.equal(entry.call(pipe).cpu(), expected.cpu())
    accelerate_pipeline(pipe, offload=None, **EXACT)
    assert pipe.vae.device.type == pipe._execution_device.type == "cpu"


def test_components_called_outside_of_a_call_take_inputs_from_wherever_the_user_has_them():
    entry = TINY["flux_dev"]
    stock = copy.deepcopy(entry.build()).to("cuda")
    pipe = accelerate_pipeline(entry.build().to("cuda"), offload="stage", **EXACT)
    latents = torch.randn(1, 4, 8, 8)
    expected = stock.vae.decode(latents.to(CUDA)).sample
    assert torch.equal(pipe.vae.decode(latents.to(CUDA)).sample, expected)
    assert torch.equal(pipe.vae.decode(latents).sample, expected)
