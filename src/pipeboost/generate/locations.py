"""Where models come from: a folder on this machine or the hub, told apart before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path

from pipeboost.core.errors import ConfigurationError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id, `owner/name`."""
    return _HUB_ID.fullmatch(name) is not None


def require_pipeline(model: str) -> None:
    """Refuse what can be neither a Diffusers pipeline on this machine nor a hub id.

    Raises:
        ConfigurationError: the path is missing, or is not the folder of a pipeline.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ConfigurationError(f"model_path={model!r} is not a Diffusers pipeline: it has no model_index.json")
    elif path.exists():
        raise ConfigurationError(
            f"model_path={model!r} is a file; it must be the folder of a Diffusers pipeline, as save_pretrained writes "
            "one, or a hub id"
        )
    elif not is_hub_id(model):
        raise ConfigurationError(f"model_path={model!r} does not exist, and is no hub id such as 'Qwen/Qwen-Image'")


def one_line(error: BaseException) -> str:
    """What a library says of its error, in one line that is not endless."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
