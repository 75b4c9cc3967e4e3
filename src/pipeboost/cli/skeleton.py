"""`skeleton`: a stock pipeline built from its folder, whose models have shapes and dtypes but no weights."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from pipeboost.core.errors import ConfigurationError, UnsupportedError
from pipeboost.core.user_files import parse_json, read_text
from pipeboost.generate.locations import loading_errors

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


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
        raise ConfigurationError(
            f"{folder} holds a {index['_class_name']}, which this version of Diffusers does not have"
        )
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
    if not path.exists():
        raise ConfigurationError(f"{folder} is not a Diffusers pipeline: it has no model_index.json")
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
            f"{folder} is stored quantised, and only loading tells what becomes of it; load the pipeline, and print "
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
