"""Where components should live, told from numbers alone; and host memory whose views the weights are."""

import copy
import weakref

import pytest
import torch
from torch import nn

from pipeboost.contract.model_info import ComponentSize, ModelInfo
from pipeboost.contract.registry import family_named, generic_family
from pipeboost.core.config import AccelerationConfig, CompileConfig, OffloadConfig
from pipeboost.core.errors import ConfigurationError, PipeboostError
from pipeboost.core.families import Activations, Linear
from pipeboost.core.hardware import Hardware
from pipeboost.core.ledger import Ledger
from pipeboost.features.offload.budget import UNMEASURED, choose_policies, predict
from pipeboost.features.offload.host import HostStore
from pipeboost.features.offload.place import Placement, place, unmovable_weights
from pipeboost.plan import make_plan
from tests.moments import freed_at_once

GIB = 2**30
CPU = torch.device("cpu")
H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, 1, False, True)
FLUX = family_named("FluxPipeline")
NEEDS = Activations(Linear(0, GIB / 2**20), Linear(0, 2 * GIB / 2**20), 0, 1024, 1024, 1, "a test")
FLUX_DEV = (
    ComponentSize("text_encoder", "text_encoders", None, GIB // 4, GIB // 5, GIB // 60),
    ComponentSize("text_encoder_2", "text_encoders", None, int(9.5 * GIB), 9 * GIB, 9 * GIB // 24),
    ComponentSize("transformer", "transformers", "transformer", 22 * GIB, 21 * GIB, GIB // 2),
    ComponentSize("vae", "vae", None, GIB // 6, 0, 0),
)


def chosen(budget, settings=None, components=FLUX_DEV, activations=NEEDS, **options):
    return choose_policies(settings or OffloadConfig(), components, activations, budget, **options)[0]


def test_what_fits_stays_resident():
    assert set(chosen(40 * GIB).values()) == {"resident"}


def test_the_cheapest_that_fits_sends_the_text_encoders_through_beside_a_resident_transformer():
    policies = chosen(28 * GIB)
    assert policies == {"text_encoders": "layerwise", "transformers": "resident", "vae": "resident"}


def test_a_transformer_is_streamed_only_where_it_does_not_fit_alone():
    assert chosen(24 * GIB) == {"text_encoders": "stage", "transformers": "stage", "vae": "resident"}
    assert chosen(16 * GIB)["transformers"] == "layerwise"
    assert chosen(11 * GIB)["text_encoders"] == "stage"
    assert chosen(6 * GIB)["text_encoders"] == "layerwise"


def test_where_nothing_fits_one_sentence_says_what_is_needed():
    with pytest.raises(PipeboostError, match=r"offload finds 2.00 GiB on the device.* is 3.00 GiB") as caught:
        chosen(2 * GIB)
    assert "\n" not in str(caught.value)


def test_memory_given_is_the_budget_and_checks_a_policy_that_is_asked_for():
    assert chosen(80 * GIB, OffloadConfig(memory=24))["transformers"] == "stage"
    with pytest.raises(PipeboostError, match=r"offload finds 12.00 GiB"):
        chosen(80 * GIB, OffloadConfig("stage", memory=12))
    assert chosen(GIB, OffloadConfig("stage")) == dict.fromkeys(("text_encoders", "transformers", "vae"), "stage")


def test_a_kind_that_is_fixed_stays_fixed():
    policies = chosen(16 * GIB, OffloadConfig(text_encoders="layerwise"))
    assert policies["text_encoders"] == "layerwise"
    assert chosen(80 * GIB, OffloadConfig("stage", vae="resident"))["vae"] == "resident"


def test_the_peak_is_what_is_resident_and_the_hungriest_stage():
    staged = predict(FLUX_DEV, {"text_encoders": "stage", "transformers": "stage", "vae": "resident"}, NEEDS)
    assert staged["denoising"] == FLUX_DEV[3].nbytes + 22 * GIB + GIB
    assert staged["text encoding"] == FLUX_DEV[3].nbytes + FLUX_DEV[0].nbytes + FLUX_DEV[1].nbytes
    assert staged["decoding"] == FLUX_DEV[3].nbytes + 2 * GIB
    streamed = predict(FLUX_DEV, dict.fromkeys(staged and ("text_encoders", "transformers", "vae"), "layerwise"), NEEDS)
    assert streamed["denoising"] == GIB + 2 * GIB // 2 + GIB


def test_of_two_experts_only_one_counts():
    experts = [ComponentSize(f"transformer{n}", "transformers", f"transformer{n}", 28 * GIB, 0, 0) for n in ("", "_2")]
    helper = ComponentSize("controlnet", "transformers", None, GIB, 0, 0)
    staged = dict.fromkeys(("text_encoders", "transformers", "vae"), "stage")
    assert predict((*experts, helper), staged, NEEDS)["denoising"] == 30 * GIB


def test_activations_nobody_measured_are_set_aside_but_refuse_nothing():
    assert chosen(32 * GIB + UNMEASURED // 2, activations=None)["text_encoders"] == "stage"
    assert chosen(5 * GIB // 2, activations=None)["transformers"] == "layerwise"


def facts(components=FLUX_DEV, **more):
    return ModelInfo("FluxPipeline", torch.bfloat16, sum(c.nbytes for c in components), components=components, **more)


def planned(fact=None, hardware=H100, **settings):
    return make_plan(AccelerationConfig(**settings), hardware, FLUX, fact or facts())


def test_auto_with_room_is_off_and_the_plan_prints_the_prediction():
    made = planned()
    assert not made["offload"].on
    assert max(made.peaks.values()) >= sum(component.nbytes for component in FLUX_DEV)
    assert "predicted peak" in str(made)
    assert "transformer 22.00 GiB resident" in str(made)


def test_auto_without_room_places_and_a_pipeline_on_the_cpu_is_left():
    made = planned(facts(free=28 * GIB))
    assert made["offload"].settings == Placement(torch.device("cuda"), "layerwise", "resident", "resident")
    assert "text_encoder_2 9.50 GiB layerwise" in str(made)
    cpu = Hardware("cpu", "CPU", None, 8 * GIB, 1, False, True)
    assert not planned(hardware=cpu)["offload"].on
    assert planned(hardware=cpu, offload="stage")["offload"].on


def test_diffusers_own_offload_is_respected_and_a_policy_beside_it_refused():
    offloaded = facts(offloaded=True)
    assert "Diffusers' own" in planned(offloaded)["offload"].why
    assert not planned(offloaded, offload="resident")["offload"].on
    with pytest.raises(PipeboostError, match=r"pipe.remove_all_hooks\(\) first"):
        planned(offloaded, offload="stage")


def test_weights_that_cannot_move_are_refused_where_they_would_have_to():
    quantised = facts(unmovable={"transformer": "weights of type Int4Weight"}, free=24 * GIB)
    with pytest.raises(PipeboostError, match="offload cannot move transformer, which has weights of type Int4Weight"):
        planned(quantised, offload="stage")
    assert planned(quantised, offload=OffloadConfig("resident", text_encoders="stage"))["offload"].on
    assert "Int4Weight" in planned(quantised)["offload"].why


def test_streaming_and_compiling_the_whole_transformer_exclude_each_other():
    whole = CompileConfig(scope="full")
    with pytest.raises(ConfigurationError, match="compile='full'"):
        planned(offload="layerwise", compile=whole)
    assert planned(offload=OffloadConfig("layerwise", transformers="stage"), compile=whole)["offload"].on


@pytest.mark.parametrize(
    "settings", [{"policy": "disk"}, {"vae": "auto"}, {"transformers": "none"}, {"memory": 0}, {"memory": "24"}]
)
def test_settings_outside_of_what_is_allowed_are_refused(settings):
    with pytest.raises(ConfigurationError, match="offload"):
        OffloadConfig(**settings)


class Stack(nn.Module):
    """A chain of linears with a tied pair, a transposed weight, a scalar buffer and an empty parameter."""

    def __init__(self, blocks=5):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(blocks))
        self.last = nn.Linear(8, 8, bias=False)
        self.last.weight = self.first.weight
        self.turned = nn.Parameter(torch.randn(6, 8).t())
        self.register_buffer("scale", torch.tensor(0.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))

    def forward(self, sample):
        sample = self.first(sample)
        for block in self.blocks:
            sample = block(sample) + sample
        return self.last(sample) @ self.turned * self.scale


@pytest.mark.parametrize("limit", [2**30, 300, 1])
def test_a_store_keeps_bits_strides_ties_and_identities(limit):
    module = Stack()
    tensors = [*module.parameters(), *module.buffers()]
    alias = nn.Parameter(module.turned.data)
    before = [(tensor.clone(), tensor.stride()) for tensor in tensors]
    store = HostStore(CPU, chunk=limit)
    store.adopt([*tensors, alias])
    assert alias.data_ptr() == module.turned.data_ptr()
    store.adopt([*tensors, alias])
    buffers = [chunk.host.clone() for chunk in store.chunks]
    for state in (lambda: store.load(buffers), lambda: store.unload(buffers), store.release):
        state()
        for tensor, (value, stride) in zip(tensors, before, strict=True):
            assert torch.equal(tensor, value)
            assert tensor.stride() == stride
        assert alias.data_ptr() == module.turned.data_ptr()
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}) == len(tensors) - 1


def test_what_changes_on_the_device_is_written_back_and_what_moves_is_noticed():
    module = Stack()
    store = HostStore(CPU)
    store.adopt(module.parameters())
    buffers = [chunk.host.clone() for chunk in store.chunks]
    store.load(buffers)
    with torch.no_grad():
        module.first.weight.fill_(3.0)
    module.first.bias.data = torch.full((8,), 4.0)
    assert not store.unload(buffers)
    assert torch.equal(module.last.weight, torch.full((8, 8), 3.0))
    assert torch.equal(module.first.bias, torch.full((8,), 4.0))
    assert not store.holds(module.parameters())
    store.adopt(module.parameters())
    assert store.holds(module.parameters())
    assert torch.equal(module.first.bias, torch.full((8,), 4.0))


def test_a_store_lets_go_of_what_left_and_takes_in_what_came_without_packing_all_anew():
    module = Stack()
    store = HostStore(CPU)
    store.adopt(module.parameters())
    first = store.chunks[0]
    extra = nn.Parameter(torch.randn(300))
    store.adopt([*module.parameters(), extra])
    assert store.chunks[0] is first
    assert len(store.chunks) == 2
    store.adopt(module.parameters())
    assert store.chunks == [first]
    store.adopt([module.first.weight])
    assert store.chunks[0] is not first
    assert store.nbytes == 512


def placed(module, policy, ledger, path="text_encoder"):
    place(path, module, Placement(CPU, policy, policy, policy), generic_family("P", {"transformer": True}), ledger)
    return module


@pytest.mark.parametrize("policy", ["stage", "layerwise"])
def test_a_placed_module_works_outside_of_a_call_and_comes_off_to_the_bit(policy):
    module, sample = Stack(), torch.randn(2, 8)
    twin = copy.deepcopy(module)
    expected = module(sample)
    with Ledger() as ledger:
        placed(module, policy, ledger)
        waiting = module.first.weight.data_ptr()
        assert torch.equal(module(sample), expected)
        assert torch.equal(module.blocks[1](sample), twin.blocks[1](sample))
        assert module.first.weight.data_ptr() == waiting
        assert set(module.state_dict()) == set(twin.state_dict())
        ledger.undo()
    assert torch.equal(module(sample), expected)
    assert type(module) is Stack
    assert vars(module).keys() == vars(twin).keys()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))
    assert module.last.weight is module.first.weight


def test_streamed_blocks_that_share_a_weight_or_run_out_of_order_are_right():
    module, sample = Stack(6), torch.randn(2, 8)
    module.blocks[4][0].weight = module.blocks[1][0].weight
    module.forward = lambda x: module.blocks[2](module.blocks[4](module.blocks[1](module.blocks[4](x))))
    expected = module(sample)
    with Ledger() as ledger:
        placed(module, "layerwise", ledger)
        for _ in range(3):
            assert torch.equal(module(sample), expected)
        ledger.undo()
    assert module.blocks[4][0].weight is module.blocks[1][0].weight


def test_a_module_that_is_dropped_frees_its_host_memory_at_once():
    module, ledger = Stack(), Ledger()
    placed(module, "layerwise", ledger)
    module(torch.randn(2, 8))
    alive = weakref.ref(module.first.weight), weakref.ref(module)
    with freed_at_once():
        del module
        assert [reference() for reference in alive] == [None, None]
    ledger.undo()


def test_an_error_inside_a_streamed_block_leaves_everything_on_the_host():
    module = Stack()
    with Ledger() as ledger:
        placed(module, "layerwise", ledger)
        with pytest.raises(RuntimeError, match="shapes"):
            module.blocks[0](torch.randn(2, 9))
        sample = torch.randn(2, 8)
        streamed = module(sample)
        ledger.undo()
    assert torch.equal(module(sample), streamed)


def test_weights_of_special_types_are_told():
    class Packed(nn.Parameter):
        pass

    module = nn.Linear(2, 2)
    assert unmovable_weights(module) is None
    module.weight = Packed(torch.zeros(2, 2))
    assert unmovable_weights(module) == "weights of type Packed"
    with torch.device("meta"):
        assert unmovable_weights(nn.Linear(2, 2)) == "weights on the meta device"
