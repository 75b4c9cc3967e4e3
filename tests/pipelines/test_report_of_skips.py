"""What a report says of skipped steps: which they were, and what they saved."""

import dataclasses

import matplotlib.figure
import pytest

from pipeboost import CacheConfig, accelerate_pipeline
from pipeboost.stages.report import Report
from tests.pipelines.tiny import TINY

SKIPS = CacheConfig(extrapolate="output", step_mask=[0, 2, 5], steps=8)
EXPECTED = [False, True, False, True, True, False, True, True]


def report_of(name: str, cache: CacheConfig | None) -> Report:
    pipe = accelerate_pipeline(TINY[name].build(), quality="fast", cache=cache, compile=None)
    TINY[name].call(pipe, steps=8)
    return pipe.acceleration.report()


def test_a_report_says_which_steps_were_skipped_and_what_that_saved(tmp_path, monkeypatch):
    report = report_of("flux_true_cfg", SKIPS)
    assert report.skipped == {f"transformer.output branch {branch}": EXPECTED for branch in (0, 1)}
    assert report.skipped_steps == EXPECTED
    assert report.flops_saved == 5 / 8
    times = [9.0, 0.1, 1.0, 0.1, 0.3, 2.0, 0.2, 0.2]
    report = dataclasses.replace(report, steps=times)
    assert report.seconds_saved == pytest.approx((1.5 - 0.2) * 5)
    assert "skipping saved 62% of the transformer's FLOPs and 6.500 s" in str(report)
    figures = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    report.plot(tmp_path / "report.png")
    drawn = {line.get_label(): list(line.get_xdata()) for line in figures[0].axes[1].get_lines()}
    assert drawn["computed"] == [1, 3, 6]
    assert drawn["skipped"] == [2, 4, 5, 7, 8]


def test_without_skips_nothing_is_said_to_be_saved():
    report = report_of("flux_dev", None)
    assert report.skipped_steps == [False] * 8
    assert (report.flops_saved, report.seconds_saved) == (None, None)
    assert "saved" not in str(report)


def test_where_only_blocks_are_skipped_the_flops_are_not_known():
    report = report_of("flux_dev", CacheConfig(extrapolate="blocks", warmup=1, threshold=0.9))
    assert any(report.skipped_steps)
    assert report.flops_saved is None
    assert report.seconds_saved is not None
