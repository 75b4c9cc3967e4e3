"""What the HTTP process and the worker say to each other: a JSON object a line, both ways, over a Unix socket.

Every message is a dataclass, named in its line. What comes in is checked against the fields' types and is never run.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pipeboost.core.errors import PipeboostError, one_line, shortened
from pipeboost.serving.jobs import Call, Kind, ModelCard

T = TypeVar("T")

LONGEST_LINE = 16 * 2**20
"""Bytes: prompts are far shorter, and what would not end must not fill the memory."""
SETTINGS, SOCKET = "settings.json", "socket"
"""Names in the folder that a server and its worker share."""


class WireError(PipeboostError):
    """A line is no message of this version, or is too long."""


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What the worker loads, and how.

    Attributes:
        model_path: folder of a Diffusers pipeline, or a hub id; None is the demo model that we ship.
        vae_path: folder or hub id of another VAE for it.
        device: `"auto"`, `"cpu"` or `"cuda"`.
        acceleration: arguments of `accelerate_pipeline` as JSON values, such as `{"parallel": {"ulysses": 2}}`.
        ranks: how many processes share the model.
        lora_dir: the folder with the adapters that requests may name; None for none.
        lora_memory: GiB that adapters may take besides those of the running request.
        warm_sizes: width and height, or also the number of frames, that are run before the worker is ready.
    """

    model_path: str | None = None
    vae_path: str | None = None
    device: str = "auto"
    acceleration: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 1
    lora_dir: str | None = None
    lora_memory: float = 2.0
    warm_sizes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Start:
    """To the worker: run a job.

    Attributes:
        owner: whose it is; prompts of one owner are not reused for another.
        folder: of the job, with its pictures, where the arrays go.
    """

    job: str
    owner: str
    kind: Kind
    call: Call
    folder: Path


@dataclass(frozen=True)
class Stop:
    """To the worker: end a job at its next denoising step."""

    job: str


@dataclass(frozen=True)
class Hello:
    """From a rank: its process is connected."""

    rank: int
    pid: int


@dataclass(frozen=True)
class Beat:
    """From a rank, now and then: its process lives.

    Attributes:
        doing: what it loads, compiles or warms up; empty while nothing of that takes its time.
        memory: bytes by what they are counted as.
    """

    rank: int
    doing: str
    memory: Mapping[str, int]


@dataclass(frozen=True)
class Ready:
    """From the first rank: the model is loaded and warm."""

    card: ModelCard


@dataclass(frozen=True)
class Refused:
    """From the first rank: the model cannot be loaded or accelerated as asked."""

    message: str


@dataclass(frozen=True)
class Advanced:
    """From the first rank: a stage has begun, or a step is done.

    Attributes:
        step, steps: of all outputs of the job together; 0 steps where that is not known yet.
    """

    job: str
    stage: str
    step: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """From the first rank: a picture of a step on the way, as an array like the result's."""

    job: str
    file: Path


@dataclass
class Ran:
    """From the first rank: a job is done.

    Attributes:
        arrays: `.npy` files in the job's folder, uint8 `(height, width, channels)`, of videos with frames in front.
        seeds: one for each.
        plan: id of the plan that ran.
        steps: denoising steps of one output.
        seconds: of all outputs together.
        stages: seconds by stage.
        fps: the model's own frame rate; None for images.
        notes: what differs from what was asked, in sentences that name no path.
    """

    arrays: tuple[Path, ...]
    seeds: tuple[int, ...]
    plan: str
    steps: int
    seconds: float
    stages: Mapping[str, float]
    fps: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """From the first rank: a job is done."""

    job: str
    ran: Ran


@dataclass(frozen=True)
class Failed:
    """From the first rank: a job is over without a result.

    Attributes:
        code: one of `jobs`.
        last: whether the worker ends after it, for it cannot be sure of itself or its ranks any more.
    """

    job: str
    code: str
    message: str
    last: bool = False


Message = Start | Stop | Hello | Beat | Ready | Refused | Advanced | Preview | Done | Failed
_MESSAGES: dict[str, type] = {cls.__name__: cls for cls in typing.get_args(Message)}


def pack(message: Message) -> bytes:
    """Return the line of a message.

    Raises:
        WireError: it is longer than a line may be, or has numbers that are not finite.
    """
    try:
        line = json.dumps({type(message).__name__: to_json(message)}, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise WireError(f"a message cannot be written as JSON: {one_line(error)}") from error
    if len(line) > LONGEST_LINE:
        raise WireError(f"a message of {len(line)} bytes is longer than {LONGEST_LINE}")
    return line


def unpack(line: bytes) -> Message:
    """Return the message of a line.

    Raises:
        WireError: it is none.
    """
    if len(line) > LONGEST_LINE:
        raise WireError(f"a message of more than {LONGEST_LINE} bytes")
    try:
        ((name, values),) = json.loads(line).items()
        message: Message = from_json(_MESSAGES[name], values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WireError(f"a line is no message: {shortened(repr(line), 100)}") from error
    return message


def to_json(value: Any) -> Any:
    """Return a dataclass of the server as JSON values."""
    if dataclasses.is_dataclass(value):
        return {each.name: to_json(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def from_json(kind: Any, value: Any) -> Any:
    """Return the dataclass, or another value of a type, that `to_json` has written.

    Raises:
        WireError: it is not of this type, or has fields that the type has not.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        (own,) = (each for each in inner if each is not type(None))
        return None if value is None else from_json(own, value)
    if origin is typing.Literal:
        return _required(value in inner, kind, value)
    if origin is tuple:
        items = _required(isinstance(value, list), kind, value)
        return tuple(from_json(inner[0], each) for each in items)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        fields = typing.get_type_hints(kind)
        given = _required(isinstance(value, dict) and value.keys() <= fields.keys(), kind, value)
        try:
            return kind(**{name: from_json(fields[name], each) for name, each in given.items()})
        except TypeError as error:
            raise WireError(f"a {kind.__name__} lacks a field: {one_line(error)}") from error
    if origin is not None:
        items = _required(isinstance(value, dict), kind, value)
        return {key: from_json(inner[1], each) for key, each in items.items()}
    if kind is Path:
        return Path(_required(isinstance(value, str), kind, value))
    if kind is float:
        return float(_required(isinstance(value, (int, float)) and not isinstance(value, bool), kind, value))
    return _required(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), kind, value)


def _required(fits: bool, kind: Any, value: T) -> T:
    if not fits:
        raise WireError(f"{shortened(repr(value), 100)} is not of type {getattr(kind, '__name__', kind)}")
    return value
