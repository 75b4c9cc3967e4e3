"""Compiled code is kept for the next process: inductor's own caches, in a folder that is the user's own.

Inductor keys what it keeps by the graph, its inputs, its settings, its own version and the device. An entry that cannot
be read counts as missing. Its default folder lies among everybody's temporary files, and code from there would be run.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch._functorch import config as _aot_config
from torch._inductor import config as _inductor_config

from pipeboost.core.own_folder import compiled_folder, prune, why_not_own

MOST = 4 * 2**30
"""Bytes that may be kept."""
_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_lock = threading.RLock()
_INDUCTOR: Any = _inductor_config
_AOT: Any = _aot_config


@contextlib.contextmanager
def artifacts(backend: Any) -> Iterator[None]:
    """Inside, inductor looks for what it compiled before in our folder, and keeps there what it compiles.

    Holds a lock, for inductor reads the place off the environment. Other backends are let alone.
    """
    if backend != "inductor" and "inductor" not in getattr(backend, "__name__", ""):
        yield
        return
    with _lock:
        folder = str(artifacts_folder())
        places = {_VARIABLE: folder, "TRITON_CACHE_DIR": os.path.join(folder, "triton")}
        with _environment(places), _INDUCTOR.patch(fx_graph_cache=True), _AOT.patch(enable_autograd_cache=True):
            yield


def artifacts_folder() -> Path:
    """Return the folder: what the user has set for inductor where nobody else can write there, else pipeboost's own."""
    return _set_by_user() or _own_folder()


@functools.cache
def _own_folder() -> Path:
    folder = compiled_folder()
    prune(folder, MOST)
    return folder


def _set_by_user() -> Path | None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    given = os.environ.get(_VARIABLE)
    if given is None or os.path.abspath(given) == os.path.abspath(default_cache_dir()):  # inductor sets it itself
        return None
    with contextlib.suppress(OSError):
        folder = Path(given)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if why_not_own(folder) is None else None
    return None


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
