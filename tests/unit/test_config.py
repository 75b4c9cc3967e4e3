"""Settings are checked in one place, merged in one order, and refused in one sentence."""

import json

import pytest
import torch

from pipeboost.core.config import (
    AccelerationConfig,
    AttentionConfig,
    CacheConfig,
    CompileConfig,
    ParallelConfig,
    resolve_config,
)
from pipeboost.core.errors import ConfigurationError


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
    ("value", "expected"),
    [(None, None), (False, None), ("off", None), ("auto", "auto"), ("full", CompileConfig("full"))],
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
        (lambda: CacheConfig(step_mask=([], [2, 2])), "positive integers in both"),
        (lambda: CacheConfig(step_mask=([8, 3], [2, 0])), "positive integers in both"),
        (lambda: CacheConfig(step_mask=[8, 3, 3]), "positive integers in both"),
        (
            lambda: CacheConfig(step_mask="fast", policy="often"),
            "cache.policy='often' is not allowed; use one of 'stat",
        ),
        (lambda: CacheConfig(policy="dynamic"), "use it with extrapolate='blocks' and a step_mask"),
        (lambda: CacheConfig("output", "fast", policy="dynamic"), "use it with extrapolate='blocks' and a step_mask"),
        (lambda: CacheConfig(guidance_gate=9), "cache.guidance_gate=9 is for whole forwards; use it with extra"),
        (lambda: CacheConfig(latents=9), "cache.latents=9 is for whole forwards; use it with extrapolate='output'"),
        (lambda: CacheConfig(pipeline=9), "cache.pipeline=9 must be the class name of a pipeline"),
        (
            lambda: CacheConfig("output", "fast", guidance_gate=0),
            "cache.guidance_gate=0 must be an integer of at least 1",
        ),
        (lambda: CacheConfig(taylorseer_order=9), "cache.taylorseer_order=9 must be an integer from 1 to 4"),
        (lambda: CacheConfig(taylorseer_order=True), "cache.taylorseer_order=True must be an integer from 1 to 4"),
        (lambda: CacheConfig(secondary="fast"), r"cache.secondary='fast' must be CacheConfig\(...\) or None"),
        (lambda: CacheConfig(secondary=5), "cache.secondary=5 must be"),
        (lambda: CompileConfig(scope="blocks"), "compile='blocks' is not allowed; use one of 'regional', 'full'"),
        (lambda: CompileConfig(backend=3), "compile.backend=3 must be a torch.compile backend"),
        (lambda: CompileConfig(dynamic="no"), "compile.dynamic='no' is not allowed; use one of True, False"),
        (lambda: CompileConfig(recompile_limit=10_001), "must be an integer from 1 to 10000"),
        (lambda: ParallelConfig(ulysses=0), "parallel.ulysses=0 must be an integer of at least 1"),
        (lambda: ParallelConfig(vae="nonsense"), "parallel.vae='nonsense' is not allowed; use one of 'auto', True"),
        (lambda: ParallelConfig(text_encoder=1), "parallel.text_encoder=1 is not allowed"),
        (lambda: ParallelConfig(timeout=0.05), "parallel.timeout=0.05 must be a number of seconds, at least 1"),
        (lambda: ParallelConfig(group=7), "parallel.group=7 must be a torch.distributed process group, or None"),
        (
            lambda: AccelerationConfig(cache=3),
            r"cache=3 is not allowed; use one of 'auto', 'slow', 'medium', 'fast', 'ultra', 'balanced', 'quality', ",
        ),
        (
            lambda: AccelerationConfig(parallel="all"),
            "parallel='all' is not allowed; use one of 'auto', None, False or ParallelConfig",
        ),
        (
            lambda: AccelerationConfig(attention=True),
            r"attention=True is not allowed; use one of 'auto', None, False or AttentionConfig\(...\) or the name",
        ),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(make, words):
    with pytest.raises(ConfigurationError, match=words):
        make()


def test_a_process_group_is_taken():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert ParallelConfig(group=torch.distributed.group.WORLD).size == 1
    finally:
        torch.distributed.destroy_process_group()


def test_the_other_names_of_presets_are_the_presets():
    assert AccelerationConfig(cache="quality").cache == CacheConfig(step_mask="slow")
    assert CacheConfig("output", "balanced") == CacheConfig("output", "medium")


def from_variables(**variables):
    return resolve_config(None, {}, {f"PIPEBOOST_{name}": text for name, text in variables.items()})


def test_every_field_of_a_cache_has_a_variable_and_a_preset_takes_those_beside_it():
    seed_values = from_variables(CACHE="fast", CACHE_FN="3", CACHE_BN="3", CACHE_THRESHOLD="0.12", CACHE_WARMUP="2")
    assert seed_values.cache == CacheConfig(step_mask="fast", fn=3, bn=3, threshold=0.12, warmup=2)
    listed = from_variables(
        CACHE_EXTRAPOLATE="output",
        CACHE_STEP_MASK="0, 2,5",
        CACHE_STEPS="7",
        CACHE_TAYLORSEER_ORDER="1",
        CACHE_MAX_CONTINUOUS="2",
    )
    assert listed.cache == CacheConfig("output", (0, 2, 5), 7, taylorseer_order=1, max_continuous=2)
    assert from_variables(CACHE_STEP_MASK="8,3,3/2,2").cache == CacheConfig(step_mask=((8, 3, 3), (2, 2)))
    assert from_variables(CACHE_STEP_MASK="0,", CACHE_STEPS="4").cache == CacheConfig(step_mask=(0,), steps=4)
    assert from_variables(CACHE="auto", CACHE_STEP_MASK="none").cache == CacheConfig()
    gated = from_variables(
        CACHE="fast",
        CACHE_EXTRAPOLATE="output",
        CACHE_GUIDANCE_GATE="9",
        CACHE_PIPELINE="WanPipeline",
        CACHE_LATENTS="64",
    )
    assert gated.cache == CacheConfig("output", "fast", guidance_gate=9, pipeline="WanPipeline", latents=64)
    assert from_variables(CACHE="slow", CACHE_POLICY="dynamic", CACHE_BN="1").cache.policy == "dynamic"


def test_the_second_experts_variables_leave_the_rest_as_the_first_ones_have_it():
    both = from_variables(CACHE="slow", CACHE_FN="2", CACHE_SECONDARY_FN="3", CACHE_SECONDARY_THRESHOLD="0.1")
    second = CacheConfig(step_mask="slow", fn=3, threshold=0.1)
    assert both.cache == CacheConfig(step_mask="slow", fn=2, secondary=second)
    own = from_variables(CACHE_STEP_MASK="0,2", CACHE_STEPS="4", CACHE_SECONDARY_STEP_MASK="fast")
    assert own.cache == CacheConfig(step_mask=(0, 2), steps=4, secondary=CacheConfig(step_mask="fast"))


def test_the_fields_of_every_feature_have_variables():
    settings = from_variables(
        COMPILE_GRAPHS="off", COMPILE_REWRITES="gelu_gemm,", OFFLOAD="stage", OFFLOAD_MEMORY="20.5", REUSE_MAX_BYTES="9"
    )
    assert settings.compile == CompileConfig(graphs=False, rewrites=("gelu_gemm",))
    assert (settings.offload.policy, settings.offload.memory, settings.reuse.max_bytes) == ("stage", 20.5, 9)


def test_keyword_arguments_and_files_win_over_the_variables_of_fields(tmp_path):
    environment = {"PIPEBOOST_CACHE_FN": "3"}
    assert resolve_config(None, {"cache": "slow"}, environment).cache == CacheConfig(step_mask="slow")
    assert resolve_config(None, {"cache": None}, environment).cache is None
    path = tmp_path / "config.yaml"
    path.write_text("cache: {warmup: 1}\n")
    assert resolve_config(path, {}, environment).cache == CacheConfig(warmup=1)


def test_what_kubernetes_sets_for_a_service_of_our_name_is_let_through():
    injected = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_8000_TCP", "PORT_8000_TCP_PROTO")
    more = ("PORT_8000_TCP_PORT", "PORT_8000_TCP_ADDR", "PORT_53_UDP", "WORKER_2_SERVICE_HOST", "WORKER_2_PORT")
    assert from_variables(**dict.fromkeys((*injected, *more), "tcp://10.0.0.1:8000")) == AccelerationConfig()
    for typo in ("PORTS", "PORT_8000", "SERVICE", "SERVICE_HOSTS", "SUPPORT", "port"):
        with pytest.raises(ConfigurationError, match=f"PIPEBOOST_{typo} is not one of pipeboost's"):
            from_variables(**{typo: "tcp://10.0.0.1:8000"})


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"CACHE_FN": "0", "CACHE_WARMUP": "2"}, "^environment variable PIPEBOOST_CACHE_FN: cache.fn=0 must be an int"),
        ({"CACHE_THRESHOLD": "much"}, "PIPEBOOST_CACHE_THRESHOLD: cache.threshold='much' must be a number"),
        ({"CACHE_SECONDARY_BN": "-1"}, "PIPEBOOST_CACHE_SECONDARY_BN: cache.bn=-1 must be an integer"),
        ({"CACHE_STEP_MASK": "8,3,3/"}, r"PIPEBOOST_CACHE_STEP_MASK: cache.step_mask=\[\[8, 3, 3\], \[\]\] must be"),
        ({"CACHE_STEP_MASK": "/2,2"}, "PIPEBOOST_CACHE_STEP_MASK: .* positive integers in both"),
        ({"CACHE_STEP_MASK": "8,3,3"}, "PIPEBOOST_CACHE_STEP_MASK: .* positive integers in both"),
        ({"CACHE_STEP_MASK": "quick"}, "PIPEBOOST_CACHE_STEP_MASK: cache.step_mask='quick' is not allowed"),
        ({"CACHE": "quick", "CACHE_FN": "2"}, "PIPEBOOST_CACHE: cache.step_mask='quick' is not allowed"),
        ({"CACHE": "off", "CACHE_FN": "2"}, "PIPEBOOST_CACHE=off contradicts PIPEBOOST_CACHE_FN; unset one"),
        ({"CACHE": "fast", "CACHE_STEP_MASK": "slow"}, "PIPEBOOST_CACHE=fast contradicts PIPEBOOST_CACHE_STEP_MASK"),
        ({"ATTENTION": "sage", "ATTENTION_BACKEND": "flex"}, "contradicts PIPEBOOST_ATTENTION_BACKEND; unset one"),
        ({"CACHE_FM": "1"}, "PIPEBOOST_CACHE_FM is not one of pipeboost's; it knows PIPEBOOST_CACHE_EXTRAPOLATE, "),
        ({"COMPILE_DYNAMIC": "maybe"}, "PIPEBOOST_COMPILE_DYNAMIC: compile.dynamic='maybe' is not allowed"),
    ],
)
def test_a_variable_of_a_field_that_cannot_be_read_is_named(variables, words):
    with pytest.raises(ConfigurationError, match=words) as caught:
        from_variables(**variables)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"PIPEBOOST_CACHE": "1"}, "PIPEBOOST_CACHE: cache='1' is not allowed; use one of 'auto', 'slow'"),
        ({"PIPEBOOST_QUALITY": "off"}, "PIPEBOOST_QUALITY: quality='off' is not allowed; use one of 'exact'"),
        ({"PIPEBOOST_CHACHE": "fast"}, "PIPEBOOST_CHACHE is not one of pipeboost's; it knows PIPEBOOST_QUALITY, "),
    ],
)
def test_a_bad_environment_variable_is_named(environment, words):
    with pytest.raises(ConfigurationError, match=words):
        resolve_config(None, {}, environment)


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
    with pytest.raises(ConfigurationError, match=words) as caught:
        AccelerationConfig.load(path)
    assert "\n" not in str(caught.value)


def test_a_binary_file_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\x80\xff\x00")
    with pytest.raises(ConfigurationError, match="is not text in UTF-8"):
        AccelerationConfig.load(path)
