"""Compiled code is kept for the next process, in a folder that is the user's own."""

import copy
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from pipeboost.cli.warm import parse_size
from pipeboost.contract.call import open_call
from pipeboost.contract.model_info import ModelInfo
from pipeboost.contract.registry import family_named, generic_family
from pipeboost.core.config import AccelerationConfig, CompileConfig
from pipeboost.core.errors import ConfigurationError
from pipeboost.core.hardware import Hardware, detect_hardware
from pipeboost.core.ledger import Ledger
from pipeboost.core.own_folder import compiled_folder, kept_in, prune, why_not_own
from pipeboost.features.compile import CompiledModel, compile_model
from pipeboost.features.compile.artifacts import _own_folder, artifacts
from pipeboost.features.compile.vae.known_sizes import key_of, known_sizes, noting_sizes, only_sizes
from pipeboost.plan import make_plan

pytestmark = pytest.mark.skipif(not detect_hardware("cpu").compiler, reason="inductor needs a C++ compiler")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which compiled code is kept."""
    monkeypatch.setenv("PIPEBOOST_HOME", str(tmp_path))
    for each in (compiled_folder, _own_folder):
        each.cache_clear()
    yield tmp_path
    for each in (compiled_folder, _own_folder):
        each.cache_clear()


@torch.no_grad()
def call_compiled() -> dict[str, Any]:
    """Call a compiled model; what inductor counted, and the sum of the output."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)) for _ in range(2)]
    model, states = nn.Sequential(nn.ModuleList(blocks)), torch.randn(3, 8)
    model.forward = functools.partial(functools.reduce, lambda states, block: block(states), model[0])
    before, counted = os.environ.get("TORCHINDUCTOR_CACHE_DIR"), copy.deepcopy(counters)
    compile_model(model, CompileConfig(), generic_family("SomePipeline", {"transformer": True}), Ledger())
    with open_call(None, owner=None):
        found = {"sum": float(model(states).double().sum())}
    for what in ("miss", "hit", "bypass"):
        names = {"inductor": f"fxgraph_cache_{what}", "aot_autograd": f"autograd_cache_{what}"}
        found[what] = sum(counters[kind][name] - counted[kind][name] for kind, name in names.items())
    return {**found, "environment": os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before}


def test_no_compiler_runs_in_the_second_process_and_what_is_corrupt_counts_as_missing(home: Path) -> None:
    first = call_compiled()
    assert first["miss"] > 0
    script = "import json; from tests.unit.test_artifacts import call_compiled; print(json.dumps(call_compiled()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    second = json.loads(done.stdout.splitlines()[-1])
    assert second["miss"] == second["bypass"] == 0, second
    assert second["hit"] > 0
    assert first["sum"] == second["sum"]
    assert first["environment"]
    assert second["environment"]
    entries = [path for kind in ("fxgraph", "aotautograd") for path in home.rglob(f"compiled/{kind}/**/*")]
    for path in entries:
        if path.is_file():
            path.write_bytes(b"corrupt")
    third = call_compiled()
    assert third["sum"] == first["sum"]
    assert third["miss"] > 0


def test_a_vae_is_compiled_by_itself_for_sizes_that_were_compiled_before_and_stock_for_others() -> None:
    part, compiled = nn.Conv2d(3, 3, 1), CompiledModel(nn.Identity(), 1, ("Decoder",))
    states, others = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 5)
    key = key_of(part)

    def compile_and_run(states: torch.Tensor) -> torch.Tensor:
        compiled.counters.graphs += 1
        return part(states) + 1

    note = noting_sizes("decoder", key, "a GPU", compiled, dynamic=False)
    assert not known_sizes(key, "a GPU")
    note(compile_and_run, part, states)
    note(part, part, others)  # compiles nothing
    known = known_sizes(key, "a GPU")
    assert known == {"decoder-1x3x4x4-float32"}
    assert not known_sizes(key, "another GPU")
    part.config = {"_name_or_path": "here"}  # type: ignore[assignment]
    assert key_of(part) == key
    assert not known_sizes(key_of(part.half()), "a GPU")
    part.float()
    choose = only_sizes("decoder", known, dynamic=False)
    torch.testing.assert_close(choose(compile_and_run, part, states), part(states) + 1)
    assert torch.equal(choose(compile_and_run, part, others), part(others))
    hopper = Hardware("cuda", "a GPU", (9, 0), 140 * 2**30, 1, False, True)
    model = ModelInfo("FluxPipeline", torch.bfloat16, 33 * 2**30, vae="other", vae_key=key)
    decision = make_plan(AccelerationConfig(), hopper, family_named("FluxPipeline"), model)["vae"]
    assert decision.settings.sizes == known
    assert "at hand" in decision.why


def test_a_folder_that_others_may_write_to_is_not_used_and_one_warning_says_so(home: Path) -> None:
    folder = kept_in(os.environ)
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.warns(UserWarning, match="compiled code is not kept in") as warned:
        used = [compiled_folder(), compiled_folder()]
    assert len(warned) == 1
    assert used[0] == used[1] != folder
    assert why_not_own(used[0]) is None
    assert not list(folder.iterdir())


def test_the_folder_of_a_process_alone_goes_with_it_and_a_relative_one_stays_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    script = (
        "import os; from pipeboost.core.own_folder import compiled_folder as f; print(f()); f.cache_clear()\n"
        "os.environ['PIPEBOOST_HOME'] = 'relative'; kept = f(); os.chdir('/'); print(kept)"
    )
    words, settings = [sys.executable, "-W", "ignore", "-c", script], {**os.environ, "PIPEBOOST_HOME": "file"}
    done = subprocess.run(words, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=100)
    alone, relative = map(Path, done.stdout.split())
    assert alone.is_absolute()
    assert not alone.exists()
    assert relative.is_absolute()
    assert relative.exists()


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
