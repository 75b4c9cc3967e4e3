"""Submitted requests on tiny pipelines: their results, progress and reports, each cancelled or failed by itself."""

import contextlib
import copy
import gc
import threading
import time
import weakref

import pytest
import torch

from pipeboost import Cancelled, PipeboostError, Stage, accelerate_pipeline
from pipeboost.stages.stage import StageVerificationError
from tests.moments import freed_at_once, threads_here
from tests.pipelines.tiny import OTHER_PROMPT, PROMPT, TINY

ENTRY = TINY["flux_dev"]
LONG = 60.0


def exact(name="flux_dev", **arguments):
    return accelerate_pipeline(TINY[name].build(), quality="exact", reuse=None, **arguments)


def stock(seed=0):
    return ENTRY.stock(seed=seed)


def submitted(pipe, seeds, **more):
    return [pipe.acceleration.submit(**ENTRY.call_kwargs(seed=seed, **more)) for seed in seeds]


@contextlib.contextmanager
def held(module):
    """Inside, no forward of a module begins before the event that this yields is set."""
    go = threading.Event()
    hook = module.register_forward_pre_hook(lambda *_: None if go.wait(LONG) else pytest.fail("never set"))
    try:
        yield go
    finally:
        go.set()
        hook.remove()


@pytest.mark.parametrize("name", ["flux_true_cfg", "wan21_t2v"])
def test_requests_return_what_plain_calls_return_and_have_a_report_each(name):
    entry, pipe = TINY[name], exact(name)
    calls = [{"seed": seed, "prompt": (PROMPT, OTHER_PROMPT)[seed % 2], "steps": 2 + seed % 3} for seed in range(5)]
    requests = [pipe.acceleration.submit(**entry.call_kwargs(**call)) for call in calls]
    for request, call in zip(requests, calls, strict=True):
        result = torch.as_tensor(request.result()[0])
        assert len(pipe.acceleration.report().steps) == len(request.report.steps) == call["steps"]
        assert request.done
        assert torch.equal(result, torch.as_tensor(pipe(**entry.call_kwargs(**call))[0]))
    assert [len(request.report.steps) for request in requests] == [call["steps"] for call in calls]


def test_one_of_several_requests_is_cancelled_and_the_others_go_on():
    pipe = exact()
    with held(pipe.transformer) as go:
        requests = submitted(pipe, range(6))
        requests[1].cancel()  # which denoises, or is about to
        requests[5].cancel()  # which is far from its turn
        with pytest.raises(Cancelled, match="while it waited for its turn"):
            requests[5].result(LONG)
        go.set()
        with pytest.raises(Cancelled):
            requests[1].result(LONG)
    for seed in (0, 2, 3, 4):
        assert torch.equal(requests[seed].result(LONG)[0], stock(seed))
    assert requests[5].report is None
    assert not pipe.acceleration._applied.running


def test_cancel_ends_every_request_and_a_plain_call_that_waits_for_them():
    pipe, results = exact(), []

    def work():
        with pytest.raises(Cancelled):
            ENTRY.call(pipe)
        results.append("cancelled")

    with held(pipe.transformer) as go:
        requests = submitted(pipe, range(2))
        plain = threading.Thread(target=work)
        plain.start()
        while len(pipe.acceleration._calls.records) < 3:
            time.sleep(0.01)
        pipe.acceleration.cancel()
        go.set()
        for request in requests:
            with pytest.raises(Cancelled):
                request.result(LONG)
        plain.join(LONG)
    assert results == ["cancelled"]
    assert torch.equal(ENTRY.call(pipe), stock())


def test_progress_is_read_from_any_thread_and_listeners_are_told():
    pipe, told, everywhere = exact(), [], []
    pipe.acceleration.progress = everywhere.append
    with held(pipe.transformer) as go:
        request, other = submitted(pipe, range(2), steps=3)
        request.on_progress(told.append)
        while request.progress is None or request.progress.stage != "waiting":
            time.sleep(0.01)
            assert not request.done
        go.set()
        request.result(LONG)
    steps = [(each.stage, each.step, each.steps) for each in told if each.step is not None]
    assert steps == [("denoising", step, 3) for step in (1, 2, 3)]
    assert request.progress == told[-1]
    other.result(LONG)
    assert sum(each.step is not None for each in everywhere) == 6


def test_a_listener_that_raises_ends_its_request_alone():
    pipe = exact()

    def stop(progress):
        raise KeyError(progress.stage)

    with held(pipe.transformer) as go:
        first, second = submitted(pipe, range(2))
        first.on_progress(stop)
        go.set()
        with pytest.raises(KeyError):
            first.result(LONG)
    assert torch.equal(second.result(LONG)[0], stock(1))


def test_a_request_that_fails_does_not_end_the_others():
    pipe = exact()
    good = submitted(pipe, range(2))
    bad = pipe.acceleration.submit(**{**ENTRY.call_kwargs(), "height": -16})
    unknown = pipe.acceleration.submit(**ENTRY.call_kwargs(), weather="rain")
    good += submitted(pipe, range(2, 4))
    for _ in range(2):
        with pytest.raises(StageVerificationError, match="height=-16"):
            bad.result(LONG)
    with pytest.raises(TypeError, match="weather"):
        unknown.result(LONG)
    for seed, request in enumerate(good):
        assert torch.equal(request.result(LONG)[0], stock(seed))


def test_requests_that_draw_from_the_global_state_and_plain_calls_run_in_order_as_stock_would():
    pipe, other = exact(), ENTRY.build()
    shared, twin = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)

    def arguments(generator):
        return {**ENTRY.call_kwargs(), "generator": generator}

    torch.manual_seed(0)
    expected = [other(**arguments(generator))[0] for generator in (None, twin, twin, None)]
    torch.manual_seed(0)
    requests = [pipe.acceleration.submit(**arguments(generator)) for generator in (None, shared, shared)]
    last = pipe(**arguments(None))[0]
    for found, wanted in zip([*(each.result(LONG)[0] for each in requests), last], expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("offload", ["stage", None])
def test_under_offload_one_request_runs_at_a_time(offload):
    pipe, most = exact(offload=offload), 0

    class Counting(Stage):
        def run(self, values):
            nonlocal most
            most = max(most, len(pipe.acceleration._applied.running))
            return values

    pipe.acceleration.add_stage("counting", Counting(), before="decoding")
    for seed, request in enumerate(submitted(pipe, range(4))):
        assert torch.equal(request.result(LONG)[0], stock(seed))
    assert (most == 1) == (offload == "stage")


def test_a_views_request_runs_the_view():
    pipe = exact()
    view = copy.copy(pipe)
    shift = {"use_dynamic_shifting": False, "shift": 9.0}
    view.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **shift)
    other = ENTRY.build()
    other.scheduler = type(other.scheduler).from_config(other.scheduler.config, **shift)
    found = [each.acceleration.submit(**ENTRY.call_kwargs()).result(LONG)[0] for each in (view, pipe)]
    assert torch.equal(found[0], ENTRY.call(other))
    assert torch.equal(found[1], stock())
    del pipe
    gc.collect()
    assert torch.equal(view.acceleration.submit(**ENTRY.call_kwargs()).result(LONG)[0], found[0])
    view.acceleration.remove()


def test_while_a_request_waits_or_runs_nothing_is_removed():
    pipe = exact()
    with held(pipe.transformer) as go:
        request = submitted(pipe, range(1))[0]
        with pytest.raises(PipeboostError, match="a request of this pipeline is under way"):
            pipe.acceleration.remove()
        with pytest.raises(PipeboostError, match="a request of this pipeline is under way"):
            accelerate_pipeline(pipe)
        with pytest.raises(TimeoutError, match="not ended within"):
            request.result(0.01)
        go.set()
        assert torch.equal(request.result(LONG)[0], stock())
    pipe.acceleration.remove()
    assert torch.equal(ENTRY.call(pipe), stock())


def test_ended_requests_keep_nothing_of_a_pipeline_that_is_dropped():
    pipe = exact()
    with freed_at_once():
        requests = submitted(pipe, range(6))
        requests.append(pipe.acceleration.submit(**{**ENTRY.call_kwargs(), "height": -16}))
        requests[5].cancel()
        for request in requests:
            with contextlib.suppress(Cancelled, StageVerificationError):
                request.result(LONG)
        vars(pipe.transformer).pop("_diffusers_hook", None)  # a cycle of Diffusers' own
        transformer = weakref.ref(pipe.transformer)
        del pipe
        assert transformer() is None
        assert len(requests[0].report.steps) == 2


def test_at_the_end_of_the_program_running_requests_are_cancelled_and_no_thread_is_left():
    pipe, threads = exact(), threads_here()
    requests = submitted(pipe, range(8), steps=50)
    pipe.acceleration._requests._give_up()
    assert threads_here() == threads
    for request in requests[:4]:
        with pytest.raises(Cancelled):
            request.result(LONG)
    assert not requests[7].done  # it never began


def test_a_request_runs_in_the_modes_of_the_thread_that_submitted_it():
    pipe, seen = exact(), []

    class Noting(Stage):
        def run(self, values):
            seen.append((torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
            return values

    pipe.acceleration.add_stage("noting", Noting(), before="decoding")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inside = submitted(pipe, range(1))[0]
        expected = ENTRY.call(pipe)
    submitted(pipe, range(1))[0].result(LONG)
    assert torch.equal(inside.result(LONG)[0], expected)
    assert seen == [(True, True), (True, True), (False, False)]


def test_a_result_that_could_not_come_is_not_waited_for():
    pipe, errors = exact(), []

    class Waiting(Stage):
        def run(self, values):
            request = submitted(pipe, range(1, 2))[0]
            try:
                request.result(LONG)
            except PipeboostError as error:
                errors.append((str(error), request))
            return values

    pipe.acceleration.add_stage("waiting for another", Waiting(), before="text encoding")
    assert torch.equal(ENTRY.call(pipe), stock())
    pipe.acceleration.remove_stage("waiting for another")
    (words, request), *_ = errors
    assert "take its result after that call" in words
    assert torch.equal(request.result(LONG)[0], stock(1))
