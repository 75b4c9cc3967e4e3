"""The adapters of requests: loaded by name from one folder, acting in the request that names them and in no other."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from pipeboost.core.errors import ConfigurationError, MissingPackageError, UnsupportedError, one_line, quoted
from pipeboost.core.seams import stock_class
from pipeboost.serving.jobs import Lora
from pipeboost.serving.worker_errors import is_out_of_memory

SUFFIX = ".safetensors"
_OF_FILES = (OSError, ValueError, TypeError, RuntimeError, AttributeError, LookupError, SafetensorError)
"""What libraries raise over missing, damaged or foreign files."""


@dataclass(frozen=True)
class _Loaded:
    """An adapter in the pipeline.

    Attributes:
        adapter: its name there.
        file: identity of the file that it was loaded from: another one of that name is another adapter.
        size: bytes.
    """

    adapter: str
    file: tuple[int, ...]
    size: int


class Loras:
    """The adapters in one pipeline.

    A request without any runs on the stock modules: all adapters are taken out before it. Among requests with some,
    those used last stay loaded without acting.

    Args:
        pipe: the pipeline.
        folder: that has them; None for none.
        memory: bytes that those may take that do not act.
    """

    def __init__(self, pipe: Any, folder: Path | None, memory: int) -> None:
        self._pipe, self._folder, self._memory = pipe, folder, memory
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        self._serial = 0
        self._name = stock_class(pipe).__name__

    def use(self, loras: Sequence[Lora]) -> None:
        """Let these adapters act, and no others.

        Raises:
            ConfigurationError: there is none of that name, one is named twice, or its file is no adapter for the model.
            UnsupportedError: the pipeline takes none.
        """
        if not loras:
            self.clear()
            return
        files = {lora.name: self._file(lora) for lora in loras}
        if len(files) < len(loras):
            raise ConfigurationError(f"loras names {quoted([each.name for each in loras])}; name each once")
        if not hasattr(self._pipe, "load_lora_weights"):
            raise UnsupportedError(f"loras: {self._name} takes no adapters; leave them out")
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise MissingPackageError("an adapter needs peft: pip install peft") from error
        try:
            for each, path in files.items():
                self._load(each, path)
            for each in tuple(self._loaded):
                if each not in files and self._unused(files) > self._memory:
                    self._delete(each)
            adapters = [self._loaded[lora.name].adapter for lora in loras]
            self._pipe.set_adapters(adapters, adapter_weights=[lora.scale for lora in loras])
        except BaseException:
            self.clear()  # what is half loaded must not act
            raise

    def clear(self) -> None:
        """Take all adapters out; harmless where there is none."""
        if self._loaded:
            self._pipe.unload_lora_weights()
            self._loaded.clear()

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are loaded, the one that was used last at the end."""
        return tuple(self._loaded)

    def _file(self, lora: Lora) -> Path:
        """Return the file of an adapter: one of the folder's own, whatever its name says."""
        plain = lora.name and not lora.name.startswith(".") and lora.name == os.path.basename(lora.name)
        if plain and "\0" not in lora.name and self._folder is not None:
            path = self._folder / f"{lora.name}{SUFFIX}"
            if path.is_file():
                return path
        raise ConfigurationError(f"lora {quoted(lora.name)} is not one of this server's; /v1/loras lists them")

    def _load(self, name: str, path: Path) -> None:
        status = path.stat()
        file = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        known = self._loaded.get(name)
        if known is not None and known.file == file:
            self._loaded.move_to_end(name)
            return
        if known is not None:
            self._delete(name)
        self._serial += 1
        adapter = f"served_{self._serial}"
        self._loaded[name] = _Loaded(adapter, file, 0)  # so that `clear` takes out what is half loaded
        try:
            self._pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=adapter)
        except _OF_FILES as error:
            if is_out_of_memory(error):
                raise
            text = one_line(error).replace(f"{path.parent}{os.sep}", "")
            raise ConfigurationError(f"lora {quoted(name)} cannot be loaded into {self._name}: {text}") from error
        if not any(adapter in adapters for adapters in self._pipe.get_list_adapters().values()):
            raise ConfigurationError(f"lora {quoted(name)} holds no weights for {self._name}")
        self._loaded[name] = _Loaded(adapter, file, self._size(adapter))

    def _delete(self, name: str) -> None:
        self._pipe.delete_adapters(self._loaded[name].adapter)
        del self._loaded[name]

    def _unused(self, used: dict[str, Path]) -> int:
        return sum(each.size for name, each in self._loaded.items() if name not in used)

    def _size(self, adapter: str) -> int:
        models = (each for each in self._pipe.components.values() if isinstance(each, torch.nn.Module))
        return sum(
            weight.numel() * weight.element_size()
            for model in models
            for name, weight in model.named_parameters()
            if adapter in name.split(".")
        )
