"""Compiled code is kept for the next process, in a folder that is the user's own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from pipeboost.cli.warm import parse_size
from pipeboost.core.errors import ConfigurationError
from pipeboost.core.hardware import detect_hardware
from pipeboost.core.own_folder import kept_in, prune, why_not_own
from pipeboost.features.compile.artifacts import artifacts

pytestmark = pytest.mark.skipif(not detect_hardware("cpu").compiler, reason="inductor needs a C++ compiler")


def call_in_process(home: Path, **environment: str) -> dict[str, Any]:
    """Call a compiled pipeline in a process of its own; what inductor counted there, and the sum of the picture."""
    script = "from tests.unit.test_artifacts import call_compiled; call_compiled()"
    settings = {**os.environ, "PIPEBOOST_HOME": str(home), **environment}
    done = subprocess.run([sys.executable, "-c", script], env=settings, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "stderr": done.stderr}


def call_compiled() -> None:
    """What `call_in_process` runs."""
    import time

    from torch._dynamo.utils import counters

    from pipeboost import CompileConfig, accelerate_pipeline
    from tests.pipelines.tiny import TINY

    entry = TINY["flux_dev"]
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    # The first process is asked to compile the VAE, the next one finds that it was.
    vae: Any = True if not (Path(os.environ["PIPEBOOST_HOME"]) / "compiled" / "vae").exists() else "auto"
    pipe = accelerate_pipeline(entry.build(), compile=CompileConfig(vae=vae))
    start = time.perf_counter()
    picture = entry.call(pipe)
    seconds = time.perf_counter() - start
    found = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("miss", "hit", "bypass")}
    found |= {f"aot_{name}": counters["aot_autograd"][f"autograd_cache_{name}"] for name in ("miss", "hit", "bypass")}
    found |= {"sum": float(picture.double().sum()), "seconds": seconds, "vae": pipe.acceleration.plan["vae"].choice}
    found["environment"] = os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before
    print(json.dumps(found))


def test_no_compiler_runs_in_the_second_process_and_what_is_corrupt_counts_as_missing(tmp_path: Path) -> None:
    first = call_in_process(tmp_path)
    assert first["miss"] + first["aot_miss"] > 0
    second = call_in_process(tmp_path)
    assert second["miss"] == second["aot_miss"] == second["bypass"] == second["aot_bypass"] == 0, second
    assert second["hit"] + second["aot_hit"] > 0
    assert (first["vae"], second["vae"]) == ("compiled", "compiled")
    assert first["sum"] == second["sum"]
    assert first["environment"]
    assert second["environment"]
    assert second["seconds"] < first["seconds"]
    print(f"first process {first['seconds']:.1f} s, second {second['seconds']:.1f} s")
    for path in (kept_in({"PIPEBOOST_HOME": str(tmp_path)})).rglob("*"):
        if path.is_file() and path.suffix not in (".so", ".lock"):
            path.write_bytes(b"corrupt")
    assert call_in_process(tmp_path)["sum"] == first["sum"]


def test_a_folder_that_others_may_write_to_is_not_used_and_one_warning_says_so(tmp_path: Path) -> None:
    folder = kept_in({"PIPEBOOST_HOME": str(tmp_path)})
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    found = call_in_process(tmp_path)
    assert found["stderr"].count("compiled code is not kept in") == 1
    assert not list(folder.iterdir())


def test_a_folder_is_the_users_own_where_nobody_else_can_put_or_rename_anything(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir(mode=0o700)
    assert why_not_own(folder) is None
    for mode in (0o777, 0o755, 0o710):
        folder.chmod(mode)
        assert "others may use it" in (why_not_own(folder) or "")
    folder.chmod(0o700)
    (tmp_path / "link").symlink_to(folder)
    assert why_not_own(tmp_path / "link") == "it is no folder"
    tmp_path.chmod(0o777)
    assert "open to them" in (why_not_own(folder) or "")
    tmp_path.chmod(0o700)


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / str(number) / "code"
        path.parent.mkdir()
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 + number, 1000 + number))
    assert prune(tmp_path, 250) == 200
    assert sorted(path.parent.name for path in tmp_path.rglob("code")) == ["2", "3"]
    assert prune(tmp_path, 250) == 0


def test_the_environment_is_as_it_was_and_a_private_folder_of_the_users_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory() as private:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", private)
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        with artifacts("inductor"):
            assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == private
            assert os.environ["TRITON_CACHE_DIR"].startswith(private)
        assert "TRITON_CACHE_DIR" not in os.environ
        os.chmod(private, 0o777)
        with artifacts("inductor"):
            assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(os.environ["PIPEBOOST_HOME"])
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == private
    with artifacts("eager"):
        assert "TRITON_CACHE_DIR" not in os.environ


def test_sizes_to_warm_are_width_height_and_frames() -> None:
    assert parse_size("1024x768") == {"width": 1024, "height": 768}
    assert parse_size("832x480x81") == {"width": 832, "height": 480, "num_frames": 81}
    for wrong in ("1024", "1024x", "axb", "0x64", "1x2x3x4", "-1x4"):
        with pytest.raises(ConfigurationError, match="WIDTHxHEIGHT"):
            parse_size(wrong)
