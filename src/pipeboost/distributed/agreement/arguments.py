"""Agreement: ranks that work on one sample start a call with the same arguments and random state, or none starts.

In the usual case one collective of sixteen bytes says that they agree. Where they do not, they tell each other what
they have; what a rank lacks it gets from the first one, and what contradicts the first one ends the call on all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from pipeboost.core.errors import PipeboostError
from pipeboost.core.fingerprint import digest
from pipeboost.distributed.agreement.broadcast import shared
from pipeboost.distributed.agreement.random_state import State, fingerprint, global_state, set_global_state
from pipeboost.distributed.collectives.mesh import Mesh

STRETCHES = 16
"""Parts of the latents that are compared each by its sum."""
ROUNDING = 1e-3
"""How far these may be apart, in units of what random noise of their size would sum up to."""
_MANY = 60


class DisagreementError(PipeboostError, ValueError):
    """Ranks that work on one sample together were called differently, or have come to different results."""


@dataclass(frozen=True)
class _Generators:
    """One generator, or a list of them, in words that another rank can make its own from.

    Attributes:
        kinds: the device type of each.
        states: of each.
        same_as: for each, the first in the list that is the same object.
        one: whether it is one by itself.
    """

    kinds: tuple[str, ...]
    states: tuple[bytes, ...]
    same_as: tuple[int, ...]
    one: bool


class _Said(NamedTuple):
    """What a rank says of one argument.

    Attributes:
        digest: equal to that of an equal value.
        has: whether the caller gave it something; None is nothing.
        words: the value in short.
        generators: what it is, where it is generators.
        called: whether it is a callable, which cannot be handed to other ranks.
    """

    digest: bytes
    has: bool
    words: str
    generators: _Generators | None
    called: bool


_Fact = tuple[bytes, str, bool]
"""Digest, in words, whether it is of a weight."""
_Statement = tuple[dict[str, _Said], State | None]


def agreed_arguments(mesh: Mesh, bound: inspect.BoundArguments, device: torch.device) -> inspect.BoundArguments:
    """The arguments that all ranks of the sample go on with; collective over `mesh.control`.

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
    values, random = _by_name(bound), global_state(device)
    digests = {name: digest(value) for name, value in values.items()}
    everything = digest([digests, fingerprint(random)])
    gathered = mesh.control.all_gather(_tensor(everything), 0, [len(everything)] * mesh.control.size)
    if len({bytes(part) for part in gathered.view(mesh.control.size, -1).tolist()}) == 1:
        return bound
    given = _given(bound)
    said = {name: _said(value, digests[name], name in given) for name, value in values.items()}
    statements: list[_Statement] = mesh.control.all_gather_objects((said, random if mesh.main else None))
    lacking = _lacking([said for said, _ in statements], mesh.control.ranks)
    (first, state), here = statements[0], mesh.control.rank
    if state is not None and not mesh.main:
        set_global_state(state, device)
    changed: dict[str, Any] = {}
    sent = [name for name in lacking if first[name].generators is None]
    if sent:
        told = shared(mesh, lambda: {name: values[name] for name in sent}, what=", ".join(sent))
        changed |= {name: told[name] for name in sent if here in lacking[name]}
    for name in lacking:
        wanted = first[name].generators
        if wanted is not None and here in lacking[name]:
            changed[name] = _generators_like(wanted, values.get(name), device)
    return _with(bound, changed) if changed else bound


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
    here = {name: (digest(value), _fact_in_words(value), hasattr(value, "words")) for name, value in own.items()}
    told: list[dict[str, _Fact]] = control.all_gather_objects(here)
    others = [place for place, each in enumerate(all_digests) if each.get(part) != all_digests[0].get(part)]
    first, rank = control.ranks[0], ", ".join(str(control.ranks[place]) for place in others)
    also = f", and so does {', '.join(different[1:])}" if different[1:] else ""
    raise DisagreementError(
        f"rank {rank}'s {part} differs from rank {first}'s: {_difference(told[others[0]], told[0])}{also}; ranks that "
        "work on one sample together run the same, so change all of them alike, or use parallel=None to let every rank "
        "work for itself"
    )


def _fact_in_words(value: Any) -> str:
    return value if isinstance(value, str) else getattr(value, "words", "") or _in_words(value)


def _difference(theirs: Mapping[str, _Fact], first: Mapping[str, _Fact]) -> str:
    """The first fact in which two ranks differ, in words, and how many there are beside it."""
    nothing: _Fact = (b"", "nothing", False)
    names = [
        name for name in dict.fromkeys((*theirs, *first)) if theirs.get(name, nothing)[0] != first.get(name, nothing)[0]
    ]
    names.sort(key=lambda name: theirs.get(name, nothing)[2] or first.get(name, nothing)[2])  # weights last
    if not names:
        return "only one of them has it"
    one, other = theirs.get(names[0], nothing)[1], first.get(names[0], nothing)[1]
    said = f"{names[0]} {one} against {other}" if one != other else f"other values of {names[0]}, {one}"
    return f"{said} (and {len(names) - 1} more)" if names[1:] else said


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
    """All arguments but the pipeline, defaults applied; those in `**kwargs` by their own names."""
    complete = inspect.BoundArguments(bound.signature, dict(bound.arguments))
    complete.apply_defaults()
    values = dict(complete.arguments)
    values.pop(next(iter(bound.signature.parameters)), None)
    rest = _rest(bound.signature)
    return values | values.pop(rest) if rest is not None else values


def _given(bound: inspect.BoundArguments) -> set[str]:
    rest = _rest(bound.signature)
    return {*bound.arguments, *(bound.arguments.get(rest, ()) if rest is not None else ())}


def _rest(signature: inspect.Signature) -> str | None:
    kinds = signature.parameters.values()
    return next((each.name for each in kinds if each.kind is inspect.Parameter.VAR_KEYWORD), None)


def _with(bound: inspect.BoundArguments, changed: dict[str, Any]) -> inspect.BoundArguments:
    arguments, rest = dict(bound.arguments), _rest(bound.signature)
    for name, value in changed.items():
        if name in bound.signature.parameters and name != rest:
            arguments[name] = value
        else:
            arguments[str(rest)] = {**arguments.get(str(rest), {}), name: value}
    ordered = {name: arguments[name] for name in bound.signature.parameters if name in arguments}
    return inspect.BoundArguments(bound.signature, ordered)


def _lacking(said: Sequence[Mapping[str, _Said]], ranks: Sequence[int]) -> dict[str, set[int]]:
    """Arguments by name, and which ranks take the first one's value.

    Raises:
        DisagreementError: a rank has a value of its own.
    """
    first = said[0]
    nothing = _Said(b"", False, "nothing", None, False)
    lacking: dict[str, set[int]] = {}
    for name in dict.fromkeys(name for each in said for name in each):
        wanted = first.get(name, nothing)
        for rank, each in enumerate(said):
            found = each.get(name, nothing)
            if found.digest == wanted.digest:
                continue
            both_draw = found.generators is not None and wanted.generators is not None
            if wanted.called or (found.has and not both_draw):
                raise _disagreement(name, wanted, found, ranks[0], ranks[rank])
            lacking.setdefault(name, set()).add(rank)
    return lacking


def _disagreement(name: str, wanted: _Said, found: _Said, first: int, rank: int) -> DisagreementError:
    same = "give all of them one, or none" if wanted.called or found.called else "call all of them alike"
    return DisagreementError(
        f"{name}={wanted.words} on rank {first}, but {found.words} on rank {rank}, which work on one sample together: "
        f"{same}, or use parallel=None to let every rank work for itself, or ParallelConfig(replicas=...) for as many "
        "samples at a time"
    )


def _said(value: Any, told: bytes, given: bool) -> _Said:
    return _Said(told, given and value is not None, _in_words(value), _described(value), callable(value))


def _described(value: Any) -> _Generators | None:
    each = list(value) if isinstance(value, (list, tuple)) else [value]
    if not each or not all(isinstance(one, torch.Generator) for one in each):
        return None
    ids = [id(one) for one in each]
    return _Generators(
        tuple(one.device.type for one in each),
        tuple(one.get_state().numpy().tobytes() for one in each),
        tuple(ids.index(one) for one in ids),
        isinstance(value, torch.Generator),
    )


def _generators_like(wanted: _Generators, own: Any, device: torch.device) -> Any:
    """This rank's own generators in the wanted states, or new ones where its own are of another kind."""
    present = _described(own)
    if present is None or (present.kinds, present.same_as, present.one) != (wanted.kinds, wanted.same_as, wanted.one):
        made = [torch.Generator(device if kind == device.type else kind) for kind in wanted.kinds]
        own = made[0] if wanted.one else [made[place] for place in wanted.same_as]
    for generator, state in zip([own] if wanted.one else own, wanted.states, strict=True):
        generator.set_state(_tensor(state))
    return own


def _in_words(value: Any) -> str:
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
        return f"a {type(value).__name__} of {len(value)}, the first {_in_words(value[0])}"
    text = repr(value)
    return text if len(text) <= _MANY else f"{text[: _MANY - 3]}..."


def _tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
