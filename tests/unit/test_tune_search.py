"""Schedules found in recordings, budgets, and intervals."""

import pytest
import torch

from pipeboost.core.errors import ConfigurationError
from pipeboost.features.cache.extrapolation import OutputBranch
from pipeboost.tune.search import Schedule, best_gated_schedule, best_schedule, gains_between, injected
from pipeboost.tune.search import _error as _predicted
from pipeboost.tune.tuned import Budget, interval

STEPS = 12


def recordings(bend: float) -> torch.Tensor:
    """Predictions of four prompts over twelve steps: straight lines, and a bend after the sixth step."""
    generator = torch.Generator().manual_seed(0)
    start, slope, after = (torch.randn(4, 64, generator=generator) for _ in range(3))
    steps = torch.arange(STEPS)[:, None, None]
    return start + slope * steps / STEPS + bend * after * (steps - 6).clamp(min=0)


def test_a_line_takes_two_forwards_and_a_bend_a_third() -> None:
    even = torch.ones(STEPS)
    straight = best_schedule(recordings(0.0), even, even, forwards=2, order=1)
    assert straight.computed[:2] == (0, 1)
    bent = best_schedule(recordings(1.0), even, even, forwards=4, order=1).computed
    assert bent[:2] == (0, 1)
    assert bent[2:] in ((6, 7), (5, 7), (7, 8))


def test_steps_whose_errors_count_more_are_computed() -> None:
    noise = torch.randn(STEPS, 4, 64, generator=torch.Generator().manual_seed(3))
    early = torch.tensor([1.0] * 6 + [1e-3] * 6)
    computed = best_schedule(noise, torch.ones(STEPS), early, forwards=6, order=0).computed
    assert computed == (0, 1, 2, 3, 4, 5)
    late = best_schedule(noise, torch.ones(STEPS), early.flip(0), forwards=7, order=0).computed
    assert set(late) >= {6, 7, 8, 9, 10, 11}


def test_beam_search_finds_what_trying_every_schedule_finds() -> None:
    predictions = recordings(0.3) + 0.1 * torch.randn(STEPS, 4, 64, generator=torch.Generator().manual_seed(5))
    weights, gains = torch.linspace(0.2, 1.0, STEPS), torch.linspace(2.0, 0.4, STEPS)
    found = best_schedule(predictions, weights, gains, forwards=4, order=1)
    every = [
        _error(predictions, weights * gains, (0, a, b, c))
        for a in range(1, STEPS)
        for b in range(a + 1, STEPS)
        for c in range(b + 1, STEPS)
    ]
    assert _error(predictions, weights * gains, found.computed) <= 1.05 * min(every)


def test_a_gate_is_found_where_what_guidance_adds_stays_as_it_is() -> None:
    even, first = torch.ones(STEPS), torch.randn(STEPS, 4, 64, generator=torch.Generator().manual_seed(7))
    added = torch.randn(STEPS, 4, 64, generator=torch.Generator().manual_seed(8))
    added[4:] = added[4]  # computed steps up to the gate include the fifth, and from there on the first branch is all
    found = best_gated_schedule(first + added, first, even, even, forwards=8, order=0)
    assert found is not None
    error, schedule = found
    assert schedule.gate is not None
    assert schedule.forwards == 8
    assert schedule.gate > 4
    ungated = _error(first + added, even, best_schedule(first + added, even, even, forwards=8, order=0).computed)
    assert error < 0.5 * ungated


@pytest.mark.parametrize(("computed", "gate"), [((0, 1, 3, 6, 9), 4), ((0, 2), 1), (tuple(range(STEPS)), 5)])
def test_the_error_of_a_gated_schedule_is_that_of_computing_as_it_says(computed: tuple[int, ...], gate: int) -> None:
    generator = torch.Generator().manual_seed(9)
    first, added = (torch.randn(STEPS, 4, 64, generator=generator) for _ in range(2))
    impact, total, last = torch.linspace(0.5, 2.0, STEPS), torch.zeros(4, 64), 0
    for step in range(STEPS):
        branch = OutputBranch([int(each in computed) for each in range(STEPS)], 0)
        for each in range(step + 1):
            first_branch = branch.run(lambda each=each: first[each])
        if step in computed and step < gate:
            last = step
        told = first_branch + added[last]
        total += impact[step] * (told - first[step] - added[step])
    found = _predicted(first + added, first, impact, Schedule(computed, 0, gate))
    torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-4)


def test_forwards_of_a_gated_schedule_are_the_mean_of_both_branches() -> None:
    assert Schedule((0, 1, 4), 1).forwards == 3
    assert Schedule((0, 1, 4), 1, gate=3).forwards == 2.5
    assert str(Schedule((0, 1, 4), 1, gate=3)) == "order 1: 0, 1, 4; second branch before step 3"
    even = torch.ones(STEPS)
    assert best_gated_schedule(recordings(0.3), recordings(0.1), even, even, forwards=1, order=1) is None


def _error(predictions: torch.Tensor, impact: torch.Tensor, computed: tuple[int, ...]) -> float:
    total = torch.zeros_like(predictions[0])
    for step in range(STEPS):
        known = [each for each in computed if each <= step][-2:]
        if step in computed:
            continue
        guess = predictions[known[-1]]
        if len(known) == 2:
            slope = (predictions[known[1]] - predictions[known[0]]) / (known[1] - known[0])
            guess = guess + slope * (step - known[1])
        total += impact[step] * (guess - predictions[step])
    return float(total.pow(2).mean(1).quantile(0.9))


def test_gains_are_interpolated_between_the_probes_and_kept_beyond_them() -> None:
    gains = gains_between([1, 3], [1.0, 4.0], 6)
    torch.testing.assert_close(gains, torch.tensor([1.0, 1.0, 2.0, 4.0, 4.0, 4.0]))


def test_skipping_a_step_of_a_line_adds_nothing() -> None:
    assert float(injected(recordings(0.0), torch.ones(STEPS), 5, order=1).max()) < 1e-5
    assert float(injected(recordings(1.0), torch.ones(STEPS), 7, order=1).min()) > 0.1


@pytest.mark.parametrize("text", ["psnr>30", "lpips>=0.1", "flicker<=1", "psnr>=", "psnr>=1.2.3", "", 30])
def test_a_budget_that_cannot_be_read_is_one_sentence(text: object) -> None:
    with pytest.raises(ConfigurationError, match=r"budget=.* must be one of 'psnr>=', 'ssim>=', 'lpips<=' and"):
        Budget.of(text)  # type: ignore[arg-type]


def test_a_budget_reads_as_it_is_written() -> None:
    assert str(Budget.of(" psnr >= 30.5 ")) == "psnr>=30.5"


def test_intervals_are_wilsons() -> None:
    low, high = interval(196, 200)
    assert (round(low, 4), round(high, 4)) == (0.9497, 0.9922)  # Wilson 1927, as in any table
    assert interval(0, 10)[0] < 1e-15
    assert interval(10, 10)[1] > 1 - 1e-15
