"""Ctrl-C at any moment of accelerating or removing leaves nothing that a second `remove()` does not take off; so two
threads that do either at once."""

import contextlib
import copy
import functools
import itertools
import linecache
import sys
import threading
from pathlib import Path

import pytest
import torch

import pipeboost
from pipeboost import OffloadConfig, PipeboostError, accelerate_pipeline
from pipeboost.applied_plan import AppliedPlan
from pipeboost.core.seams import stock_class
from tests.pipelines.tiny import TINY

_OURS = str(Path(pipeboost.__file__).parent)
_SETTINGS = {
    "flux_dev": {"quality": "fast", "compile": None},
    "wan21_t2v": {"offload": OffloadConfig("layerwise", text_encoders="stage"), "compile": None},
}


def interrupted(action, moment):
    """Run `action` with a Ctrl-C before the `moment`th line of our code that runs, or the next; whether it came."""
    left = moment

    def trace(frame, event, _):
        nonlocal left
        if not frame.f_code.co_filename.startswith(_OURS):
            return None
        if event == "line":
            left -= 1
            # Between the body of a `with` and its exit, Python looks at no signal, but traces the line again.
            text = linecache.getline(frame.f_code.co_filename, frame.f_lineno) if left < 0 else "with "
            if not text.lstrip().startswith("with "):
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def left_behind(pipe):
    components = [each for each in pipe.components.values() if isinstance(each, torch.nn.Module)]
    modules = [module for each in components for module in each.modules()]
    objects = [pipe, *pipe.components.values(), *modules, *(getattr(module, "processor", None) for module in modules)]
    names = [type(each).__name__ for each in objects if type(each) is not stock_class(each)]
    return names + [name for each in objects for name in getattr(each, "__dict__", {}) if "pipeboost" in name]


def stock_again(pipe):
    if "acceleration" in vars(pipe):
        pipe.acceleration.remove()
    return "acceleration" not in vars(pipe) and not left_behind(pipe)


@pytest.fixture(params=_SETTINGS)
def case(request):
    entry = TINY[request.param]
    return entry, entry.build(), _SETTINGS[request.param]


def test_after_ctrl_c_in_remove_a_second_one_leaves_nothing(case):
    entry, pipe, settings = case
    expected = entry.call(pipe)
    for moment in itertools.count(step=317):
        accelerate_pipeline(pipe, **settings)
        handle = pipe.acceleration
        came = interrupted(handle.remove, moment)
        handle.remove()
        assert "acceleration" not in vars(pipe)
        assert not left_behind(pipe), moment
        if not came:
            break
    assert torch.equal(entry.call(pipe), expected)


@pytest.mark.parametrize("refused", [False, True])
def test_after_ctrl_c_in_accelerate_pipeline_or_its_roll_back_remove_leaves_nothing(case, refused, monkeypatch):
    entry, pipe, settings = case
    expected = entry.call(pipe)
    bind = AppliedPlan.bind

    def refusing(self, pipe):
        bind(self, pipe)
        raise PipeboostError("refused at last")

    if refused:
        monkeypatch.setattr(AppliedPlan, "bind", refusing)
    for moment in itertools.count(step=1801):
        came = False
        with contextlib.suppress(PipeboostError):
            came = interrupted(lambda: accelerate_pipeline(pipe, **settings), moment)
        assert stock_again(pipe), moment
        if not came:
            break
    assert torch.equal(entry.call(pipe), expected)


def in_threads(*actions):
    """Run all of them at once; what they raise."""
    gate, errors = threading.Barrier(len(actions)), []

    def run(action):
        gate.wait()
        try:
            action()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(action,), daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return errors


def test_threads_accelerate_and_remove_one_pipeline_at_once(case):
    entry, pipe, settings = case
    expected = entry.call(pipe)
    for _ in range(3):
        accelerate = lambda: accelerate_pipeline(pipe, **settings)  # noqa: E731
        assert in_threads(accelerate, accelerate) == []
        assert entry.call(pipe).shape == expected.shape
        remove = pipe.acceleration.remove
        assert in_threads(remove, accelerate, remove) == []
        assert stock_again(pipe)
    assert torch.equal(entry.call(pipe), expected)


def test_threads_accelerate_pipelines_that_share_components():
    entry = TINY["flux_dev"]
    pipe = entry.build()
    expected = entry.call(pipe)
    view, sibling = copy.copy(pipe), type(pipe)(**pipe.components)
    sibling.set_progress_bar_config(disable=True)
    pipes = (pipe, view, sibling)
    for _ in range(3):
        assert in_threads(*(functools.partial(accelerate_pipeline, each, compile=None) for each in pipes)) == []
        assert in_threads(*(each.acceleration.remove for each in pipes)) == []
        assert not any(map(left_behind, pipes))
    assert torch.equal(entry.call(pipe), expected)


def test_a_thread_that_removes_during_a_call_is_refused_and_waits_for_nothing():
    entry = TINY["flux_dev"]
    pipe = entry.build()
    expected = entry.call(pipe)
    accelerate_pipeline(pipe, quality="exact")
    errors = []

    def at_the_step(pipe, step, timestep, values):
        actions = (pipe.acceleration.remove, lambda: accelerate_pipeline(pipe, quality="exact"))
        errors.extend(error for action in actions for error in in_threads(action))
        return values

    assert torch.equal(entry.call(pipe, callback_on_step_end=at_the_step), expected)
    assert {str(error).split(";")[0] for error in errors} == {"a call of this pipeline is running"}
    assert stock_again(pipe)
