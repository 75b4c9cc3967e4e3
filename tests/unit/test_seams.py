"""Seams stand in the doors of one object and nowhere else."""

import copy
import inspect
import pickle
from unittest import mock

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from pipeboost.core.seams import (
    add_middleware,
    attach,
    disguised_subclass,
    has_middleware,
    middleware_of,
    remove_middleware,
    stock_class,
)
from tests.floors import python_calls


class Greeter:
    def __init__(self, name="world"):
        self.name = name

    def __call__(self, greeting: str = "hello", *, mark: str = "!") -> str:
        return f"{greeting} {self.name}{mark}"

    def other(self) -> str:
        return "other"


class Doubler(torch.nn.Module):
    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample * 2


def shout(call_next, owner, *args, **kwargs):
    return call_next(*args, **kwargs).upper()


def star(call_next, owner, *args, **kwargs):
    return f"*{call_next(*args, **kwargs)}*"


def test_only_the_seamed_instance_changes():
    seamed, other = Greeter(), Greeter()
    add_middleware(seamed, "__call__", shout, place="component.stages")
    assert seamed() == "HELLO WORLD!"
    assert other() == "hello world!"
    assert type(other) is Greeter


def test_layers_run_in_order_and_come_off_one_by_one():
    seamed = Greeter()
    add_middleware(seamed, "__call__", star, place="component.compile")
    add_middleware(seamed, "__call__", shout, place="component.stages")
    assert middleware_of(seamed, "__call__") == (shout, star)
    assert seamed("hi", mark="?") == "*HI WORLD?*"
    remove_middleware(seamed, "__call__", shout)
    assert seamed() == "*hello world!*"
    remove_middleware(seamed, "__call__", star)
    remove_middleware(seamed, "__call__", star)
    assert type(seamed) is Greeter
    assert vars(seamed) == {"name": "world"}


def test_a_seamed_object_passes_for_its_stock_class():
    seamed = Greeter()
    add_middleware(seamed, "__call__", shout, place="component.stages")
    assert isinstance(seamed, Greeter)
    assert stock_class(seamed) is Greeter
    assert (type(seamed).__name__, type(seamed).__qualname__, type(seamed).__module__) == (
        Greeter.__name__,
        Greeter.__qualname__,
        Greeter.__module__,
    )
    assert inspect.signature(seamed.__call__) == inspect.signature(Greeter().__call__)


def test_a_shallow_copy_calls_the_layers_with_itself_as_owner():
    owners = []

    def remember(call_next, owner, *args, **kwargs):
        owners.append(owner)
        return call_next(*args, **kwargs)

    seamed = Greeter()
    add_middleware(seamed, "__call__", remember, place="component.stages")
    view = copy.copy(seamed)
    view.name = "view"
    assert view() == "hello view!"
    assert owners == [view]


def test_a_deep_copy_is_a_stock_object():
    scheduler = FlowMatchEulerDiscreteScheduler()
    steps = []

    def count(call_next, owner, *args, **kwargs):
        steps.append(owner)
        return call_next(*args, **kwargs)

    add_middleware(scheduler, "step", count, place="component.stages")
    attach(scheduler, "note", "ours")
    twin = copy.deepcopy(scheduler)
    assert type(twin) is FlowMatchEulerDiscreteScheduler
    assert not hasattr(twin, "note")
    assert vars(twin).keys() == vars(FlowMatchEulerDiscreteScheduler()).keys()
    twin.set_timesteps(4)
    sample = torch.ones(1, 2)
    twin.step(sample, twin.timesteps[0], sample)
    assert steps == []
    assert twin.step_index == 1
    assert scheduler.step_index is None
    assert scheduler.note == "ours"


def test_constructing_through_a_seamed_class_gives_a_stock_object():
    seamed = Greeter()
    add_middleware(seamed, "__call__", shout, place="component.stages")
    assert type(seamed) in (int, Greeter)
    assert type(type(seamed)("you")) is Greeter


def test_pickling_gives_the_stock_class_without_layers():
    seamed = Greeter("you")
    add_middleware(seamed, "__call__", shout, place="component.stages")
    loaded = pickle.loads(pickle.dumps(seamed))
    assert type(loaded) is Greeter
    assert loaded() == "hello you!"
    assert seamed() == "HELLO YOU!"


def test_a_module_seam_stands_outside_module_compile():
    module = Doubler()
    sample = torch.randn(2, 3)
    reference = module(sample)
    graphs = []

    def counting_backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    module.compile(backend=counting_backend, fullgraph=True)
    calls = []

    def note(call_next, owner, *args, **kwargs):
        calls.append(owner)
        return call_next(*args, **kwargs)

    add_middleware(module, "__call__", note, place="component.stages")
    assert torch.equal(module(sample), reference)
    assert calls == [module]
    assert len(graphs) == 1


def test_a_module_seam_stands_outside_accelerate_hooks_and_survives_their_rewrapping():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    module = torch.nn.Linear(3, 3)
    sample = torch.randn(2, 3)
    reference = module(sample)
    add_middleware(module, "__call__", lambda call_next, owner, *args: call_next(*args) + 1, place="component.stages")
    for _ in range(2):
        add_hook_to_module(module, ModelHook())
        assert torch.equal(module(sample), reference + 1)
        remove_hook_from_module(module)
    assert torch.equal(module(sample), reference + 1)


def test_a_module_with_a_seam_saves_and_loads_its_state_as_stock():
    module = torch.nn.Linear(3, 3)
    add_middleware(module, "__call__", shout, place="component.stages")
    assert set(module.state_dict()) == {"weight", "bias"}
    loaded = pickle.loads(pickle.dumps(module))
    assert type(loaded) is torch.nn.Linear
    assert torch.equal(loaded.weight, module.weight)


def test_removing_from_the_original_leaves_a_view_stock():
    seamed = Greeter()
    add_middleware(seamed, "__call__", shout, place="component.stages")
    view = copy.copy(seamed)
    remove_middleware(seamed, "__call__", shout)
    assert view() == "hello world!"
    assert not has_middleware(view, "__call__", shout)


def test_an_unknown_door_is_refused_and_changes_nothing():
    seamed = Greeter()
    with pytest.raises(AttributeError, match="Greeter has no method 'nothing'"):
        add_middleware(seamed, "nothing", shout, place="component.stages")
    assert type(seamed) is Greeter
    assert vars(seamed) == {"name": "world"}


class Placed:
    def __init__(self):
        self.where = "cpu"

    @property
    def device(self) -> str:
        """Where it is."""
        return self.where

    @device.setter
    def device(self, where: str) -> None:
        self.where = where


def test_a_property_is_a_door_whose_layers_see_the_owner_and_the_stock_answer():
    placed, other = Placed(), Placed()
    layer = lambda call_next, owner: f"{call_next()} of {owner.where}, ours"  # noqa: E731
    add_middleware(placed, "device", layer, place="component.stages")
    placed.device = "gpu"
    view = copy.copy(placed)
    view.where = "view"
    assert placed.device == "gpu of gpu, ours"
    assert view.device == "view of view, ours"
    assert other.device == "cpu"
    assert type(placed).device.__doc__ == "Where it is."
    assert copy.deepcopy(placed).device == pickle.loads(pickle.dumps(placed)).device == "gpu"
    remove_middleware(placed, "device", layer)
    assert type(placed) is Placed
    assert placed.device == "gpu"


def test_a_layer_costs_eight_python_calls_at_most_and_each_further_one_a_call():
    class Silent:
        def __call__(self):
            return None

    one, two = Silent(), Silent()
    for seamed in (one, two, two):
        add_middleware(seamed, "__call__", lambda call_next, owner: call_next(), place="component.stages")
    assert python_calls(one) - python_calls(Silent()) <= 8
    assert python_calls(two) - python_calls(one) == 1


@pytest.mark.parametrize("removed_first", [False, True])
def test_what_others_set_on_the_class_of_a_seamed_object_is_on_the_stock_class(removed_first):
    class Stock(Greeter):
        pass

    seamed, other = Stock(), Stock()
    add_middleware(seamed, "__call__", shout, place="component.stages")
    cls, before = type(seamed), Stock.__call__
    assert cls is not Stock
    assert cls.__call__ is before
    cls.mark = 1
    assert Stock.mark == other.mark == seamed.mark == 1
    wrapped = cls.__call__
    cls.__call__ = lambda self, *args: f"<{wrapped(self, *args)}>"
    assert seamed() == "<HELLO WORLD!>"
    assert other() == "<hello world!>"
    if removed_first:
        remove_middleware(seamed, "__call__", shout)
    assert seamed() == ("<hello world!>" if removed_first else "<HELLO WORLD!>")
    del type(seamed).__call__, type(seamed).mark
    assert not hasattr(other, "mark")
    assert other() == "hello world!"
    assert seamed() == ("hello world!" if removed_first else "HELLO WORLD!")


def test_a_layer_on_a_module_ends_in_the_forward_that_its_class_has_now():
    class Tripler(Doubler):
        pass

    module, sample = Tripler(), torch.ones(1)
    add_middleware(module, "forward", lambda call_next, owner, sample: call_next(sample) + 1, place="component.stages")
    type(module).forward = lambda self, sample: sample * 3
    assert module(sample) == 4
    assert Tripler()(sample) == 3


def test_a_disguised_class_has_the_instances_and_registry_entries_of_its_stock_class():
    from pipeboost.core.seams import disguised_subclass

    ours = disguised_subclass(Greeter, {"other": lambda self: "ours"})
    thing = Greeter()
    assert {Greeter: "entry"}[ours] == "entry"
    assert isinstance(thing, ours)
    assert issubclass(Greeter, ours)
    thing.__class__ = ours
    assert thing.other() == "ours"
    assert ours.other(Greeter()) == "other"
    assert type(copy.copy(thing)).__dict__["other"] is ours.__dict__["other"]
    assert type(copy.deepcopy(thing)) is Greeter


@pytest.mark.parametrize("removed_first", [False, True])
def test_a_mock_on_the_class_of_a_seamed_object_leaves_the_stock_class_as_it_was(removed_first):
    class Child(Greeter):
        pass

    def mocked(self):
        return "mocked"

    seamed, before = Child(), Child.__call__
    add_middleware(seamed, "__call__", shout, place="component.stages")
    with mock.patch.object(type(seamed), "__call__", mocked):
        assert seamed() == "MOCKED"
        if removed_first:
            remove_middleware(seamed, "__call__", shout)
    assert Child.__call__ is before
    assert "__call__" not in vars(Child)
    assert Child()() == "hello world!"


@pytest.mark.parametrize("method", ["forward", "__call__"])
def test_compiled_code_runs_the_method_that_a_disguised_class_shows(method):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    ours = {method: lambda self, states: torch.full_like(states, 7.0)}
    model[0].__class__ = disguised_subclass(torch.nn.Linear, ours, shown=frozenset([method]))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(1, 2)), torch.full((1, 2), 7.0))
