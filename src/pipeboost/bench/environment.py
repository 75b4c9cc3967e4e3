"""What a measurement depends on besides the code under test: versions, the GPU's state, the commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch

_GPU_FIELDS = "name,driver_version,power.limit,power.draw,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu"


def versions() -> dict[str, str]:
    """Return the versions of Python, CUDA, cuDNN, ourselves and what we may use where installed, and our git commit."""
    found = {"python": platform.python_version()}
    required = importlib.metadata.requires("pipeboost") or []
    used = {re.split(r"[^\w-]", each)[0] for each in required if 'extra == "dev"' not in each}
    for package in ("pipeboost", "torch", "triton", "xformers", *sorted(used)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
        if torch.backends.cudnn.is_available():
            found["cudnn"] = str(torch.backends.cudnn.version())
    # The commit of the checkout that this package is imported from, with a mark where files differ from it.
    checkout = Path(__file__).resolve().parents[3]
    if (checkout / ".git").exists() and (
        commit := _output("git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD")
    ):
        changed = _output("git", "-C", str(checkout), "status", "--porcelain", "--untracked-files=no", "src", "patches")
        found["commit"] = commit.strip() + (" with local changes" if changed else "")
    return found


def gpu_state(device: torch.device) -> dict[str, str]:
    """Return power cap, clocks and temperature from `nvidia-smi`, read only; empty without a GPU or the tool."""
    if device.type != "cuda":
        return {}
    index = device.index if device.index is not None else torch.cuda.current_device()
    identity = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    answer = _output("nvidia-smi", f"--id={identity}", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader")
    return dict(zip(_GPU_FIELDS.split(","), map(str.strip, answer.split(",")), strict=False)) if answer else {}


def _output(*command: str) -> str:
    """Return what a command prints; nothing where it is missing, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
