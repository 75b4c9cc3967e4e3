"""`pipeboost plan`: the plan of a model that is not loaded."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeboost.bench.full_size import meta_transformer
from pipeboost.cli.flags import device_hardware
from pipeboost.contract.model_info import ModelFacts, splits_of
from pipeboost.contract.registry import families, family_named, generic_family
from pipeboost.core.config import resolve_config
from pipeboost.core.errors import ConfigurationError, UnsupportedError, one_line, quoted
from pipeboost.core.families import Family
from pipeboost.core.hardware import Hardware
from pipeboost.core.user_files import user_path
from pipeboost.features.offload import weigh, weigh_stored
from pipeboost.plan import Plan, make_plan

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def print_plan(model: str, *, quality: str | None, device: str, config: Path | None, ranks: int = 1) -> None:
    """Print what `accelerate_pipeline` would do.

    Args:
        model: folder of a Diffusers pipeline, a hub id, or a name of `FullSize`.
        quality: the tier; None leaves it to `config`, `PIPEBOOST_QUALITY` or the default.
        device: `auto`, `cpu` or `cuda`.
        config: YAML or JSON file of settings.
        ranks: how many processes, each with a device like this one, would run it together.

    Raises:
        ConfigurationError: the model cannot be found or read, or a setting is not allowed.
    """
    if ranks < 1:
        raise ConfigurationError(f"--num-gpus {ranks} must be at least 1")
    plan = str(plan_of(model, quality=quality, hardware=device_hardware(device), config=config, ranks=ranks))
    # Whatever reads a pipe wants a line a feature.
    print(wrapped(plan, shutil.get_terminal_size().columns) if sys.stdout.isatty() else plan)


def wrapped(plan: str, width: int) -> str:
    """A plan whose lines fit a terminal, their continuations indented to where the text begins."""
    lines = (textwrap.wrap(line, max(width, 40), subsequent_indent=" " * 12) for line in plan.splitlines())
    return "\n".join(part for parts in lines for part in parts)


def plan_of(model: str, *, quality: str | None, hardware: Hardware, config: Path | None = None, ranks: int = 1) -> Plan:
    """The plan of a model by name or path, from its configuration files alone."""
    settings = resolve_config(config, {} if quality is None else {"quality": quality})
    family, facts = _published(model) or _stored(model)
    return make_plan(settings, hardware, family, replace(facts, ranks=ranks))


def _published(model: str) -> tuple[Family, ModelFacts] | None:
    for family in families():
        for size in family.full_sizes:
            if size.name == model:
                transformer: Any = meta_transformer(size, torch.bfloat16)
                components = weigh({family.denoisers[0]: transformer}, family)
                facts = ModelFacts(
                    size.pipeline,
                    torch.bfloat16,
                    sum(component.nbytes for component in components),
                    weighed="the transformer",
                    components=components,
                    model=size.transformer,
                    heads=transformer.config.num_attention_heads,
                    splits=splits_of({family.denoisers[0]: transformer}, family),
                )
                return family, facts
    return None


def _stored(model: str) -> tuple[Family, ModelFacts]:
    folder = user_path(model, "model")
    index = _local_index(folder) if folder.is_dir() else _hub_index(model)
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        raise ConfigurationError(f"{model} names no pipeline: its model_index.json has no _class_name")
    components = {
        name: entry[0] is not None
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and not name.startswith("_")
    }
    family = family_named(pipeline) or generic_family(pipeline, components)
    if not folder.is_dir():
        return family, ModelFacts(pipeline, torch.bfloat16, 0)
    sizes, dtype = _stored_weights(folder, [name for name, present in components.items() if present], family)
    weighed = weigh_stored(sizes, family)
    transformer = _transformer_config(folder / family.denoisers[0])
    facts = ModelFacts(
        pipeline,
        dtype,
        sum(each.nbytes for each in weighed),
        components=weighed,
        model=transformer.get("_class_name", "the transformer"),
        heads=transformer.get("num_attention_heads"),
    )
    return family, facts


def _transformer_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _local_index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    if not path.exists():
        raise ConfigurationError(f"{folder} is not a Diffusers pipeline: it has no model_index.json")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(index, dict):
        raise ConfigurationError(f"{path} must hold a mapping of components, not a {type(index).__name__}")
    return index


def _hub_index(model: str) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    names = ", ".join(size.name for family in families() for size in family.full_sizes)
    if model.count("/") != 1:
        raise ConfigurationError(f"{quoted(model)} is neither a folder, nor a hub id, nor one of {names}")
    try:
        return dict(DiffusionPipeline.load_config(model))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{quoted(model)} is no folder, and the hub did not give it to us: {one_line(error)}"
        ) from error


def _stored_weights(
    folder: Path, components: Sequence[str], family: Family
) -> tuple[dict[str, dict[str, int]], torch.dtype]:
    """Bytes of each component's tensors, and the transformer's dtype, read from the files' headers."""
    sizes: dict[str, dict[str, int]] = {}
    dtype: torch.dtype | None = None
    for component in components:
        for file in _weight_files(folder / component):
            tensors = _stored_tensors(file)
            sizes.setdefault(component, {}).update({name: nbytes for name, (nbytes, _) in tensors.items()})
            if dtype is None and component in family.denoisers:
                dtype = next((_DTYPES.get(stored, torch.float32) for _, stored in tensors.values()), None)
    if not sizes:
        raise UnsupportedError(f"{folder} holds no safetensors weights, so their size and dtype cannot be told")
    return sizes, dtype or torch.float32


def _weight_files(folder: Path) -> list[Path]:
    """The files that Diffusers loads: without variants (`model.fp16.safetensors`) where there are others."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if file.name.count(".") == 1] or files


def _stored_tensors(file: Path) -> dict[str, tuple[int, str]]:
    """Name → bytes and dtype."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):  # checks the file
            pass
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigurationError(f"{file} cannot be read as safetensors: {error}") from error
    return {
        name: (entry["data_offsets"][1] - entry["data_offsets"][0], entry["dtype"])
        for name, entry in header.items()
        if name != "__metadata__"
    }
