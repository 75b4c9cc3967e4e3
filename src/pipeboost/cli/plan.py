"""`pipeboost plan`: the plan of a model that is not loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pipeboost.config import resolve_config
from pipeboost.errors import ConfigurationError, UnsupportedError
from pipeboost.families import Family, FullSize, families, family_named, generic_family
from pipeboost.hardware import Hardware, detect_hardware
from pipeboost.plan import ModelFacts, Plan, make_plan

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def print_plan(model: str, *, quality: str, device: str, config: Path | None) -> None:
    """Print what `accelerate_pipeline` would do.

    Args:
        model: folder of a Diffusers pipeline, a hub id, or a name of `FullSize`.

    Raises:
        ConfigurationError: the model cannot be found or a setting is not allowed.
    """
    print(plan_of(model, quality=quality, hardware=device_hardware(device), config=config))


def device_hardware(device: str) -> Hardware:
    """The hardware behind `auto`, `cpu` or `cuda`.

    Raises:
        ConfigurationError: the device is not here.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigurationError(f"--device {device} is not allowed; use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device cuda: this torch sees no CUDA device; use --device cpu")
    return detect_hardware(None if device == "auto" else device)


def plan_of(model: str, *, quality: str, hardware: Hardware, config: Path | None = None) -> Plan:
    """The plan of a model by name or path, from its configuration files alone."""
    settings = resolve_config(config, {"quality": quality})
    family, facts = _published(model) or _stored(model)
    return make_plan(settings, hardware, family, facts)


def _published(model: str) -> tuple[Family, ModelFacts] | None:
    for family in families():
        for size in family.full_sizes:
            if size.name == model:
                return family, ModelFacts(size.pipeline, torch.bfloat16, _weights_of(size), weighed="the transformer")
    return None


def _weights_of(size: FullSize) -> int:
    import diffusers

    with torch.device("meta"):
        transformer = getattr(diffusers, size.transformer)(**size.config)
    return 2 * sum(parameter.numel() for parameter in transformer.parameters())


def _stored(model: str) -> tuple[Family, ModelFacts]:
    folder = Path(model)
    index = _local_index(folder) if folder.is_dir() else _hub_index(model)
    pipeline = index.get("_class_name", "")
    components = {
        name: entry[0] is not None
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and not name.startswith("_")
    }
    family = family_named(pipeline) or generic_family(pipeline, components)
    weights, dtype = _stored_weights(folder, family) if folder.is_dir() else (0, torch.bfloat16)
    return family, ModelFacts(pipeline, dtype, weights)


def _local_index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    if not path.exists():
        raise ConfigurationError(f"{folder} is not a Diffusers pipeline: it has no model_index.json")
    return json.loads(path.read_text())


def _hub_index(model: str) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    names = ", ".join(size.name for family in families() for size in family.full_sizes)
    if model.count("/") != 1:
        raise ConfigurationError(f"{model!r} is neither a folder, nor a hub id, nor one of {names}")
    try:
        return dict(DiffusionPipeline.load_config(model))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{model!r} is no folder, and the hub did not give it to us: {error}") from error


def _stored_weights(folder: Path, family: Family) -> tuple[int, torch.dtype]:
    """Bytes of all weights, and the transformer's dtype, read from the files' headers."""
    from safetensors import safe_open

    files = sorted(folder.glob("*/*.safetensors"))
    if not files:
        raise UnsupportedError(f"{folder} holds no safetensors weights, so their size and dtype cannot be told")
    dtype = torch.float32
    for file in files:
        if file.parent.name in family.denoisers:
            with safe_open(file, framework="pt") as weights:
                dtype = _DTYPES.get(weights.get_slice(next(iter(weights.keys()))).get_dtype(), torch.float32)
            break
    return sum(file.stat().st_size for file in files), dtype
