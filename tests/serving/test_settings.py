"""Where settings come from: flags, a file, the environment; and which of them are refused."""

import inspect
import json
import os
import re
import sys
from pathlib import Path

import pytest

from pipeboost import cli
from pipeboost.cli.app import app
from pipeboost.core.errors import ConfigurationError
from pipeboost.serving.settings import Settings, checked, load, save


@pytest.fixture
def serve(tmp_path, monkeypatch, capsys):
    """Runs `pipeboost serve`, and returns the settings that its HTTP process would have; or what it says instead."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("PIPEBOOST_") and name != "PIPEBOOST_HOME"]:
        monkeypatch.delenv(name)

    def run(*words):
        found = []
        monkeypatch.setattr(os, "execv", lambda _, command: found.append(load(Path(command[-1]))))
        monkeypatch.setattr(sys, "argv", ["pipeboost", "serve", "--data-dir", "data", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return found[0] if ended.value.code == 0 else capsys.readouterr().err

    return run


FLAGS = {
    "--served-model-name mine": ("served_model_name", "mine"),
    "--lora-dir loras": ("lora_dir", Path("loras")),
    "--lora-memory 1.5": ("lora_memory", 1.5),
    "--warm-sizes 64x64,32x32x9": ("warm_sizes", ("64x64", "32x32x9")),
    "--host ::1": ("host", "::1"),
    "--port 9000": ("port", 9000),
    "--api-key 12345678 --api-key 87654321": ("api_key", ("12345678", "87654321")),
    "--api-key-file keys": ("api_key_file", Path("keys")),
    "--cors-origin https://a.example": ("cors_origin", ("https://a.example",)),
    "--retention 2d": ("retention", 2 * 86400.0),
    "--disk-budget 3": ("disk_budget", 3.0),
    "--upload s3://bucket/x": ("upload", "s3://bucket/x"),
    "--log-prompts": ("log_prompts", True),
    "--allow-image-urls": ("allow_image_urls", True),
    "--policy fifo": ("policy", "fifo"),
    "--max-queue 5": ("max_queue", 5),
    "--max-queue-per-key 4": ("max_queue_per_key", 4),
    "--rate-limit 7/minute": ("rate_limit", "7/minute"),
    "--max-wait 2m": ("max_wait", 120.0),
    "--timeout 90": ("timeout", 90.0),
    "--step-timeout 5s": ("step_timeout", 5.0),
    "--start-timeout 1h": ("start_timeout", 3600.0),
    "--drain-timeout 0": ("drain_timeout", 0.0),
    "--max-body 2": ("max_body", 2.0),
    "--max-prompt 10": ("max_prompt", 10),
    "--max-pixels 4096": ("max_pixels", 4096),
    "--max-frames 9": ("max_frames", 9),
    "--max-steps 8": ("max_steps", 8),
    "--max-images 2": ("max_images", 2),
    "--device cpu": ("device", "cpu"),
    "--quality fast --compile": ("acceleration", {"quality": "fast", "compile": "regional"}),
    "--offload stage --attention-backend sdpa": ("acceleration", {"attention": "sdpa", "offload": "stage"}),
    "--ulysses-degree 2 --enable-cfg-parallel": ("acceleration", {"parallel": {"cfg": 2, "ulysses": 2}}),
    "--num-gpus 2": ("ranks", 2),
}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "loras").mkdir()
    (tmp_path / "keys").write_text("# ours\n\nsecret-of-a # a\n")


@pytest.mark.usefixtures("files")
def test_every_flag_sets_what_it_names(serve):
    plain = serve()
    assert plain == Settings(data_dir="data")
    for words, (name, value) in FLAGS.items():
        assert getattr(plain, name) != value, words
        found = serve(*words.split())
        assert getattr(found, name) == value, words
    named = {name for name, _ in FLAGS.values()} | {"data_dir", "model_path", "vae_path"}
    assert named == set(Settings.model_fields)


@pytest.mark.usefixtures("files")
def test_every_flag_may_stand_in_the_environment_and_in_a_file(serve, monkeypatch, tmp_path):
    settings = {}
    for words, (name, value) in FLAGS.items():
        if name in ("acceleration", "ranks", "api_key", "warm_sizes", "cors_origin"):
            continue
        flag, *text = words.split()
        settings[flag[2:].replace("-", "_")] = text[0] if text else True
        with monkeypatch.context() as patch:
            patch.setenv(f"PIPEBOOST_SERVE_{flag[2:].replace('-', '_').upper()}", text[0] if text else "1")
            assert getattr(serve(), name) == value, words
    more = {"api_key": ["12345678"], "warm_sizes": "64x64", "cors_origin": "http://a.example", "ulysses_degree": 2}
    (tmp_path / "a.yaml").write_text(json.dumps({**settings, **more, "acceleration": {"cache": None}}))
    found = serve("--config", "a.yaml")
    for words, (name, value) in FLAGS.items():
        if words.split()[0][2:].replace("-", "_") in settings:
            assert getattr(found, name) == value, words
    assert (found.api_key, found.warm_sizes, found.cors_origin) == (("12345678",), ("64x64",), ("http://a.example",))
    assert (found.acceleration, found.ranks) == ({"cache": None, "parallel": {"ulysses": 2}}, 2)


def test_flags_win_over_the_environment_and_that_over_the_file(serve, monkeypatch, tmp_path):
    (tmp_path / "a.yaml").write_text("port: 1001\nmax_queue: 11\nmax_steps: 12\n")
    monkeypatch.setenv("PIPEBOOST_SERVE_PORT", "1002")
    monkeypatch.setenv("PIPEBOOST_SERVE_MAX_QUEUE", "22")
    found = serve("--config", "a.yaml", "--port", 1003)
    assert (found.port, found.max_queue, found.max_steps) == (1003, 22, 12)
    monkeypatch.setenv("PIPEBOOST_SERVE_CONFIG", "a.yaml")
    assert serve().max_steps == 12


def test_what_kubernetes_puts_into_the_environment_changes_nothing(serve, monkeypatch):
    for service in ("PIPEBOOST", "PIPEBOOST_SERVE", "PIPEBOOST_CANARY"):
        for name, value in {
            "SERVICE_HOST": "10.0.0.1",
            "SERVICE_PORT": "8000",
            "SERVICE_PORT_HTTP": "8000",
            "PORT": "tcp://10.0.0.1:8000",
            "PORT_8000_TCP": "tcp://10.0.0.1:8000",
            "PORT_8000_TCP_PROTO": "tcp",
            "PORT_8000_TCP_PORT": "8000",
            "PORT_8000_TCP_ADDR": "10.0.0.1",
        }.items():
            monkeypatch.setenv(f"{service}_{name}", value)
    assert serve() == Settings(data_dir="data")
    monkeypatch.setenv("PIPEBOOST_SERVE_MAX_QUEU", "3")
    assert "PIPEBOOST_SERVE_MAX_QUEU stands for no flag" in serve()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--host 0.0.0.0", "host='0.0.0.0' is reachable from elsewhere; give --api-key"),
        ("--api-key short", "--api-key: must be at least 8"),
        ("--port 70000", "--port 70000: input should be less than or equal to 65535"),
        ("--policy lifo", "--policy 'lifo'"),
        ("--retention soon", "--retention 'soon'"),
        ("--timeout nan", "--timeout"),
        ("--rate-limit 5", "--rate-limit '5': must be COUNT/second"),
        ("--warm-sizes big", "--warm-sizes"),
        ("--upload http://x", "--upload 'http://x': must begin with"),
        ("--cors-origin *", "--cors-origin"),
        ("--lora-dir missing", "--lora-dir missing is no folder"),
        ("--api-key-file missing", "--api-key-file missing cannot be read"),
        ("--model-path missing", "model_path='missing'"),
        ("--quality best", "quality='best'"),
        ("--num-gpus 3 --ulysses-degree 2", "--num-gpus 3 is not the product"),
        ("--nonsense", "No such option"),
    ],
)
def test_what_cannot_be_used_is_one_line(serve, words, says):
    line = serve(*words.split())
    assert says in line
    assert line.startswith("pipeboost: ")
    assert line.count("\n") == 1


def test_a_key_is_in_no_message_and_in_no_file_that_others_can_read(tmp_path):
    with pytest.raises(ConfigurationError) as refused:
        checked({"api_key": ("geheim geheim",)})
    assert "geheim" not in str(refused.value)
    path = tmp_path / "settings.json"
    save(Settings(api_key=("12345678",)), path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load(path).api_key == ("12345678",)


def test_keys_of_a_file_count_and_an_empty_one_is_refused(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\n\nsecret-of-a # a\nsecret-of-b\n")
    assert Settings(api_key_file=path, api_key=("12345678",)).all_keys() == ("12345678", "secret-of-a", "secret-of-b")
    path.write_text("# none\n")
    with pytest.raises(ConfigurationError, match="holds no key"):
        Settings(api_key_file=path).all_keys()


def test_the_help_says_the_defaults_and_groups_the_flags(serve, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pipeboost", "serve", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    for panel in (
        "Model",
        "Network",
        "Jobs and results",
        "Queue and time",
        "Limits of one request",
        "Speed",
        "Several GPUs",
    ):
        assert f"─ {panel}" in shown
    (command,) = (each.callback for each in app.registered_commands if each.name == "serve")
    told = 0
    for name, parameter in inspect.signature(command).parameters.items():
        help = getattr(next(iter(getattr(parameter.annotation, "__metadata__", ())), None), "help", None) or ""
        if name in Settings.model_fields and name != "data_dir" and (match := re.search(r"\((\S+)\)$", help)):
            told += 1
            assert getattr(checked({name: match[1]}), name) == Settings.model_fields[name].default, name
    assert told > 12
