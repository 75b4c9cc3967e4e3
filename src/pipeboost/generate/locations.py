"""Where models come from, a folder on this machine or the hub, and the errors of one that does not load."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from pipeboost.core.errors import ConfigurationError, MissingPackageError, PipeboostError, one_line, quoted

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id, `owner/name`."""
    return _HUB_ID.fullmatch(name) is not None


def require_pipeline(model: str) -> None:
    """Refuse what can be neither a Diffusers pipeline on this machine nor a hub id.

    Raises:
        ConfigurationError: the path is missing, or is not the folder of a pipeline.
    """
    path, why = Path(model), ""
    if path.is_dir() and not (path / "model_index.json").is_file():
        why = "is not a Diffusers pipeline: it has no model_index.json"
    elif path.exists() and not path.is_dir():
        why = "is a file; it must be the folder of a Diffusers pipeline, as save_pretrained writes one, or a hub id"
    elif not path.exists() and not is_hub_id(model):
        why = "does not exist, and is no hub id such as 'Qwen/Qwen-Image'"
    if why:
        raise ConfigurationError(f"model_path={quoted(model)} {why}")


@contextlib.contextmanager
def loading_errors(argument: str, path: str) -> Iterator[None]:
    """Turn what libraries raise over missing, damaged or too large files into one sentence."""
    what = f"{argument}={quoted(path)}"
    try:
        yield
    except PipeboostError:
        raise
    except torch.OutOfMemoryError as error:
        raise ConfigurationError(f"{what} does not fit into the GPU's memory: {one_line(error)}") from error
    except ImportError as error:
        raise MissingPackageError(f"{what} needs a package that is missing: {one_line(error)}") from error
    except (OSError, ValueError, TypeError, RuntimeError, AttributeError, LookupError, SafetensorError) as error:
        where = "" if Path(path).exists() else " (it is no folder here, and the hub did not give it)"
        raise ConfigurationError(f"{what} cannot be loaded{where}: {one_line(error)}") from error
