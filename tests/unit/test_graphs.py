"""CUDA graphs without CUDA: which forwards share a signature, what gives a graph up, and who gets which memory.

A graph is played by a stand-in that keeps the model's function and runs it on the graph's own inputs.
"""

import functools
import threading
import weakref
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig
from torch import nn

from pipeboost.contract.call import alone, open_call
from pipeboost.core.fingerprint import numerics
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import stock_class
from pipeboost.features.graphs import Graphs, capture_graphs, graphs
from pipeboost.features.graphs.capture import Inputs, aligned
from pipeboost.features.graphs.model_fingerprint import ModelFingerprint
from pipeboost.features.graphs.signature import NotCapturable, copied, exchanged, read
from pipeboost.features.graphs.trial import Trial
from tests.moments import freed_at_once
from tests.pipelines.tiny import TINY, load_tiny_ip_adapter, load_tiny_lora

CPU = torch.device("cpu")


class StandIn:
    """A graph that Python plays: it runs what was captured on the memory that it was captured with."""

    alive: ClassVar[list["StandIn"]] = []

    def __init__(self, run: Callable[..., Any], args: Any, kwargs: Any, tensors: Any) -> None:
        self.inputs = Inputs(tensors)
        positional, named = exchanged(args, kwargs, tensors, self.inputs.tensors)
        self.run = functools.partial(run, *positional, **named)
        self.nbytes = self.inputs.nbytes
        self.alive.append(self)

    def replay(self, tensors: Any) -> Any:
        self.inputs.fill(tensors)
        return copied(self.run())

    def close(self) -> None:
        self.alive.remove(self)


@pytest.fixture(autouse=True)
def _without_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def captured(run: Any, args: Any, kwargs: Any, tensors: Any, device: Any, pool: Any) -> Any:
        graph = StandIn(run, args, kwargs, tensors)
        return graph.replay(tensors), graph

    monkeypatch.setattr(graphs, "capture", captured)
    monkeypatch.setattr(graphs, "new_pool", object)
    monkeypatch.setattr(graphs, "_fit", lambda arguments: CPU)
    StandIn.alive.clear()
    with torch.no_grad():
        yield


class Scaled(nn.Module):
    """Counts its forwards; `scale` and `flags` are settings that a graph freezes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = 2.0
        self.flags = {"on": [1, 2]}
        self.runs = [0]

    def forward(self, x: torch.Tensor, *, times: float = 1.0, sizes: Any = None) -> tuple[torch.Tensor]:
        return (self.linear(x) * self.scale * times * len(self.flags["on"]),)


@pytest.fixture
def model() -> Scaled:
    return Scaled().eval()


def key(*args: Any, **kwargs: Any) -> Any:
    return read(args, kwargs).key


def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with open_call(None, owner=None):
        return model(*args, **kwargs)


def graphed(model: nn.Module, ledger: Ledger, wanted: Any = True) -> Graphs:
    return capture_graphs(model, wanted, ledger)


x = torch.randn(2, 4)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"x": torch.zeros(2, 3)}, {"x": torch.zeros(3, 2)}),
        ({"x": torch.zeros(2, 3)}, {"x": torch.zeros(2, 3, dtype=torch.float16)}),
        ({"x": torch.zeros(2, 3)}, {"x": torch.zeros(3, 2).t()}),
        ({"x": torch.zeros(1)}, {"x": None}),
        ({"img_shapes": [[(1, 4, 4)]]}, {"img_shapes": [[(1, 2, 8)]]}),
        ({"img_shapes": [[(1, 4, 4)]]}, {"img_shapes": [((1, 4, 4),)]}),
        ({"joint_attention_kwargs": {"scale": 0.5}}, {"joint_attention_kwargs": {"scale": 0.25}}),
        ({"joint_attention_kwargs": {}}, {"joint_attention_kwargs": None}),
        ({"return_dict": False}, {"return_dict": True}),
        ({"scale": 1}, {"scale": 1.0}),
        ({"scale": 0.0}, {"scale": -0.0}),
        ({"a": 1}, {"b": 1}),
        ({"residuals": [x, x]}, {"residuals": [x]}),
        ({"residuals": [x, x]}, {"residuals": [x, x + 1]}),
    ],
)
def test_forwards_that_differ_in_more_than_numbers_have_signatures_of_their_own(one: Any, other: Any) -> None:
    assert key(**one) != key(**other)
    assert key(**one) == key(**one)


def test_numbers_in_tensors_leave_the_signature_as_it_is() -> None:
    first = {"hidden_states": x, "extra": {"embeds": [torch.ones(3), torch.ones(3)]}, "nan": float("nan")}
    second = {"hidden_states": x + 1, "extra": {"embeds": [torch.zeros(3), torch.zeros(3)]}, "nan": float("nan")}
    assert key(**first) == key(**second)
    assert sorted(tensor.shape for tensor in read((), second).tensors) == [(2, 4), (3,), (3,)]


@pytest.mark.parametrize("value", [object(), iter([]), torch.nn.Linear(1, 1)])
def test_an_argument_that_cannot_be_compared_has_no_signature(value: Any) -> None:
    with pytest.raises(NotCapturable, match=type(value).__name__):
        read((), {"extra": [value]})


def test_a_tensor_out_of_sight_is_not_captured() -> None:
    given = {"extra": UserDict(embeds=torch.ones(2))}
    tensors = read((), given).tensors
    with pytest.raises(NotCapturable, match="a tensor in a container that is no tuple, list or dict"):
        exchanged((), given, tensors, tensors)


def test_what_a_forward_returns_has_memory_of_its_own() -> None:
    held = {"sample": torch.ones(2), "others": (torch.zeros(1), None, 3)}
    given = copied(held)
    held["sample"].zero_()
    assert given["sample"].tolist() == [1, 1]
    assert given["others"][1:] == (None, 3)
    with pytest.raises(NotCapturable, match="returns a Linear"):
        copied((nn.Linear(1, 1),))


def test_inputs_keep_their_strides_and_are_written_even_where_they_are_expanded() -> None:
    expanded, turned, part = torch.ones(1, 3).expand(4, 3), torch.zeros(3, 2).t(), torch.zeros(2, 8)[:, 2:5]
    tensors = (expanded, turned, part, torch.ones(1).expand(5))
    inputs = Inputs(tensors)
    assert [tensor.stride() for tensor in inputs.tensors] == [tensor.stride() for tensor in tensors]
    fresh = (torch.rand(1, 3).expand(4, 3), torch.rand(3, 2).t(), torch.rand(2, 8)[:, 2:5], torch.rand(1).expand(5))
    inputs.fill(fresh)
    assert all(map(torch.equal, inputs.tensors, fresh))
    given = (expanded, [turned]), {"deep": {"part": (part, 7)}, "last": tensors[3]}
    args, kwargs = exchanged(*given, tensors, inputs.tensors)
    assert args[0] is inputs.tensors[0]
    assert args[1][0] is inputs.tensors[1]
    assert kwargs["deep"]["part"][0] is inputs.tensors[2]
    assert kwargs["deep"]["part"][1] == 7
    assert kwargs["last"] is inputs.tensors[3]


def test_settings_of_torch_belong_to_the_signature() -> None:
    before = numerics("cpu")
    with torch.inference_mode():
        assert numerics("cpu") != before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert numerics("cpu") != before
    assert numerics("cpu") == before


def test_the_second_forward_is_captured_and_later_ones_replay_on_fresh_inputs(model: Scaled) -> None:
    with Ledger() as ledger:
        counts = graphed(model, ledger).counts
        for seed in range(6):
            fresh = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
            expected = model(fresh)[0]
            assert torch.equal(run(model, fresh)[0], expected)
        assert (counts.captured, counts.replayed, counts.dropped) == (1, 4, 0)
        assert sum(counts.eager.values()) == 2
        ledger.undo()
    assert not StandIn.alive
    assert type(model) is Scaled


def test_outputs_of_earlier_replays_are_never_written_to_again(model: Scaled) -> None:
    with Ledger() as ledger:
        graphed(model, ledger)
        kept = [run(model, x + seed)[0] for seed in range(6)]
        assert all(torch.equal(one, model(x + seed)[0]) for seed, one in enumerate(kept))
        assert len({one.data_ptr() for one in kept}) == 6
        ledger.undo()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "scale", 3.0),
        lambda model: model.flags["on"].append(3),
        lambda model: model.flags.update(on=[1]),
        lambda model: setattr(model.linear, "weight", nn.Parameter(torch.ones(4, 4))),
        lambda model: setattr(model.linear.weight, "data", torch.ones(4, 4)),
        lambda model: setattr(model, "linear", nn.Linear(4, 4).eval()),
        lambda model: setattr(model, "linear", nn.Sequential(nn.Linear(4, 4)).eval()),
        lambda model: model.linear.register_buffer("more", torch.ones(1)),
        lambda model: setattr(model, "unheard_of", 1),
        lambda model: model.double().float(),
        lambda model: setattr(model.linear.weight, "data", model.linear.weight.data.t()),
    ],
    ids=[
        *("scale", "in a list", "in a dict", "parameter", "data", "submodule", "its class", "buffer", "attribute"),
        *("converted", "transposed"),
    ],
)
def test_whatever_a_graph_has_frozen_gives_it_up_when_it_changes(
    model: Scaled, change: Callable[[Scaled], Any]
) -> None:
    with Ledger() as ledger:
        counts = graphed(model, ledger).counts
        for _ in range(3):
            run(model, x)
        change(model)
        for step in range(4):
            assert torch.equal(run(model, x + step)[0], model(x + step)[0])
        assert (counts.captured, counts.dropped) == (2, 1)
        assert counts.change
        assert len(StandIn.alive) == 1
        ledger.undo()


def test_weights_written_in_place_keep_the_graph(model: Scaled) -> None:
    with Ledger() as ledger:
        counts = graphed(model, ledger).counts
        for _ in range(3):
            run(model, x)
        model.linear.weight.mul_(2)
        assert torch.equal(run(model, x)[0], model(x)[0])
        assert (counts.replayed, counts.dropped) == (2, 0)
        ledger.undo()


def test_each_value_of_an_argument_has_its_graph_and_the_least_used_goes_first(model: Scaled) -> None:
    with Ledger() as ledger:
        counts = graphed(model, ledger).counts
        values = [float(value) for value in range(graphs.MOST_GRAPHS + 2)]
        for times in values:
            for _ in range(3):
                assert torch.equal(run(model, x, times=times)[0], model(x, times=times)[0])
            run(model, x, times=0.0)
        assert len(StandIn.alive) == graphs.MOST_GRAPHS
        replayed = counts.replayed
        run(model, x, times=0.0)
        assert counts.replayed == replayed + 1
        run(model, x, times=1.0)
        assert counts.replayed == replayed + 1
        assert counts.nbytes == graphs.MOST_GRAPHS * x.nbytes
        ledger.undo()
    assert counts.nbytes == 0


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda model: model.train(), "the model is in training mode"),
        (lambda model: model.add_module("dropout", nn.Dropout(0.1)), "dropout is in training mode"),
        (lambda model: model.linear.register_forward_hook(lambda *_: None), "linear has a hook"),
        (lambda model: model.linear.compile(backend="eager"), "linear was compiled by hand"),
        (lambda model: setattr(model.linear, "_hf_hook", object()), "offload hook of accelerate"),
        (lambda model: setattr(model.linear, "weight", nn.Parameter(torch.ones(4, 4, device="meta"))), "on meta"),
    ],
)
def test_what_a_graph_would_leave_out_runs_eagerly_and_says_why(
    model: Scaled, spoil: Callable[[Scaled], Any], reason: str
) -> None:
    spoil(model)
    assert ModelFingerprint(Scaled().eval(), CPU).unfit is None
    assert reason in str(ModelFingerprint(model, CPU).unfit)


def test_a_hook_that_comes_and_goes_is_run_and_forgotten(model: Scaled) -> None:
    seen: list[int] = []
    with Ledger() as ledger:
        counts = graphed(model, ledger).counts
        for _ in range(3):
            run(model, x)
        handle = model.linear.register_forward_hook(lambda *_: seen.append(1))
        for _ in range(3):
            run(model, x)
        assert len(seen) == 3
        assert any("hook" in reason for reason in counts.eager)
        handle.remove()
        for _ in range(3):
            run(model, x)
        assert counts.captured == 2
        ledger.undo()


class Writing(nn.Module):
    def forward(self, x: torch.Tensor, more: dict[str, Any]) -> torch.Tensor:
        if more:
            more.popitem()
        else:
            x.add_(1)
        return x * 2


@pytest.mark.parametrize("more", [{}, {"scale": 1.0}])
def test_a_forward_that_writes_to_its_arguments_goes_on_doing_so(more: dict[str, Any]) -> None:
    model = Writing().eval()
    with Ledger() as ledger:
        counts = graphed(model, ledger).counts
        for _ in range(4):
            given, extra = torch.ones(2), dict(more)
            run(model, given, extra)
            assert given.tolist() == ([2, 2] if not more else [1, 1])
            assert not extra
        assert counts.captured == 0
        assert "it writes to its arguments" in counts.eager
        ledger.undo()


def test_only_calls_of_the_owner_replay(model: Scaled) -> None:
    class Owner:
        pass

    mine, other = Owner(), Owner()
    with Ledger() as ledger:
        counts = capture_graphs(model, True, ledger, owner=mine).counts
        for _ in range(4):
            model(x)
            with open_call(None, owner=other):
                model(x)
        assert not counts.eager
        for _ in range(4):
            with open_call(None, owner=mine):
                model(x)
        assert counts.replayed == 2
        ledger.undo()


def test_what_was_decided_outside_of_the_arguments_has_a_graph_of_its_own(model: Scaled) -> None:
    with Ledger() as ledger:
        counts = graphed(model, ledger).counts
        for decision in ("with mask", "without"):
            with open_call(None, owner=None) as call:
                call.decided.add(decision)
                for _ in range(3):
                    model(x)
        assert (counts.captured, counts.replayed) == (2, 2)
        ledger.undo()


def test_nothing_is_captured_while_another_call_is_open(model: Scaled) -> None:
    opened, done = threading.Event(), threading.Event()

    def other() -> None:
        with open_call(None, owner=None):
            opened.set()
            done.wait(60)

    with Ledger() as ledger:
        counts = graphed(model, ledger).counts
        thread = threading.Thread(target=other)
        thread.start()
        opened.wait(60)
        with alone() as undisturbed:
            assert not undisturbed
        for _ in range(4):
            run(model, x)
        assert counts.captured == 0
        assert any("another call" in reason for reason in counts.eager)
        done.set()
        thread.join()
        for _ in range(2):
            run(model, x)
        assert (counts.captured, counts.replayed) == (1, 1)
        ledger.undo()


def test_a_model_that_is_dropped_is_freed_at_once() -> None:
    model, ledger = Scaled().eval(), Ledger()
    kept = graphed(model, ledger)
    run(model, x)
    reference = weakref.ref(model.linear.weight)
    with freed_at_once():
        del model
        assert reference() is None
    assert kept.counts.eager
    ledger.undo()


def transformer(name: str) -> tuple[Any, Any, dict[str, Any]]:
    entry = TINY[name]
    pipe = entry.build()
    return pipe, pipe.transformer, entry.forward_inputs(pipe)


@pytest.mark.parametrize("name", ["flux_dev", "qwen_image", "wan21_t2v", "hunyuan_video"])
def test_a_model_stays_as_it_was_through_its_own_forward(name: str) -> None:
    _, model, inputs = transformer(name)
    model(**inputs)
    frozen = ModelFingerprint(model, CPU)
    assert frozen.unfit is None
    model(**inputs)
    assert frozen.change() is None
    before = read((), inputs)
    model(**inputs)
    assert read((), inputs).key == before.key


def test_adapters_their_scales_and_their_merging_are_seen() -> None:
    pipe, model, inputs = transformer("flux_dev")
    load_tiny_lora(pipe)
    name = next(iter(model.peft_config))
    for change in (
        lambda: pipe.set_adapters([name], [0.5]),
        lambda: pipe.disable_lora(),
        lambda: pipe.enable_lora(),
        lambda: pipe.fuse_lora(),
        lambda: pipe.unfuse_lora(),
        lambda: model.add_adapter(LoraConfig(target_modules=["to_q"]), "second"),
        lambda: pipe.unload_lora_weights(),
        lambda: model.set_attn_processor(type(model.transformer_blocks[0].attn.processor)()),
        lambda: model.to(torch.float64),
    ):
        frozen = ModelFingerprint(model, CPU)
        assert frozen.change() is None
        model(**inputs)
        assert frozen.change() is None
        change()
        assert frozen.change() is not None
        inputs = {
            key: value.to(model.dtype) if torch.is_tensor(value) and value.is_floating_point() else value
            for key, value in inputs.items()
        }


def test_the_scale_of_an_image_adapter_is_seen() -> None:
    pipe, model, _ = transformer("flux_dev")
    load_tiny_ip_adapter(pipe)
    frozen = ModelFingerprint(model, CPU)
    assert frozen.change() is None
    pipe.set_ip_adapter_scale(0.25)
    assert "processor" in str(frozen.change())


def test_positions_that_a_function_may_have_dropped_are_not_read_again() -> None:
    pipe, model, inputs = transformer("qwen_image")
    assert isinstance(model, QwenImageTransformer2DModel)
    model(**inputs)
    frozen = ModelFingerprint(model, CPU)
    assert frozen.change() is None
    rope = model.pos_embed
    for size in range(200):
        rope._compute_video_freqs(1, 1 + size, 3, 0, CPU)
    assert "_compute_video_freqs" in str(frozen.change())
    assert ModelFingerprint(model, CPU).change() is None
    assert stock_class(pipe) is type(pipe)


def test_one_number_may_lie_anywhere_and_several_only_where_a_memory_word_begins():
    schedule = torch.arange(8)
    assert schedule.data_ptr() % 16 == 0
    assert aligned([schedule, schedule[3], schedule[3:4], schedule[3].expand(2), schedule[3].expand(2, 1, 4)])
    assert aligned([schedule[2:4]])
    assert not aligned([schedule, schedule[3:5]])
    assert not aligned([schedule[3::2]])


class Clock:
    """Events that read a device's clock, which the forwards of the test set forward."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.time = 0.0
        self.passed = False

    def record(self) -> None:
        self.time = Clock.now

    def synchronize(self) -> None:
        self.passed = True

    def elapsed_time(self, other: "Clock") -> float:
        assert other.passed, "the device has not come so far"
        return other.time - self.time


class Forward(nn.Module):
    """Takes the device as long as it is given, a replay of it `saved` less."""

    def __init__(self, milliseconds: list[float], saved: float) -> None:
        super().__init__()
        self.milliseconds = milliseconds
        self.saved = saved

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        if not torch.compiler.is_compiling():
            Clock.now += self.milliseconds[0]
        return (x + 1,)


def test_a_trial_knows_which_forwards_were_replays_in_whatever_order_threads_end_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    trial = Trial()

    def timed(milliseconds: float, *, replay: bool) -> None:
        with trial.timed(replay=replay):
            Clock.now += milliseconds

    timed(1.0, replay=trial.replays)
    both = [trial.replays, trial.replays]  # two threads ask before either has run
    assert both == [False, False]
    for replay in both:
        timed(3.0, replay=replay)
    assert trial.saving(lambda times: times) is None
    timed(1.0, replay=trial.replays)
    assert trial.saving(lambda times: times) == 2.0
    assert trial.description() == "1.0 ms replayed, 3.0 ms without"


@pytest.mark.parametrize(
    ("saved", "captured", "reason"), [(2.0, 1, None), (0.1, 0, "no faster: 129.9 ms replayed, 130.0 ms without")]
)
def test_auto_keeps_a_graph_whose_replays_are_faster_and_no_other(
    monkeypatch: pytest.MonkeyPatch, saved: float, captured: int, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    replay = StandIn.replay

    def faster(self: StandIn, tensors: Any) -> Any:
        Clock.now -= saved
        return replay(self, tensors)

    monkeypatch.setattr(StandIn, "replay", faster)
    # Which the host's clock would measure, and a busy machine differently each time.
    monkeypatch.setattr(graphs, "with_launch_share", lambda run, device, args, kwargs: (run(*args, **kwargs), 0.2))
    model = Forward([130.0], saved).eval()
    with Ledger() as ledger:
        found = graphed(model, ledger, "auto")
        for _ in range(20):
            assert torch.equal(run(model, x)[0], x + 1)
        assert len(StandIn.alive) == captured, found.counts
        assert found.counts.eager["timed against its graph"] == 2
        assert any(reason in why for why in found.counts.eager) if reason else found.counts.replayed > 12
        # Another signature, which has to wait until what the first one saved is worth a capture.
        found._cost = 5 * saved
        for _ in range(4):
            run(model, x[:1])
        assert len(StandIn.alive) == captured
        for _ in range(3):
            run(model, x[:1])
        assert len(StandIn.alive) == 2 * captured
        # One whose launches are a much larger part of it is tried at once, whatever the first has saved.
        found._share = 0.0
        for _ in range(3):
            run(model, x[:, :2])
        assert len(StandIn.alive) == 2 * captured + 1
        ledger.undo()


def test_a_trial_without_memory_for_both_gives_the_graph_up_and_the_forward_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(graphs, "WORTH_TRYING", 0.0)
    model = Forward([130.0], 0.0).eval()
    stock = model.forward

    def too_large(x: torch.Tensor) -> tuple[torch.Tensor]:
        if StandIn.alive and not StandIn.replaying:
            raise torch.OutOfMemoryError
        return stock(x)

    replay = StandIn.replay

    def noted(self: StandIn, tensors: Any) -> Any:
        StandIn.replaying = True
        try:
            return replay(self, tensors)
        finally:
            StandIn.replaying = False

    monkeypatch.setattr(StandIn, "replaying", False, raising=False)
    monkeypatch.setattr(StandIn, "replay", noted)
    monkeypatch.setattr(Forward, "forward", lambda self, x: too_large(x))
    with Ledger() as ledger:
        found = graphed(model, ledger, "auto")
        for _ in range(8):
            assert torch.equal(run(model, x)[0], x + 1)
        assert not StandIn.alive
        assert any("no memory" in reason for reason in found.counts.eager)
        ledger.undo()
