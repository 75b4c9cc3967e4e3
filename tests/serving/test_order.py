"""Owners share the worker's seconds, short jobs come first among one owner's, and none waits for ever."""

import random
import time
from collections import defaultdict
from dataclasses import replace

import pytest

from pipeboost.serving.jobs import Call
from pipeboost.serving.order import AGEING, HALF_LIFE, Order
from tests.serving.jobs import CARD, RESULT, make_job


def _run(order, arrivals, until=float("inf")):
    """Let a worker run jobs, given by when they arrive, as `order` says; return (job, when it began) in that order."""
    arrivals, queued, began, now = sorted(arrivals, key=lambda job: job.created), [], [], 0.0
    while (arrivals or queued) and now < until:
        now = now if queued else max(now, arrivals[0].created)
        while arrivals and arrivals[0].created <= now:
            queued.append(arrivals.pop(0))
        job = order.next(queued, now)
        queued.remove(job)
        began.append((job, now))
        now += job.cost
        order.spent(job.owner, job.cost)
    return began


def _jobs(owner, count, *, cost=10.0, created=0.0, apart=0.0):
    return [make_job(owner, cost=cost, created=created + number * apart) for number in range(count)]


def test_fifo_is_the_order_in_which_they_came():
    jobs = [make_job(cost=cost) for cost in (9.0, 1.0, 5.0)]
    order = Order("fifo")
    order.spent("anna", 100)
    assert [job for job, _ in _run(order, jobs)] == jobs
    assert order.next([], 0) is None
    assert Order("fair").next([], 0) is None


def test_of_one_owners_jobs_the_shortest_comes_first():
    jobs = [make_job(cost=cost, created=0.0) for cost in (9.0, 1.0, 5.0)]
    assert [job.cost for job, _ in _run(Order("fair"), jobs)] == [1.0, 5.0, 9.0]


@pytest.mark.parametrize("costs", [(10.0, 10.0), (40.0, 5.0), (3.0, 60.0)])
def test_owners_who_both_wait_share_the_seconds_whatever_their_jobs_cost(costs):
    longest = max(costs)
    jobs = [job for owner, cost in zip(("anna", "bert"), costs, strict=True) for job in _jobs(owner, 300, cost=cost)]
    had = dict.fromkeys(("anna", "bert"), 0.0)
    for job, _ in _run(Order("fair"), jobs, until=600):
        had[job.owner] += job.cost
        assert abs(had["anna"] - had["bert"]) <= 1.5 * longest + 1


def test_who_comes_late_shares_at_once_and_has_no_claim_to_seconds_that_were_not_used():
    early, late = _jobs("anna", 100), _jobs("bert", 40, created=500.0)
    owners = [job.owner for job, began in _run(Order("fair"), early + late) if 510 <= began < 900]
    assert abs(owners.count("anna") - owners.count("bert")) <= 2
    assert "anna" in owners[:3]
    # The same where nobody waited while the first one was served.
    order = Order("fair")
    _run(order, _jobs("anna", 50, apart=10.0))
    together = _jobs("anna", 20, created=500.0) + _jobs("bert", 20, created=500.0)
    owners = [job.owner for job, _ in _run(order, together)][:10]
    assert 4 <= owners.count("anna") <= 6


def test_a_single_request_passes_another_owners_hundred():
    jobs = [*_jobs("anna", 100), make_job("bert", cost=10.0, created=205.0)]
    (began,) = [began for job, began in _run(Order("fair"), jobs) if job.owner == "bert"]
    assert began <= 220


def test_what_an_owner_had_is_forgotten():
    order = Order("fair")
    order.spent("anna", 1000)
    order.next(_jobs("cora", 1), 20 * HALF_LIFE)
    assert order._had("anna") < 0.01
    order.next(_jobs("cora", 1), 40 * HALF_LIFE)
    assert "anna" not in order._spent


def test_a_long_job_is_passed_only_by_those_made_soon_after_it():
    long = make_job(cost=100.0, created=0.5)
    short = _jobs("anna", 2000, cost=1.0, apart=0.9)
    (began,) = [began for job, began in _run(Order("fair"), [long, *short]) if job is long]
    assert 50 < began <= 0.5 + AGEING * 100 * 1.2


@pytest.mark.parametrize("seed", range(5))
def test_no_job_of_any_owner_waits_for_ever_under_random_load(seed):
    chance = random.Random(seed)
    weights = {"anna": 6, "bert": 3, "cora": 1}
    jobs, at = [], 0.0
    for _ in range(600):
        (owner,) = chance.choices(list(weights), weights.values())
        jobs.append(make_job(owner, cost=chance.choice((1.0, 2.0, 5.0, 60.0)), created=at))
        at += chance.expovariate(1 / 18)  # a little more than the worker can do
    began = _run(Order("fair"), jobs)
    assert len(began) == len(jobs)
    # Who asks for less than a third is served as if alone with a third of the worker.
    asked = defaultdict(float)
    for job in jobs:
        asked[job.owner] += job.cost
    waits = [start - job.created for job, start in began if job.owner == "cora"]
    assert asked["cora"] < at / 3
    assert max(waits) <= 3 * 60 + 3 * AGEING * 60
    passed = {job.id: 0 for job in jobs}
    for place, (job, _) in enumerate(began):
        for later, _ in began[place + 1 :]:
            if later.owner == job.owner and later.created + AGEING * later.cost < job.created:
                passed[later.id] += 1
    assert not any(passed.values())


def test_a_prediction_grows_with_pixels_frames_steps_guidance_and_outputs():
    order = Order("fair")
    base = order.predict(Call("a", 1), CARD)
    assert base == pytest.approx(2e-7 * 512 * 512 * 20 * 2)
    assert order.predict(Call("a", 1, count=3), CARD) == pytest.approx(3 * base)
    assert order.predict(Call("a", 1, num_inference_steps=40), CARD) == pytest.approx(2 * base)
    assert order.predict(Call("a", 1, width=1024, height=1024), CARD) == pytest.approx(4 * base)
    assert order.predict(Call("a", 1, guidance_scale=1.0), CARD) == pytest.approx(base / 2)
    video = replace(CARD, kind="video", num_frames=81)
    assert order.predict(Call("a", 1), video) == pytest.approx(81 * base)
    assert order.predict(Call("a", 1, num_frames=1), video) == pytest.approx(base)
    true_cfg = replace(CARD, parameters=("negative_prompt", "true_cfg_scale"))
    assert order.predict(Call("a", 1), true_cfg) == pytest.approx(base / 2)
    assert order.predict(Call("a", 1, negative_prompt=""), true_cfg) == pytest.approx(base)
    off = Call("a", 1, negative_prompt="", arguments={"true_cfg_scale": 1.0})
    assert order.predict(off, true_cfg) == pytest.approx(base / 2)


def _learned(order, seconds, **call):
    order.learn(make_job(call=Call("a", 1, **call), result=replace(RESULT, seconds=seconds)))


def test_predictions_are_learned_and_outliers_change_little():
    order = Order("fair")
    order.learn(make_job(result=replace(RESULT, seconds=9.0)))  # nothing is known of the model yet
    order.predict(Call("a", 1), CARD)
    _learned(order, 60.0)  # the first call compiles
    for _ in range(30):
        _learned(order, 3.0)
    assert order.predict(Call("a", 1), CARD) == pytest.approx(3.0)
    for seconds in (3.1, 500.0, 2.9, 0.01, 3.0):
        _learned(order, seconds)
    assert order.predict(Call("a", 1), CARD) == pytest.approx(3.0, rel=0.05)
    for _ in range(20):
        _learned(order, 6.0)
    assert order.predict(Call("a", 1), CARD) == pytest.approx(6.0)


def test_sizes_that_never_ran_are_predicted_by_the_nearest_that_did():
    order = Order("fair")
    order.predict(Call("a", 1), CARD)
    _learned(order, 2.0)
    _learned(order, 64.0, width=2048, height=2048)
    assert order.predict(Call("a", 1, width=1536, height=2048), CARD) == pytest.approx(64.0 * 0.75)
    assert order.predict(Call("a", 1, width=256, height=256), CARD) == pytest.approx(0.5)
    _learned(order, 1.0, cache="low")
    assert order.predict(Call("a", 1, cache="low"), CARD) == pytest.approx(1.0)
    assert order.predict(Call("a", 1), CARD) == pytest.approx(2.0)


def test_waiting_is_what_runs_and_all_ahead_as_known_now():
    order, now = Order("fair"), time.time()
    ahead = [make_job(cost=4.0), make_job(cost=6.0)]
    running = make_job(cost=8.0, state="in_progress", started=now - 2)
    assert order.waiting([], None, now) == 0
    assert order.waiting(ahead, None, now) == pytest.approx(10)
    assert order.waiting(ahead, running, now) == pytest.approx(16)
    assert order.waiting([], replace(running, step=3, steps=4), now) == pytest.approx(2)
    assert order.waiting([], replace(running, started=now - 99), now) == 0
    order.predict(Call("a", 1), CARD)
    _learned(order, 50.0)
    assert order.waiting(ahead, None, now) == pytest.approx(100)
