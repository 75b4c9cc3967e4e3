"""What is kept is bounded and apart; what a state is changes with whatever could change an embedding."""

import copy
import gc
import inspect
import types
import typing
import weakref
from collections.abc import Hashable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeboost import ReuseConfig, accelerate_pipeline
from pipeboost.core.errors import ConfigurationError
from pipeboost.core.fingerprint import structure
from pipeboost.core.sample import every_row_and_column
from pipeboost.features.reuse.key import ENCODERS, Keys, content_of, refuse
from pipeboost.features.reuse.store import Entry, Store, Uncacheable


def entry(elements: int = 10) -> Entry:
    return Entry.of((torch.ones(elements), None), {})


def content(argument: object) -> Hashable:
    return structure(argument, tensor=content_of, other=refuse)


def state(model: object, keys: Keys) -> Hashable:
    return keys.state_of(model, placed=True)


def test_the_store_drops_the_least_recently_used_and_never_holds_more_than_its_bound():
    store = Store(100)
    for key in (b"a", b"b"):
        store.put(key, entry())
    assert store.get(b"a") is not None
    store.put(b"c", entry())
    assert [key for key in (b"a", b"b", b"c") if store.get(key)] == [b"a", b"c"]
    assert store.size == 80
    store.put(b"d", entry(26))
    assert store.get(b"d") is None
    assert store.size == 80
    store.put(b"c", entry(5))
    assert store.size == 60
    store.clear()
    assert store.get(b"a") is None
    assert store.size == 0


def test_copies_share_nothing_and_keep_values_strides_and_structure():
    expanded = torch.arange(3.0).expand(4, 3)
    cut = torch.arange(24.0).view(2, 3, 4)[:, 1:, ::2]
    returned = (expanded, [cut, None], {"again": cut, "empty": torch.empty(0, 3), "n": 3})
    kept = Entry.of(returned, {})
    cut.zero_()
    first, second = kept.repeat(nn.Identity()), kept.repeat(nn.Identity())
    first[0].as_strided((3,), (1,)).zero_()
    assert torch.equal(second[0], torch.arange(3.0).expand(4, 3))
    assert second[0].stride() == expanded.stride()
    assert torch.equal(second[1][0], torch.arange(24.0).view(2, 3, 4)[:, 1:, ::2])
    assert second[1][0].stride() == cut.stride()
    assert second[2]["again"] is second[1][0]
    assert second[1][1] is None
    assert second[2]["n"] == 3


def test_what_was_made_in_inference_mode_can_be_used_outside_and_the_other_way_round():
    with torch.inference_mode():
        kept = Entry.of(torch.ones(3) * 2, {})
    outside = kept.repeat(nn.Identity())
    assert not outside.is_inference()
    outside.add_(1)
    with torch.inference_mode():
        assert torch.equal(Entry.of(outside, {}).repeat(nn.Identity()), torch.full((3,), 3.0))


@pytest.mark.parametrize(
    "returned", [object(), torch.ones(2, requires_grad=True), (torch.ones(2).to_sparse(),), {"a": iter(())}]
)
def test_what_is_not_a_plain_value_or_tensor_is_not_kept(returned):
    with pytest.raises(Uncacheable):
        Entry.of(returned, {})


def test_arguments_are_equal_by_content():
    picture = Image.new("RGB", (4, 4), (1, 2, 3))
    other = picture.copy()
    other.putpixel((0, 0), (1, 2, 4))
    values = [
        *(1, 1.0, True, "1", None, ["a"], ("a",), ["a", "a"], {"a": 1}, torch.float16, torch.device("cpu")),
        *(picture, other, picture.resize((2, 8)), picture.convert("L")),
        *(np.arange(4), np.arange(4.0), np.arange(4).reshape(2, 2), torch.arange(4), torch.arange(4.0)),
    ]
    told = [content(value) for value in values]
    assert len(set(told)) == len(values)
    assert told == [content(copy.deepcopy(value)) for value in values]
    for value in (object(), torch.Generator(), [lambda: None], np.array([object()]), torch.ones(2, device="meta")):
        with pytest.raises(Uncacheable):
            content(value)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(300, 400)
        self.linear = nn.Linear(400, 300)
        self.register_buffer("positions", torch.arange(5))
        self.scaling = {"default": 1.0}
        self.eval()


def _swap(model: Encoder) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def _replace_buffer(model: Encoder) -> None:
    model.positions = model.positions.clone()


@pytest.mark.parametrize("keep", [_swap, _replace_buffer, lambda model: model.to("cpu")])
def test_the_state_survives_what_offload_does(keep):
    model, keys = Encoder(), Keys(())
    before = state(model, keys)
    keep(model)
    assert state(model, keys) == before


CHANGES = {
    "in place, where no sample is taken": lambda model: model.embed.weight[0, 1].mul_(2),
    "one row through .data": lambda model: model.embed.weight.data[7].add_(1),
    "one column through .data": lambda model: model.linear.weight.data[:, 399].add_(1),
    "rounding through .data": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "dtype": lambda model: model.half(),
    "another tensor of the same content": lambda model: setattr(
        model.linear, "weight", nn.Parameter(model.linear.weight.data)
    ),
    "buffer": lambda model: model.positions.data.add_(1),
    "a scale in a dictionary": lambda model: model.scaling.update(default=0.5),
    "a plain attribute": lambda model: setattr(model.embed, "max_norm", 1.0),
    "a hook": lambda model: model.linear.register_forward_hook(lambda *_: None),
    "a forward of its own": lambda model: setattr(model.linear, "forward", lambda x: x),
    "a module more": lambda model: setattr(model, "more", nn.ReLU().eval()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_state_changes_with(change):
    model, keys = Encoder(), Keys(())
    before = state(model, keys)
    assert state(model, keys) == before
    with torch.no_grad():
        CHANGES[change](model)
    assert state(model, keys) != before


def test_an_attribute_under_another_name_or_on_another_class_is_another_state():
    class Subclass(nn.Linear):
        pass

    model, keys = Encoder(), Keys(())
    model.linear.first = print
    seen = {state(model, keys)}
    model.linear.second = model.linear.__dict__.pop("first")
    seen.add(state(model, keys))
    model.linear.__class__ = Subclass
    seen.add(state(model, keys))
    model.more = nn.ModuleDict({"a": nn.ReLU()}).eval()
    seen.add(state(model, keys))
    model.more["b"] = model.more.pop("a")
    seen.add(state(model, keys))
    assert len(seen) == 5


def test_an_attribute_that_took_the_address_of_a_dead_one_is_another_state():
    class Rule:
        pass

    model, keys = Encoder(), Keys(())
    seen = set()
    for _ in range(50):
        model.linear.rule = None
        model.linear.rule = Rule()
        seen.add(state(model, keys))
    assert len(seen) == 50


def test_keys_keep_no_model_and_nothing_on_it_alive():
    model, keys = Encoder(), Keys(())
    model.linear.forward = model.linear.forward
    model.linear.owner = [model]
    state(model, keys)
    alive = weakref.ref(model.linear.weight)
    del model
    gc.collect()
    assert alive() is None


def test_training_mode_and_weights_that_are_not_there_have_no_state():
    with pytest.raises(Uncacheable, match="training mode"):
        state(Encoder().train(), Keys(()))
    with pytest.raises(Uncacheable, match="cannot be seen"):
        state(Encoder().to("meta"), Keys(()))
    with torch.inference_mode():
        model = Encoder()
    with pytest.raises(Uncacheable, match="cannot be seen"):
        state(model, Keys(()))


def test_a_sample_meets_every_column_and_every_row_of_the_largest_vocabularies():
    for rows, width in ((256_384, 4), (1000, 300), (300, 1000), (512, 512)):
        count, stride = every_row_and_column(torch.Size((rows, width)))
        sample = torch.arange(rows * width).as_strided((count,), (stride,))
        assert set((sample % width).tolist()) == set(range(width))
        assert set((sample // width).tolist()) == set(range(rows))
    assert every_row_and_column(torch.Size((2**21, 1)))[0] <= 2**18


def test_no_pipeline_of_diffusers_encodes_by_what_the_key_leaves_out():
    encoding = 0
    for name in diffusers._import_structure["pipelines"]:
        cls = getattr(diffusers, name)
        if "encode_prompt" in _members(cls):
            encoding += 1
            read = _names_in(cls, "encode_prompt")
            models = {each for each, kind in _components(cls).items() if issubclass(kind, diffusers.ModelMixin)}
            assert {each for each in models & read if not each.startswith(ENCODERS)} <= {"transformer", "unet"}, name
            left_out = {each for each in read if each[0] == "_" and isinstance(_members(cls).get(each[1:]), property)}
            # The first it only sets.
            assert left_out <= {"_lora_scale"} or "do_classifier_free_guidance" in read, name
    assert encoding > 200


def _members(cls: Any) -> dict[str, Any]:
    bases = [base for base in getattr(cls, "__mro__", ()) if base not in diffusers.DiffusionPipeline.__mro__]
    return {name: each for base in reversed(bases) for name, each in vars(base).items()}


def _components(cls: type) -> dict[str, type]:
    """The classes of a pipeline's components, as far as its constructor names them."""
    hints = typing.get_type_hints(cls.__init__)
    kinds = [(name, kind) for name, hint in hints.items() for kind in (hint, *typing.get_args(hint))]
    return {name: kind for name, kind in kinds if isinstance(kind, type)}


def _names_in(cls: type, method: str) -> set[str]:
    """What is mentioned in the code of a method, and of the methods and properties that it mentions."""
    waiting, seen, members = [method], {method}, _members(cls)
    while waiting:
        member = members.get(waiting.pop())
        member = inspect.unwrap(getattr(member, "fget", getattr(member, "__func__", member)) or int)
        codes = [getattr(member, "__code__", None)]
        while codes:
            if isinstance(code := codes.pop(), types.CodeType):
                codes += code.co_consts
                waiting += {*code.co_names} - seen
                seen |= {*code.co_names}
    return seen


def test_a_bound_is_checked_where_it_is_set():
    with pytest.raises(ConfigurationError, match=r"reuse\.max_bytes=0 must be an integer of at least 1"):
        ReuseConfig(0)
    with pytest.raises(ConfigurationError, match=r"reuse='often' is not allowed; use one of 'auto', None, False or"):
        accelerate_pipeline(object(), reuse="often")


def test_nothing_keeps_an_entry_alive_but_the_store():
    store = Store(10**6)
    kept = entry()
    tensor = weakref.ref(kept.returned[0])
    store.put(b"a", kept)
    del kept
    assert tensor() is not None
    store.clear()
    gc.collect()
    assert tensor() is None
