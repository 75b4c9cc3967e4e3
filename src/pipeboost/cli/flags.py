"""What several commands make of the same flags: `--device` and `--output`."""

from __future__ import annotations

from pathlib import Path

from pipeboost.core.errors import ConfigurationError
from pipeboost.core.hardware import Hardware, detect_hardware, has_cuda
from pipeboost.core.user_files import make_folder, user_path


def device_hardware(device: str) -> Hardware:
    """The hardware behind `auto`, `cpu` or `cuda`.

    Raises:
        ConfigurationError: the device is not here.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigurationError(f"--device {device} is not allowed; use auto, cpu or cuda")
    if device == "cuda" and not has_cuda():
        raise ConfigurationError("--device cuda: this torch sees no CUDA device; use --device cpu")
    return detect_hardware(None if device == "auto" else device)


def make_output_folder(output: Path) -> Path:
    """Make the folder that results go to, before any work is spent on them; where it is.

    Raises:
        ConfigurationError: it cannot be a folder.
    """
    folder = user_path(output, "--output")
    make_folder(folder, f"--output {folder}")
    return folder
