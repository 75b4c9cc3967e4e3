"""`pipeboost plan`: the plan of a model that is not loaded."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

from pipeboost.bench.full_size import build_pipeline, full_sizes
from pipeboost.cli.quiet import quiet_libraries
from pipeboost.cli.skeleton import skeleton
from pipeboost.contract.registry import family_of
from pipeboost.core.config import resolve_config
from pipeboost.core.errors import ConfigurationError, one_line, quoted
from pipeboost.core.hardware import Hardware, detect_hardware, device_type
from pipeboost.core.user_files import user_path
from pipeboost.model_reader import model_info
from pipeboost.plan import Plan, make_plan

_WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.ckpt", "*.msgpack", "*.h5", "*.onnx*", "*.gguf"]


def print_plan(model: str, *, device: str, config: Path | None, ranks: int, **settings: Any) -> None:
    """Print what `accelerate_pipeline` would do.

    Args:
        model: folder of a Diffusers pipeline, a hub id, or a name of `FullSize`.
        device: `auto`, `cpu` or `cuda`.
        config: YAML or JSON file of settings.
        ranks: how many processes, each with a device like this one, would run it together.
        settings: arguments of `accelerate_pipeline`, which win over `config`.

    Raises:
        ConfigurationError: the model cannot be found or read, or a setting is not allowed.
    """
    hardware = detect_hardware(device_type(device))
    plan = str(plan_of(model, hardware=hardware, config=config, ranks=ranks, **settings))
    # Whatever reads a pipe wants a line a feature.
    print(wrapped(plan, shutil.get_terminal_size().columns) if sys.stdout.isatty() else plan)


def wrapped(plan: str, width: int) -> str:
    """A plan whose lines fit a terminal, their continuations indented to where the text begins."""
    lines = (textwrap.wrap(line, max(width, 40), subsequent_indent=" " * 12) for line in plan.splitlines())
    return "\n".join(part for parts in lines for part in parts)


def plan_of(model: str, *, hardware: Hardware, config: Path | None = None, ranks: int = 1, **settings: Any) -> Plan:
    """Return the plan of a model by name or path, as it will be once it is loaded; no weights are read."""
    resolved = resolve_config(config, settings)
    with quiet_libraries():
        pipe, weighed = _without_weights(model)
    family = family_of(pipe)
    info = model_info(pipe, family, torch.device(hardware.device), ranks=ranks, weighed=weighed)
    return make_plan(resolved, hardware, family, info)


def _without_weights(model: str) -> tuple[Any, str]:
    """A pipeline on the meta device, and whose weights it would have."""
    if model in full_sizes():
        size = full_sizes()[model]
        return build_pipeline(size, device=torch.device("meta"), dtype=torch.bfloat16), "the transformer"
    folder = user_path(model, "model")
    pipe, known = skeleton(folder if folder.is_dir() else _hub_folder(model))
    return pipe, "all components" if known else "all components in bfloat16, as no file tells,"


def _hub_folder(model: str) -> Path:
    """Everything of a pipeline on the hub but its weights."""
    from huggingface_hub import snapshot_download

    if model.count("/") != 1:
        names = ", ".join(full_sizes())
        raise ConfigurationError(f"{quoted(model)} is neither a folder, nor a hub id, nor one of {names}")
    try:
        return Path(snapshot_download(model, allow_patterns=["model_index.json", "*/*"], ignore_patterns=_WEIGHTS))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{quoted(model)} is no folder, and the hub did not give it to us: {one_line(error)}"
        ) from error
