"""Agreement: ranks that work on one sample start a call with the same arguments and random state, or none starts.

In the usual case one collective of sixteen bytes says that they agree. Where they do not, they exchange what they
have; what a rank lacks it gets from the first one, and what contradicts the first one ends the call on all.

Random state is that of this process, which stock draws from where it has no generator, and of generators.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from pipeboost.core.errors import PipeboostError
from pipeboost.core.fingerprint import digest
from pipeboost.distributed.agreement.broadcast import broadcast_outcome
from pipeboost.distributed.collectives.mesh import Mesh

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


STRETCHES = 16
"""Parts of the latents that are compared each by its sum."""
ROUNDING = 1e-3
"""How far these may be apart, in units of what random noise of their size would sum up to."""
_MANY = 60


class DisagreementError(PipeboostError, ValueError):
    """Ranks that work on one sample together were called differently, or have different results."""


class _Summary(NamedTuple):
    """What the other ranks learn of one argument.

    Attributes:
        digest: equal to that of an equal value.
        given: whether the caller gave it something; None is nothing.
        description: the value in short.
        draws: whether it is generators.
        called: whether it is a callable, which cannot be sent to other ranks.
    """

    digest: bytes
    given: bool
    description: str
    draws: bool
    called: bool


_Fact = tuple[bytes, str, bool]
"""Digest, description, whether it is of a weight."""


def agreed_arguments(mesh: Mesh, bound: inspect.BoundArguments, device: torch.device) -> inspect.BoundArguments:
    """Return the arguments that all ranks of the sample go on with; collective over `mesh.control`.

    What a rank was not given, or was given None for, comes from the first rank of the sample. So do the states of the
    generators, which are set in the rank's own where it has them, and the global random state of torch, Python and
    NumPy. Callables must be there on all ranks or on none; nobody compares what they do.

    Args:
        bound: a call of a pipeline as `inspect.Signature.bind_partial(pipe, ...)` gives it, defaults not applied. Its
            first argument, the pipeline, is left alone.
        device: where the call runs on this rank.

    Raises:
        DisagreementError: on all ranks alike, where a rank has another value than the first one, or one that the first
            one lacks.
    """
    if mesh.control.size == 1:
        return bound
    complete = inspect.BoundArguments(bound.signature, dict(bound.arguments))
    complete.apply_defaults()
    values, given, random = _by_name(complete), _by_name(bound), global_state(device)
    digests = {name: digest(value) for name, value in values.items()}
    everything = digest([digests, fingerprint(random)])
    gathered = mesh.control.all_gather(_tensor(everything)[None], 0, [1] * mesh.control.size)
    if bool((gathered == gathered[0]).all()):
        return bound
    summaries = {
        name: _Summary(digests[name], given.get(name) is not None, _describe(each), bool(_draws(each)), callable(each))
        for name, each in values.items()
    }
    everyone = mesh.control.all_gather_objects((summaries, random if mesh.main else None))
    if not mesh.main:
        set_global_state(everyone[0][1], device)
    lacking = _lacking([each for each, _ in everyone], mesh.control.ranks)
    if lacking:
        received = broadcast_outcome(mesh, lambda: {name: values[name] for name in lacking}, what=", ".join(lacking))
        bound = inspect.BoundArguments(bound.signature, dict(bound.arguments))
        for name in (name for name, ranks in lacking.items() if mesh.control.rank in ranks):
            named = name in bound.signature.parameters and name != _rest(bound.signature)
            arguments = bound.arguments if named else bound.arguments.setdefault(_rest(bound.signature), {})
            arguments[name] = _like_own(received[name], values.get(name))
    return bound


def require_same_state(mesh: Mesh, digests: Mapping[str, bytes], facts: Callable[[str], Mapping[str, Any]]) -> None:
    """Raise unless all ranks of the sample run with the same; collective over `mesh.control`.

    Args:
        digests: of each part of what this rank runs with, by name.
        facts: `(name of a part) -> what its digest is of`, by name, the most telling first.

    Raises:
        DisagreementError: on all ranks alike.
    """
    control = mesh.control
    if control.size == 1:
        return
    everyone = control.all_gather(_tensor(digest(digests)), 0, [16] * control.size).view(control.size, 16)
    if bool((everyone == everyone[0]).all()):
        return
    all_digests: list[Mapping[str, bytes]] = control.all_gather_objects(dict(digests))
    names = list(dict.fromkeys(name for each in all_digests for name in each))
    different = [name for name in names if len({each.get(name) for each in all_digests}) > 1]
    part = different[0]
    own = facts(part) if part in digests else {}
    here = {
        name: (digest(each), each if isinstance(each, str) else _describe(each), hasattr(each, "description"))
        for name, each in own.items()
    }
    everywhere: list[dict[str, _Fact]] = control.all_gather_objects(here)
    others = [place for place, each in enumerate(all_digests) if each.get(part) != all_digests[0].get(part)]
    first, rank = control.ranks[0], ", ".join(str(control.ranks[place]) for place in others)
    also = f", and so does {', '.join(different[1:])}" if different[1:] else ""
    raise DisagreementError(
        f"rank {rank}'s {part} differs from rank {first}'s: {_difference(everywhere[others[0]], everywhere[0])}{also}; "
        "ranks that work on one sample together run the same, so change all of them alike, or use parallel=None to let "
        "every rank work for itself"
    )


def _difference(theirs: Mapping[str, _Fact], first: Mapping[str, _Fact]) -> str:
    """Describe the first fact in which two ranks differ, and how many more there are."""
    nothing: _Fact = (b"", "nothing", False)
    names = [
        name for name in dict.fromkeys((*theirs, *first)) if theirs.get(name, nothing)[0] != first.get(name, nothing)[0]
    ]
    names.sort(key=lambda name: theirs.get(name, nothing)[2] or first.get(name, nothing)[2])  # weights last
    if not names:
        return "only one of them has it"
    one, other = theirs.get(names[0], nothing)[1], first.get(names[0], nothing)[1]
    text = f"{names[0]} {one} against {other}" if one != other else f"other values of {names[0]}, {one}"
    return f"{text} (and {len(names) - 1} more)" if names[1:] else text


def checked_latents(mesh: Mesh, latents: torch.Tensor) -> None:
    """Raise unless all ranks of the sample have these latents, but for rounding; collective over `mesh.control`.

    For the first step of a new layout: it waits for the device, and compares the sums of sixteen stretches and the
    second moment, in float64.

    Raises:
        DisagreementError: on all ranks alike.
    """
    if mesh.control.size == 1:
        return
    flat = latents.detach().reshape(-1).double()
    sums = torch.stack([part.sum() for part in flat.tensor_split(STRETCHES)])
    power = flat.square().sum()
    facts = torch.cat([sums, torch.stack([power, power.new_tensor(float(flat.numel()))])]).cpu()
    everyone = mesh.control.all_gather(facts[None], 0, [1] * mesh.control.size)
    # Noise of the latents' power adds up to the root of a stretch's own; where there is none, or NaN, all is compared
    # as it is.
    known = everyone[0, STRETCHES].nan_to_num(1.0, 1.0).clamp(min=torch.finfo(torch.float32).tiny)
    unit = torch.cat([(known / STRETCHES).sqrt().expand(STRETCHES), known[None], torch.ones(1)])
    alike = torch.isclose(everyone / unit, everyone[0] / unit, rtol=0.0, atol=ROUNDING, equal_nan=True).all(dim=1)
    if not bool(alike.all()):
        others = [str(mesh.control.ranks[rank]) for rank in range(mesh.control.size) if not alike[rank]]
        raise DisagreementError(
            f"after the first denoising step the latents of rank {', '.join(others)} are not those of rank "
            f"{mesh.control.ranks[0]}, though they were called alike and run the same weights and settings: this is a "
            "fault of pipeboost's; use parallel=None, and please report it with the pipeline and the layout"
        )


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """All arguments but the pipeline; those in `**kwargs` by their own names."""
    _, *names = bound.signature.parameters
    values = {name: bound.arguments[name] for name in names if name in bound.arguments}
    return values | values.pop(_rest(bound.signature), {})


def _rest(signature: inspect.Signature) -> str:
    """The name of `**kwargs`; empty where there are none."""
    kinds = signature.parameters.values()
    return next((each.name for each in kinds if each.kind is inspect.Parameter.VAR_KEYWORD), "")


def _lacking(summaries: Sequence[Mapping[str, _Summary]], ranks: Sequence[int]) -> dict[str, set[int]]:
    """Arguments by name, and which ranks take the value of the first one.

    Raises:
        DisagreementError: a rank has a value of its own.
    """
    nothing = _Summary(b"", False, "nothing", False, False)
    lacking: dict[str, set[int]] = {}
    for name in dict.fromkeys(name for each in summaries for name in each):
        wanted = summaries[0].get(name, nothing)
        for rank, each in enumerate(summaries):
            found = each.get(name, nothing)
            if found.digest == wanted.digest:
                continue
            if wanted.called or (found.given and not (found.draws and wanted.draws)):
                same = "give all of them one, or none" if wanted.called or found.called else "call all of them alike"
                raise DisagreementError(
                    f"{name}={wanted.description} on rank {ranks[0]}, but {found.description} on rank {ranks[rank]}, "
                    f"which work on one sample together: {same}, or use parallel=None to let every rank work for "
                    "itself, or ParallelConfig(replicas=...) for as many samples at a time"
                )
            lacking.setdefault(name, set()).add(rank)
    return lacking


def _draws(value: Any) -> list[tuple[str, int]]:
    """Of generators: the device type of each, and which is the first that is the same; empty if it is anything else."""
    each = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(one, torch.Generator) for one in each):
        return []
    ids = [id(one) for one in each]
    return [(one.device.type, ids.index(id(one))) for one in each]


def _like_own(received: Any, own: Any) -> Any:
    """This rank's own generators in the states of those received, where they are alike; else what was received."""
    alike = isinstance(received, torch.Generator) == isinstance(own, torch.Generator)
    if not alike or not _draws(own) or _draws(own) != _draws(received):
        return received
    for generator, state in zip(generators_in([own]), generators_in([received]), strict=True):
        generator.set_state(state.get_state())
    return own


def _describe(value: Any) -> str:
    if isinstance(told := getattr(value, "description", None), str):
        return told
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    if isinstance(value, np.ndarray):
        return f"an array {value.shape} of {value.dtype}"
    if isinstance(value, Image.Image):
        return f"a picture {value.width}x{value.height}"
    if callable(value):
        return "a callable"
    if isinstance(value, torch.Generator) or type(value).__repr__ is object.__repr__:
        return f"a {type(value).__name__}"
    if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (str, int, float)):
        return f"a {type(value).__name__} of {len(value)}, the first {_describe(value[0])}"
    text = repr(value)
    return text if len(text) <= _MANY else f"{text[: _MANY - 3]}..."


def _tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
