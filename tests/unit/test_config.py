"""Settings are checked in one place, merged in one order, and refused in one sentence."""

import json

import pytest

from pipeboost.config import (
    AccelerationConfig,
    AttentionConfig,
    CacheConfig,
    CompileConfig,
    ParallelConfig,
    resolve_config,
)
from pipeboost.errors import ConfigurationError


def test_keyword_arguments_win_over_config_which_wins_over_the_environment(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("quality: balanced\nattention: cudnn\n")
    environment = {"PIPEBOOST_QUALITY": "fast", "PIPEBOOST_ATTENTION": "sage", "PIPEBOOST_COMPILE": "off"}
    settings = resolve_config(path, {"attention": "flex"}, environment)
    assert settings.quality == "balanced"
    assert settings.attention == AttentionConfig("flex")
    assert settings.compile is None
    assert settings.cache == "auto"


def test_a_json_file_and_an_object_give_the_same_settings(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"quality": "fast", "cache": {"threshold": 0.1, "secondary": {"fn": 2}}}))
    wanted = AccelerationConfig(quality="fast", cache=CacheConfig(threshold=0.1, secondary=CacheConfig(fn=2)))
    assert resolve_config(path, {}, {}) == resolve_config(wanted, {}, {}) == wanted


@pytest.mark.parametrize(
    ("value", "expected"), [(None, None), (False, None), (True, "auto"), ("full", CompileConfig("full"))]
)
def test_a_feature_takes_auto_off_a_short_name_or_its_dataclass(value, expected):
    assert AccelerationConfig(compile=value).compile == expected


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CacheConfig(threshold=-1), r"cache.threshold=-1 must be a number in \(0, 1\]"),
        (lambda: CacheConfig(threshold=float("nan")), "cache.threshold=nan"),
        (lambda: CacheConfig(fn=0), "cache.fn=0 must be an integer of at least 1"),
        (lambda: CacheConfig(step_mask="quick"), "'slow', 'medium', 'fast', 'ultra'"),
        (lambda: CacheConfig(step_mask=([8, 3], [])), "positive integers in both"),
        (lambda: CacheConfig(taylorseer_order=9), "cache.taylorseer_order=9 is not allowed"),
        (lambda: CompileConfig(scope="blocks"), "compile='blocks' is not allowed; use one of 'regional', 'full'"),
        (lambda: ParallelConfig(ulysses=0), "parallel.ulysses=0 must be an integer of at least 1"),
        (lambda: AccelerationConfig(cache=3), "cache=3 is not allowed; use 'auto', None"),
        (lambda: AccelerationConfig(parallel="all"), "parallel='all' is not allowed"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(make, words):
    with pytest.raises(ConfigurationError, match=words):
        make()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", "{", "is not valid JSON"),
        ("a.yaml", "a: [", "is not valid YAML"),
        ("a.yaml", "- 1", "must hold a mapping"),
        ("a.yaml", "qualty: fast", "has no setting 'qualty'"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=words):
        AccelerationConfig.load(path)
