"""`Locks`: a lock for each of the objects that threads share."""

from __future__ import annotations

import threading
import weakref
from typing import Any


class Locks:
    """One reentrant lock for each object that is asked for, which it does not keep alive."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
        self._asking = threading.Lock()

    def of(self, obj: Any) -> threading.RLock:
        """Return the lock of an object."""
        with self._asking:
            try:
                return self._of.setdefault(obj, threading.RLock())
            except TypeError:  # an object without weak references, which is none that threads share
                return threading.RLock()
