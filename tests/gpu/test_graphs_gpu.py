"""CUDA graphs on a GPU: replays equal eager to the bit on fresh inputs, whatever changed; failures are mended."""

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from pipeboost import CompileConfig, accelerate_pipeline
from pipeboost.contract.call import open_call
from pipeboost.contract.registry import families
from pipeboost.core.ledger import Ledger
from pipeboost.features.attention import trim_padded_text
from pipeboost.features.compile import compile_model
from pipeboost.features.graphs import Graphs, capture_graphs, graphs
from tests.pipelines.tiny import TINY, load_tiny_lora, lora_state_dict, tiny_names

pytestmark = pytest.mark.gpu
FAMILIES = ("flux", "qwen_image", "wan", "hunyuan_video")
GRAPHS_ALONE = CompileConfig(scope=None, graphs=True)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, nn.Module, dict[str, Any]]:
    entry = TINY[name]
    pipe = entry.build().to("cuda", dtype)
    return pipe, pipe.transformer, entry.forward_inputs(pipe)


def fresh(value: Any, seed: int) -> Any:
    """The same arguments with other numbers in their floating-point tensors; positions and masks stay."""
    if torch.is_tensor(value):
        if not value.is_floating_point() or value.dim() == 0:
            return value.clone()
        generator = torch.Generator("cuda").manual_seed(seed)
        noise = torch.rand(value.shape, generator=generator, device="cuda", dtype=torch.float32)
        return (value + noise).to(value.dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(fresh(item, seed + index) for index, item in enumerate(value))
    if isinstance(value, dict):
        return {key: fresh(item, seed + index) for index, (key, item) in enumerate(value.items())}
    return value


def in_call(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with open_call(None, owner=None):
        return model(**inputs)[0]


def assert_replays_are_eager(model: nn.Module, inputs: dict[str, Any], counts: Any, times: int = 6) -> None:
    """Runs it on fresh inputs, and expects replays from the third run on."""
    before = counts.replayed
    kept = []
    for seed in range(times):
        given = fresh(inputs, 100 * seed)
        kept.append((in_call(model, given), model(**given)[0]))
    for ours, eager in kept:
        assert torch.equal(ours, eager)
    assert counts.replayed - before >= times - 2, dict(counts.eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny_names(*FAMILIES))
def test_replays_equal_eager_to_the_bit_on_fresh_inputs(name: str, dtype: torch.dtype) -> None:
    _, model, inputs = tiny_model(name, dtype)
    with Ledger() as ledger:
        assert_replays_are_eager(model, inputs, capture_graphs(model, True, ledger).counts)
        ledger.undo()


@pytest.mark.parametrize("name", tiny_names(*FAMILIES))
def test_exact_with_graphs_is_bit_identical_and_comes_off(name: str) -> None:
    entry = TINY[name]
    pipe = entry.build().to("cuda")
    stock = [entry.call(pipe, steps=6, seed=seed) for seed in range(2)]
    accelerate_pipeline(pipe, quality="exact", compile=GRAPHS_ALONE)
    for seed in (0, 1, 0):
        assert torch.equal(entry.call(pipe, steps=6, seed=seed), stock[seed])
    found = pipe.acceleration.report().graphs["transformer"]
    assert found["replayed"] > 0, found
    # Wan's timesteps are views into the schedule, of which every other one begins in the middle of a memory word.
    assert not any("memory word" in reason for reason in found["eager"]), found
    assert "CUDA graphs: transformer" in str(pipe.acceleration.report())
    pipe.acceleration.remove()
    assert torch.equal(entry.call(pipe, steps=6), stock[0])


def test_shapes_of_equal_tensors_have_graphs_of_their_own() -> None:
    _, model, inputs = tiny_model("qwen_image")
    (first, *rest), *_ = inputs["img_shapes"]
    turned = [[(first[0], first[1] * 2, first[2] // 2), *rest]]
    with Ledger() as ledger:
        counts = capture_graphs(model, True, ledger).counts
        for shapes in (inputs["img_shapes"], turned, inputs["img_shapes"]):
            assert_replays_are_eager(model, {**inputs, "img_shapes": shapes}, counts, times=4)
        assert counts.captured == 2
        one, other = (in_call(model, {**inputs, "img_shapes": shapes}) for shapes in (inputs["img_shapes"], turned))
        assert not torch.equal(one, other)
        ledger.undo()


def test_prompts_of_one_length_and_of_two_have_graphs_of_their_own_though_their_shapes_are_equal() -> None:
    _, model, inputs = tiny_model("hunyuan_video")
    family = next(family for family in families() if family.name == "hunyuan_video")
    inputs = {
        name: torch.cat([value, value]) if torch.is_tensor(value) and value.dim() else value
        for name, value in inputs.items()
    }
    one_length = torch.zeros_like(inputs["encoder_attention_mask"])
    one_length[:, :5] = 1
    two_lengths = one_length.clone()
    two_lengths[1, 3:] = 0
    with Ledger() as ledger:
        trim_padded_text(model, family, ledger)
        given = [{**inputs, "encoder_attention_mask": mask} for mask in (one_length, two_lengths)]
        expected = [in_call(model, each) for each in given]
        counts = capture_graphs(model, True, ledger).counts
        for _ in range(4):
            for each, output in zip(given, expected, strict=True):
                assert torch.equal(in_call(model, each), output)
        assert counts.captured == 2
        assert not torch.equal(*expected)
        ledger.undo()


def test_adapters_and_their_scales_never_meet_a_stale_graph() -> None:
    entry = TINY["flux_dev"]
    pipe = entry.build().to("cuda")
    other = lora_state_dict(pipe.transformer, rank=2, seed=3)
    load_tiny_lora(pipe)
    pipe.load_lora_weights(other, adapter_name="other")
    twin = copy.deepcopy(pipe)
    accelerate_pipeline(pipe, quality="exact", compile=GRAPHS_ALONE)
    changes: list[Callable[[Any], Any]] = [
        lambda pipe: pipe.set_adapters(["tiny"], [1.0]),
        lambda pipe: pipe.set_adapters(["tiny"], [0.25]),
        lambda pipe: pipe.set_adapters(["tiny", "other"], [0.5, 0.5]),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.delete_adapters("other"),
    ]
    outputs = []
    for change in changes:
        change(pipe)
        change(twin)
        outputs.append(entry.call(pipe, steps=5))
        assert torch.equal(outputs[-1], entry.call(twin, steps=5))
    for scale in (0.5, 0.75):
        call = {"joint_attention_kwargs": {"scale": scale}, "steps": 5}
        assert torch.equal(entry.call(pipe, **call), entry.call(twin, **call))
    for each in (pipe, twin):
        each.unload_lora_weights()
    assert torch.equal(entry.call(pipe, steps=5), entry.call(twin, steps=5))
    assert not torch.equal(outputs[0], outputs[1])
    found = pipe.acceleration.report().graphs["transformer"]
    assert found["dropped"] >= len(changes) - 1
    assert found["replayed"] >= 3 * len(changes)
    pipe.acceleration.remove()
    assert torch.equal(entry.call(pipe), entry.call(twin))


def test_weights_that_were_replaced_moved_or_written_are_the_ones_that_count() -> None:
    _, model, inputs = tiny_model("flux_dev")
    linear = model.transformer_blocks[0].attn.to_q
    with Ledger() as ledger:
        counts = capture_graphs(model, True, ledger).counts
        assert_replays_are_eager(model, inputs, counts)
        linear.weight.mul_(2)
        assert torch.equal(in_call(model, inputs), model(**inputs)[0])
        assert counts.dropped == 0
        linear.weight = nn.Parameter(torch.randn_like(linear.weight))
        assert_replays_are_eager(model, inputs, counts)
        model.to("cpu")
        blocker = torch.empty(2**20, device="cuda")
        model.to("cuda")
        assert_replays_are_eager(model, inputs, counts)
        assert counts.captured == 3
        del blocker
        ledger.undo()


def test_two_pipelines_that_share_a_transformer_keep_graphs_of_their_own() -> None:
    entry = TINY["flux_dev"]
    pipe = entry.build().to("cuda")
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    stock = entry.call(pipe, steps=6)
    accelerate_pipeline(pipe, quality="exact", compile=GRAPHS_ALONE)
    accelerate_pipeline(other, quality="exact", compile=None)
    for _ in range(2):
        assert torch.equal(entry.call(pipe, steps=6), stock)
        assert torch.equal(entry.call(other, steps=6), stock)
    accelerate_pipeline(other, quality="exact", compile=GRAPHS_ALONE)
    for _ in range(2):
        assert torch.equal(entry.call(pipe, steps=6), stock)
        assert torch.equal(entry.call(other, steps=6), stock)
    assert other.acceleration.report().graphs["transformer"]["replayed"] > 0
    pipe.acceleration.remove()
    assert torch.equal(entry.call(other, steps=6), stock)
    other.acceleration.remove()


@pytest.mark.parametrize("streams", [False, True])
def test_views_in_threads_give_what_they_give_alone(streams: bool) -> None:
    entry = TINY["flux_dev"]
    pipe = entry.build().to("cuda")
    expected = [entry.call(pipe, steps=8, seed=seed) for seed in range(3)]
    accelerate_pipeline(pipe, quality="exact", compile=GRAPHS_ALONE)
    entry.call(pipe, steps=4)
    found: dict[int, torch.Tensor] = {}

    def one(seed: int) -> None:
        view = copy.copy(pipe)
        view.scheduler = copy.deepcopy(pipe.scheduler)
        stream = torch.cuda.Stream() if streams else torch.cuda.current_stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            found[seed] = entry.call(view, steps=8, seed=seed)
            stream.synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(3))
    assert pipe.acceleration._applied.components[id(pipe.transformer)].counters["graphs"].counts.replayed > 0


class Waiting(nn.Module):
    """A model whose forward waits for the device in a way of its own."""

    def __init__(self, wait: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64, device="cuda")
        self.wait = wait

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        x = self.linear(x)
        self.wait(x)
        return (self.linear(x),)


@pytest.mark.parametrize(
    ("wait", "reason"),
    [
        (lambda x: x.sum().item(), "waits for the device"),
        (lambda x: torch.ones(3).to(x.device), "waits for the device"),
        (lambda x: x.nonzero(), "waits for the device"),
        (lambda x: torch.cuda.synchronize(), "capture failed"),
        (lambda x: torch.cuda.current_stream().synchronize(), "waits for the device"),
    ],
    ids=["item", "from the host", "nonzero", "synchronize", "stream"],
)
def test_a_forward_that_cannot_be_captured_runs_eagerly_and_harms_nobody(wait: Any, reason: str) -> None:
    model, x = Waiting(wait).eval(), torch.randn(8, 64, device="cuda")
    _, healthy, inputs = tiny_model("flux_dev")
    with Ledger() as ledger:
        counts = capture_graphs(model, True, ledger).counts
        others = capture_graphs(healthy, True, ledger).counts
        for _ in range(5):
            assert torch.equal(in_call(model, {"x": x}), model(x)[0])
        assert counts.captured == 0
        assert [count for text, count in counts.eager.items() if reason in text] == [4], counts.eager
        assert torch.cuda.get_sync_debug_mode() == 0
        # Noise, allocations across streams and other captures work as before.
        before = torch.cuda.get_rng_state()
        noise = torch.randn(1000, device="cuda")
        torch.cuda.set_rng_state(before)
        assert torch.equal(torch.randn(1000, device="cuda"), noise)
        torch.cuda.empty_cache()
        assert_replays_are_eager(healthy, inputs, others)
        ledger.undo()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def test_graphs_are_bounded_share_their_memory_and_give_it_back() -> None:
    model = nn.Sequential(*(nn.Linear(2048, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(8))).eval()
    rows = [1024 * (1 + index) for index in range(graphs.MOST_GRAPHS + 2)]
    with open_call(None, owner=None):
        model(torch.randn(8, 2048, device="cuda", dtype=torch.bfloat16))
    with Ledger() as ledger:
        kept = capture_graphs(model, True, ledger)
        x = torch.randn(8, 2048, device="cuda", dtype=torch.bfloat16)
        for _ in range(2):
            in_call_of(model, x)  # the workspaces of cuBLAS stay
        kept.close()
        gc.collect()
        torch.cuda.empty_cache()
        reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        for count in reversed(rows):
            x = torch.randn(count, 2048, device="cuda", dtype=torch.bfloat16)
            for _ in range(3):
                assert torch.equal(in_call_of(model, x), model(x))
        assert kept.counts.captured == len(rows) + 1
        assert len(kept._graphs) == graphs.MOST_GRAPHS
        activations = max(rows) * 2048 * 2
        assert kept.counts.nbytes < sum(rows) * 2048 * 2 * 2 + 6 * activations
        assert torch.cuda.memory_reserved() > reserved
        del x
        ledger.undo()
    assert torch.cuda.memory_allocated() <= allocated
    assert torch.cuda.memory_reserved() <= reserved
    assert kept.counts.nbytes == 0


def in_call_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with open_call(None, owner=None):
        return model(x)


def test_auto_captures_what_the_host_launches_too_slowly_and_leaves_the_rest() -> None:
    small = nn.Sequential(*(nn.Linear(64, 64, device="cuda") for _ in range(200))).eval()
    large = nn.Sequential(*(nn.Linear(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(8))).eval()
    for model, x, captured in (
        (small, torch.randn(4, 64, device="cuda"), 1),
        (large, torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16), 0),
    ):
        with Ledger() as ledger:
            counts = capture_graphs(model, "auto", ledger).counts
            for _ in range(5):
                assert torch.equal(in_call_of(model, x), model(x))
            assert counts.captured == captured, counts
            ledger.undo()


@pytest.mark.parametrize("name", ["flux_dev", "qwen_image", "wan22_t2v", "hunyuan_video"])
def test_compiled_blocks_replay_to_the_bit(name: str) -> None:
    entry = TINY[name]
    family = next(family for family in families() if family.name == entry.family)
    _, model, inputs = tiny_model(name, torch.bfloat16)
    with Ledger() as ledger:
        compile_model(model, CompileConfig(graphs=False), family, ledger)
        compiled = [in_call(model, fresh(inputs, seed)) for seed in range(5)]
        counts = capture_graphs(model, True, ledger).counts
        for seed in range(5):
            assert torch.equal(in_call(model, fresh(inputs, seed)), compiled[seed])
        assert counts.replayed == 3, counts
        ledger.undo()


def test_a_mid_size_flux_replays_to_the_bit() -> None:
    from diffusers import FluxTransformer2DModel

    from pipeboost.patches.flux import forward_arguments

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = (
            FluxTransformer2DModel(guidance_embeds=True, num_layers=2, num_single_layers=4).to(torch.bfloat16).eval()
        )
    with Ledger() as ledger:
        counts = capture_graphs(model, True, ledger).counts
        for size in (256, 512):
            inputs = forward_arguments("cuda", torch.bfloat16, height=size, width=size)
            assert_replays_are_eager(model, inputs, counts)
        assert counts.captured == 2
        ledger.undo()


def test_the_default_captures_tiny_pipelines_and_stays_within_rounding() -> None:
    entry = TINY["flux_true_cfg"]
    pipe = entry.build().to("cuda")
    stock = entry.call(pipe, steps=8)
    accelerate_pipeline(pipe)
    assert pipe.acceleration.plan["graphs"].choice == "auto"
    for _ in range(2):
        assert (entry.call(pipe, steps=8) - stock).abs().max() < 5e-3
    found = pipe.acceleration.report().graphs["transformer"]
    assert found["replayed"] > 8, found
    pipe.acceleration.remove()
    assert torch.equal(entry.call(pipe, steps=8), stock)


def test_layers_that_need_the_host_leave_graphs_off_in_the_plan() -> None:
    entry = TINY["flux_dev"]
    pipe = entry.build().to("cuda")
    for settings in ({"quality": "fast"}, {"offload": "layerwise"}, {"compile": None}):
        accelerate_pipeline(pipe, **settings)
        assert pipe.acceleration.plan["graphs"].choice == "off"
        assert pipe.acceleration.plan["graphs"].why


def test_handles_are_what_the_verb_returns() -> None:
    model = nn.Linear(4, 4, device="cuda").eval()
    with Ledger() as ledger:
        assert isinstance(capture_graphs(model, True, ledger), Graphs)
        ledger.undo()
    assert type(model) is nn.Linear
