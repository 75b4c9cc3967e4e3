"""What is kept is bounded and apart; what a state is changes with whatever could change an embedding."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeboost import ReuseConfig, accelerate_pipeline
from pipeboost.core.errors import ConfigurationError
from pipeboost.features.reuse.encoders import Encoders, spread
from pipeboost.features.reuse.key import content, names_in
from pipeboost.features.reuse.store import Entry, Store, Uncacheable


def entry(elements: int = 10) -> Entry:
    return Entry.of((torch.ones(elements), None), {})


def digest(model: object, encoders: Encoders) -> bytes:
    return encoders.digest({"model": model}, placed=True)


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
    assert (len(store), store.size) == (0, 0)


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
    told = [repr(content(value)) for value in values]
    assert len(set(told)) == len(values)
    assert told == [repr(content(copy.deepcopy(value))) for value in values]
    for value in (object(), torch.Generator(), [lambda: None], np.array([object()]), torch.ones(2, device="meta")):
        with pytest.raises(Uncacheable):
            content(value)


def test_a_number_is_never_given_twice():
    encoders = Encoders()
    seen = set()
    for _ in range(50):
        one = nn.Parameter(torch.ones(2))
        assert encoders.number(one) == encoders.number(one)
        seen.add(encoders.number(one))
        del one
    assert len(seen) == 50


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
    model, encoders = Encoder(), Encoders()
    before = digest(model, encoders)
    keep(model)
    assert digest(model, encoders) == before


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
    model, encoders = Encoder(), Encoders()
    before = digest(model, encoders)
    assert digest(model, encoders) == before
    with torch.no_grad():
        CHANGES[change](model)
    assert digest(model, encoders) != before


def test_an_attribute_under_another_name_or_on_another_class_is_another_state():
    class Subclass(nn.Linear):
        pass

    model, encoders = Encoder(), Encoders()
    model.linear.first = print
    seen = {digest(model, encoders)}
    model.linear.second = model.linear.__dict__.pop("first")
    seen.add(digest(model, encoders))
    model.linear.__class__ = Subclass
    seen.add(digest(model, encoders))
    model.more = nn.ModuleDict({"a": nn.ReLU()}).eval()
    seen.add(digest(model, encoders))
    model.more["b"] = model.more.pop("a")
    seen.add(digest(model, encoders))
    assert len(seen) == 5


def test_an_attribute_that_took_the_address_of_a_dead_one_is_another_state():
    class Rule:
        pass

    model, encoders = Encoder(), Encoders()
    seen = set()
    for _ in range(50):
        model.linear.rule = None
        model.linear.rule = Rule()
        seen.add(digest(model, encoders))
    assert len(seen) == 50


def test_encoders_keep_no_model_and_nothing_on_it_alive():
    model, encoders = Encoder(), Encoders()
    model.linear.forward = model.linear.forward
    model.linear.owner = [model]
    before = digest(model, encoders)
    encoders.clear()
    assert digest(model, encoders) == before
    alive = weakref.ref(model.linear.weight)
    del model
    gc.collect()
    assert alive() is None


def test_what_python_and_torch_show_is_seen_without_reading_weights():
    unseen = {name for name in CHANGES if "through .data" in name} | {"buffer"}
    for name, change in CHANGES.items():
        model, encoders = Encoder(), Encoders()
        digest(model, encoders)
        assert encoders.shows_no_change({"model": model})
        with torch.no_grad():
            change(model)
        assert name in unseen or not encoders.shows_no_change({"model": model}), name
    model, encoders = Encoder(), Encoders()
    digest(model, encoders)
    _swap(model)
    assert encoders.shows_no_change({"model": model})
    model.positions.add_(1)
    assert not encoders.shows_no_change({"model": model})


def test_training_mode_and_weights_that_are_not_there_have_no_state():
    with pytest.raises(Uncacheable, match="training mode"):
        digest(Encoder().train(), Encoders())
    with pytest.raises(Uncacheable, match="meta"):
        digest(Encoder().to("meta"), Encoders())
    with torch.inference_mode():
        model = Encoder()
    with pytest.raises(Uncacheable, match="inference mode"):
        digest(model, Encoders())


def test_a_sample_meets_every_column_and_every_row_of_the_largest_vocabularies():
    for rows, width in ((256_384, 4), (1000, 300), (300, 1000), (512, 512)):
        count, stride = spread(torch.Size((rows, width)))
        sample = torch.arange(rows * width).as_strided((count,), (stride,))
        assert set((sample % width).tolist()) == set(range(width))
        assert set((sample // width).tolist()) == set(range(rows))
    assert spread(torch.Size((2**21, 1)))[0] <= 2**18


def test_the_names_a_method_touches_are_found_through_helpers_properties_and_super():
    class Base:
        def encode_prompt(self, prompt):
            return [self._helper(text) for text in prompt]

        def _helper(self, text):
            return self.template, self.scale

        @property
        def scale(self):
            return self._scale

    class Derived(Base):
        def encode_prompt(self, prompt):
            self._written = 1
            return super().encode_prompt(prompt)

        def unrelated(self):
            return self.something

    names = names_in(Derived)
    assert {"template", "_scale", "_helper"} <= names.read
    assert names.written == {"_written"}
    assert "something" not in names.read


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
