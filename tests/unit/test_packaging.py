"""The package installs with its patches, and importing it stays light."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAMILIES = ["flux", "hunyuan_video", "hunyuan_video_15", "ltx2", "qwen_image", "wan", "z_image"]
LIST_FAMILIES = (
    "import pipeboost.patches, pipeboost.contract.registry as f; "
    "print(pipeboost.patches.__file__, sorted(family.name for family in f.families()))"
)


def _python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment or None, check=False, cwd="/"
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_an_editable_install_has_the_patches_of_the_checkout_and_imports_nothing_that_is_used_later():
    code = (
        "import torch, diffusers, sys; before = set(sys.modules); import pipeboost; "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    imported, patches = _python(f"{code}\n{LIST_FAMILIES}").splitlines()
    where, families = patches.split(" ", 1)
    for package in ("cache_dit", "flash_attn", "fa3_fwd_interface", "sageattention", "triton", "matplotlib", "peft"):
        assert f"'{package}'" not in imported
    assert Path(where) == ROOT / "patches" / "__init__.py"
    assert families == str(FAMILIES)


def test_a_wheel_has_every_module_of_the_checkout_the_patches_and_the_demo_model(tmp_path):
    # Where no earlier build has left a package that is not listed any more.
    for name in ("pyproject.toml", "README.md", "LICENSE", "src", "patches", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('.')"]
    built = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = tmp_path.glob("*.whl")
    wheel = tmp_path / "unpacked"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(wheel)
    sources = {"pipeboost": ROOT / "src" / "pipeboost", "pipeboost/patches": ROOT / "patches"}
    modules = [Path(at, path.relative_to(folder)) for at, folder in sources.items() for path in folder.rglob("*.py")]
    assert len(modules) > 50
    assert [module for module in modules if not (wheel / module).is_file()] == []
    patches, families = _python(LIST_FAMILIES, PYTHONPATH=str(wheel), PATH="/usr/bin:/bin").split(" ", 1)
    assert Path(patches) == wheel / "pipeboost" / "patches" / "__init__.py"
    assert families == str(FAMILIES)
    assert (wheel / "pipeboost" / "py.typed").exists()
    assert list((wheel / "pipeboost" / "demo_model" / "weights").glob("*/*.safetensors"))


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_installs_another_torch_into_an_environment_that_has_one(tmp_path):
    def planned(torch: str) -> str:
        words = ["make", "-n", "-C", str(ROOT), "demo", f"VENV={tmp_path}", f"TORCH={torch}"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    stamp = planned("torch==2.11.0").split("touch ")[1].split("\n")[0]
    Path(stamp).touch()
    (tmp_path / ".demo").touch()
    assert "pip install" not in planned("torch==2.11.0")
    other = planned("torch==2.13.0+cpu")
    assert 'pip install --quiet "torch==2.13.0+cpu"' in other
    assert f"rm -f {tmp_path}/.torch-*" in other
    assert "--editable" in other
