"""The ledger takes back what it recorded, and nothing else."""

import gc

import pytest

from pipeboost.core.errors import UnsupportedError
from pipeboost.core.ledger import Ledger


class Thing:
    value = "class"

    def __call__(self):
        return "stock"


def set_value(ledger, thing, value):
    thing.value = value
    ledger.record("value", lambda: delattr(thing, "value"))


def loud(call_next, owner):
    return call_next().upper()


def test_undo_runs_newest_first_and_twice_is_harmless():
    order = []
    ledger = Ledger()
    ledger.record("first", lambda: order.append("first"))
    ledger.record("second", lambda: order.append("second"))
    ledger.undo()
    ledger.undo()
    assert order == ["second", "first"]
    assert ledger.changes == ()


def test_a_failure_half_way_rolls_everything_back():
    thing = Thing()

    def fail_half_way() -> None:
        with Ledger() as ledger:
            set_value(ledger, thing, "ours")
            ledger.add_middleware(thing, "__call__", loud, place="component.stages")
            assert thing() == "STOCK"
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail_half_way()
    assert thing.value == "class"
    assert type(thing) is Thing
    assert vars(thing) == {}


def test_an_inverse_that_fails_does_not_keep_the_others_from_running():
    thing = Thing()
    ledger = Ledger()
    set_value(ledger, thing, "ours")
    ledger.record("fails", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ledger.undo()
    assert thing.value == "class"


def test_a_shared_change_stays_until_its_last_holder_leaves():
    thing = Thing()
    first, second = Ledger(), Ledger()
    for ledger in (first, second):
        ledger.share(
            thing,
            "voice",
            "loud",
            lambda inner: inner.add_middleware(thing, "__call__", loud, place="component.stages"),
        )
    assert first.share(thing, "voice", "loud", lambda inner: pytest.fail("applied again")) is False
    first.undo()
    assert thing() == "STOCK"
    second.undo()
    assert thing() == "stock"
    assert type(thing) is Thing


def test_a_shared_change_refuses_other_settings():
    thing = Thing()
    first, second = Ledger(), Ledger()
    first.share(thing, "voice", "loud", lambda inner: None)
    with pytest.raises(UnsupportedError, match="voice is 'loud', not 'soft'"):
        second.share(thing, "voice", "soft", lambda inner: None)


def test_a_failed_shared_change_is_not_held():
    thing = Thing()
    ledger = Ledger()

    def fail(inner):
        inner.add_middleware(thing, "__call__", loud, place="component.stages")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        ledger.share(thing, "voice", "loud", fail)
    assert type(thing) is Thing
    assert ledger.share(thing, "voice", "soft", lambda inner: None)


def test_the_ledger_does_not_keep_replaced_objects_alive():
    ledger = Ledger()
    thing = Thing()
    ledger.add_middleware(thing, "__call__", loud, place="component.stages")
    del thing
    gc.collect()
    assert ledger.changes == ()
