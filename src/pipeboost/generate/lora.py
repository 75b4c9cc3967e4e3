"""LoRA files and their scales: read from what a user types, loaded through Diffusers' own loaders."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeboost.core.errors import ConfigurationError, MissingPackageError, UnsupportedError, quoted
from pipeboost.core.user_files import user_path
from pipeboost.generate.locations import is_hub_id, loading_errors
from pipeboost.generate.requests import is_finite

_WITH_SCALE = re.compile(r"(?P<path>.+)[=:](?P<scale>[-+]?(\d+\.?\d*|\.\d+))")


@dataclass(frozen=True)
class Lora:
    """One adapter.

    Attributes:
        path: a file of weights, a folder with one, or a hub id.
        scale: how strongly it acts; 1 as it was trained.
    """

    path: str
    scale: float = 1.0

    @classmethod
    def of(cls, given: Any) -> Lora:
        """Read `"PATH"`, `"PATH=0.8"`, `"PATH:0.8"` or `("PATH", 0.8)`.

        Raises:
            ConfigurationError: the file or folder does not exist, or the scale is no number.
        """
        path, scale = given if isinstance(given, (tuple, list)) and len(given) == 2 else (str(given), 1.0)
        if not os.path.exists(os.path.expanduser(str(path))) and (match := _WITH_SCALE.fullmatch(str(path))):
            path, scale = match["path"], float(match["scale"])
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not is_finite(scale):
            raise ConfigurationError(
                f"lora_path={quoted(given)}: the scale must be a number, as in 'style.safetensors=0.8'"
            )
        lora = cls(str(user_path(str(path), "lora_path")), float(scale))
        if not Path(lora.path).exists() and not is_hub_id(lora.path):
            raise ConfigurationError(f"lora_path={quoted(lora.path)} is neither a file, nor a folder, nor a hub id")
        return lora


def load_loras(pipe: Any, loras: Sequence[Lora]) -> None:
    """Load adapters into a pipeline and set their scales.

    Raises:
        MissingPackageError: peft is not installed.
        UnsupportedError: the pipeline takes no LoRA.
        ConfigurationError: a file is no LoRA for this model.
    """
    if not loras:
        return
    if not hasattr(pipe, "load_lora_weights"):
        raise UnsupportedError(f"lora_path: {type(pipe).__name__} takes no LoRA; leave it out")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("a LoRA needs peft: pip install peft") from error
    for number, lora in enumerate(loras):
        path = Path(lora.path)
        where = {"weight_name": path.name} if path.is_file() else {}
        with loading_errors("lora_path", lora.path):
            pipe.load_lora_weights(
                str(path.parent if path.is_file() else lora.path), adapter_name=f"lora_{number}", **where
            )
        if not any(f"lora_{number}" in adapters for adapters in pipe.get_list_adapters().values()):
            raise ConfigurationError(f"lora_path={quoted(lora.path)} holds no weights for {type(pipe).__name__}")
    names = [f"lora_{number}" for number in range(len(loras))]
    pipe.set_adapters(names, adapter_weights=[lora.scale for lora in loras])
