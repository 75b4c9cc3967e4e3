"""`pipeboost plan`: the plan of a model that is not loaded; its models have shapes and dtypes but no weights."""

from __future__ import annotations

import importlib
import math
import shutil
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import SafetensorError, safe_open
from torch import nn

from pipeboost.bench.full_size import build_pipeline, full_sizes
from pipeboost.cli.flags import Acceleration, Device
from pipeboost.cli.quiet import quiet_libraries
from pipeboost.contract.registry import family_of
from pipeboost.core.config import resolve_config
from pipeboost.core.errors import ConfigurationError, UnsupportedError, one_line, quoted
from pipeboost.core.hardware import Hardware, detect_hardware, device_type
from pipeboost.core.user_files import parse_json, read_text, user_path
from pipeboost.generate.loading import loading_errors
from pipeboost.model_reader import model_info
from pipeboost.plan import Plan, make_plan

_WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.ckpt", "*.msgpack", "*.h5", "*.onnx*", "*.gguf"]
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def print_plan(
    model: Annotated[str, typer.Argument(help="folder of a Diffusers pipeline, a hub id, or a size bench knows")],
    acceleration: Acceleration,
    device: Device = "auto",
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file of settings")] = None,
) -> None:
    """What accelerate_pipeline would do to a model on this machine, without loading its weights."""
    hardware = detect_hardware(device_type(device))
    plan = str(plan_of(model, hardware=hardware, config=config, ranks=acceleration.ranks, **acceleration.settings))
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
        raise ConfigurationError(f"{quoted(model)} is no folder, no hub id, and not one of {', '.join(full_sizes())}")
    try:
        return Path(snapshot_download(model, allow_patterns=["model_index.json", "*/*"], ignore_patterns=_WEIGHTS))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{quoted(model)} is no folder, and the hub did not give it to us: {one_line(error)}"
        ) from error


def skeleton(folder: Path) -> tuple[Any, bool]:
    """Build the pipeline of a folder, its models on the meta device in the dtype that they are stored in.

    Returns:
        The pipeline, and whether that dtype is known: models without safetensors weights are bfloat16.

    Raises:
        ConfigurationError: the folder is no pipeline, or Diffusers cannot build it.
        UnsupportedError: a model is stored quantised.
    """
    index = _index(folder)
    pipeline: Any = getattr(importlib.import_module("diffusers"), index["_class_name"], None)
    if pipeline is None:
        raise ConfigurationError(f"{folder} holds a {index['_class_name']}, unknown to this Diffusers")
    known = True
    # Diffusers requires None for components that a folder leaves out.
    models: dict[str, Any] = {name: None for name, entry in index.items() if entry == [None, None]}
    for name, entry in index.items():
        model = _model(folder / name, *entry) if isinstance(entry, list) and len(entry) == 2 else None
        if model is not None:
            dtype = _stored_dtype(folder / name)
            known = known and dtype is not None
            models[name] = model.to(dtype or torch.bfloat16)
    with loading_errors("model", str(folder)):
        # Asked by the base class, Diffusers loads components that are optional whether or not they are given.
        return pipeline.from_pretrained(folder, local_files_only=True, **models), known


def _index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    index = parse_json(read_text(path, "file"), f"file {path}")
    if not isinstance(index, dict):
        raise ConfigurationError(f"{path} must hold a mapping of components, not a {type(index).__name__}")
    if not isinstance(index.get("_class_name"), str):
        raise ConfigurationError(f"{folder} names no pipeline: its model_index.json has no _class_name")
    return index


def _model(folder: Path, library: str | None, class_name: str | None) -> nn.Module | None:
    """A component without weights; None where it is no model of Diffusers or transformers."""
    from diffusers import ModelMixin, pipelines

    named = library in ("diffusers", "transformers")
    module = importlib.import_module(library) if library and named else getattr(pipelines, str(library), None)
    cls: Any = getattr(module, str(class_name), None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        return None
    path = folder / "config.json"
    config = parse_json(read_text(path, "file"), f"file {path}")
    if config.get("quantization_config"):
        raise UnsupportedError(
            f"{folder} is stored quantised, and only loading it shows the result; load the pipeline, and print "
            "accelerate_pipeline(pipe).acceleration.plan"
        )
    with loading_errors("model", str(folder)), torch.device("meta"):
        built: Any = cls
        if issubclass(cls, ModelMixin):
            return built.from_config(config)
        return built(built.config_class.from_pretrained(folder))


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype that most of a model's numbers are stored in, by the headers of its files."""
    numbers: Counter[str] = Counter()
    files = sorted(folder.glob("*.safetensors"))
    # Diffusers loads those without variants (`model.fp16.safetensors`) where there are others.
    for file in [file for file in files if file.name.count(".") == 1] or files:
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - it is no mapping
                    weight = weights.get_slice(name)
                    numbers[weight.get_dtype()] += math.prod(weight.get_shape())
        except (OSError, SafetensorError) as error:
            raise ConfigurationError(f"{file} cannot be read as safetensors: {error}") from error
    return _DTYPES.get(numbers.most_common(1)[0][0], torch.float32) if numbers else None
