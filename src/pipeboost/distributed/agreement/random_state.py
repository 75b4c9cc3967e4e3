"""Random state: of this process, which stock draws from where it has no generator, and of generators."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from pipeboost.core.fingerprint import digest

State = dict[str, Any]


def global_state(device: torch.device) -> State:
    """Return the state of all that a pipeline may draw from in this process: torch on both devices, Python, NumPy."""
    state: State = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_global_state(state: State, device: torch.device) -> None:
    """Bring this process to a state that `global_state` returned, here or on another rank."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def fingerprint(state: State) -> bytes:
    """Return sixteen bytes that show whether somebody has drawn between two states."""
    # As one text, because Python's state is a tuple of 625 numbers.
    return digest({**state, "python": repr(state["python"])})


def generators_in(values: Iterable[Any]) -> list[torch.Generator]:
    """Return the generators among some arguments, each once; stock takes one or a list of them."""
    flat = [each for value in values for each in (value if isinstance(value, (list, tuple)) else (value,))]
    return list({id(each): each for each in flat if isinstance(each, torch.Generator)}.values())
