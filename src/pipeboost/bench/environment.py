"""What a measurement depends on besides the code under test: versions, the GPU's state, the commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

_PACKAGES = (
    "pipeboost",
    "torch",
    "diffusers",
    "transformers",
    "triton",
    "cache-dit",
    "fa3-fwd",
    "flash-attn",
    "sageattention",
    "xformers",
)
_GPU_FIELDS = (
    "name",
    "driver_version",
    "power.limit",
    "power.draw",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "temperature.gpu",
)


def versions() -> dict[str, str]:
    """Versions of Python, CUDA, cuDNN and the packages that matter, those that are installed; and our git commit."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
        if torch.backends.cudnn.is_available():
            found["cudnn"] = str(torch.backends.cudnn.version())
    commit = _git_commit()
    if commit is not None:
        found["commit"] = commit
    return found


def gpu_state(device: torch.device) -> dict[str, str]:
    """Power cap, clocks and temperature from `nvidia-smi`, read only; empty without a GPU or the tool."""
    if device.type != "cuda":
        return {}
    index = device.index if device.index is not None else torch.cuda.current_device()
    identity = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    query = ["nvidia-smi", f"--id={identity}", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"]
    answer = _output(query)
    if answer is None:
        return {}
    values = [value.strip() for value in answer.splitlines()[0].split(",")] if answer.strip() else []
    return dict(zip(_GPU_FIELDS, values, strict=False))


def _git_commit() -> str | None:
    """The commit of the checkout this package is imported from, with a mark where files differ from it."""
    checkout = Path(__file__).resolve().parents[3]
    if not (checkout / ".git").exists():
        return None
    commit = _output(["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"])
    changed = _output(["git", "-C", str(checkout), "status", "--porcelain", "--untracked-files=no", "src", "patches"])
    return None if commit is None else commit.strip() + (" with local changes" if changed else "")


def _output(command: list[str]) -> str | None:
    """What a command prints, or None where it is missing, fails or hangs."""
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return finished.stdout
