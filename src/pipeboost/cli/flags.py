"""The flags that commands share, each defined once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NamedTuple

import typer

from pipeboost.core.config import ParallelConfig
from pipeboost.core.errors import ConfigurationError
from pipeboost.distributed import world_size

_speed = partial(typer.Option, rich_help_panel="Speed")
_gpus = partial(typer.Option, rich_help_panel="Several GPUs")

Device = Annotated[str, _speed(help="auto, cpu or cuda")]


class Acceleration(NamedTuple):
    """What the flags of speed and layout ask for: arguments of `accelerate_pipeline`, and how many ranks."""

    settings: dict[str, Any]
    ranks: int


def _acceleration(
    quality: Annotated[
        str | None, _speed("--quality", "--tier", help="exact, lossless, balanced or fast; else as the settings say")
    ] = None,
    attention_backend: Annotated[str | None, _speed(help="attention kernel; `pipeboost doctor` lists them")] = None,
    compile: Annotated[
        bool | None, _speed("--compile/--no-compile", help="torch.compile; else the tier decides")
    ] = None,
    offload: Annotated[str | None, _speed(help="where components wait: resident, stage, layerwise")] = None,
    num_gpus: Annotated[int | None, _gpus(help="GPUs to share the work among")] = None,
    enable_cfg_parallel: Annotated[bool, _gpus("--enable-cfg-parallel", help="one guidance branch a GPU")] = False,
    ulysses_degree: Annotated[int | None, _gpus(help="GPUs that share the heads")] = None,
    ring_degree: Annotated[int | None, _gpus(help="GPUs that share the tokens")] = None,
    tp_size: Annotated[int | None, _gpus(help="GPUs that share the weights")] = None,
) -> Acceleration:
    if num_gpus is not None and num_gpus < 1:
        raise ConfigurationError(f"--num-gpus {num_gpus} must be at least 1")
    given = {"cfg": 2 if enable_cfg_parallel else None, "ulysses": ulysses_degree, "ring": ring_degree}
    degrees: dict[str, Any] = {
        name: degree for name, degree in {**given, "tensor": tp_size}.items() if degree is not None
    }
    ranks = world_size() if num_gpus is None else num_gpus
    layout = ParallelConfig(**degrees) if degrees or num_gpus == 1 else None
    if layout is not None:
        ranks = layout.size
        if num_gpus not in (None, ranks):
            raise ConfigurationError(f"--num-gpus {num_gpus} is not the product of the parallel flags, {ranks}")
    settings = {
        "quality": quality,
        "attention": attention_backend,
        "compile": None if compile is None else "regional" if compile else "off",
        "offload": offload,
        "parallel": layout,
    }
    return Acceleration({name: value for name, value in settings.items() if value is not None}, ranks)


def with_acceleration(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags of speed and layout; what they ask for is its argument `acceleration`."""
    shared = inspect.signature(_acceleration, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True).parameters
    parameters = [each for name, each in own.items() if name != "acceleration"] + list(shared.values())

    def run(**given: Any) -> None:
        command(acceleration=_acceleration(**{name: given.pop(name) for name in shared}), **given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    keyword = inspect.Parameter.KEYWORD_ONLY
    run.__signature__ = inspect.Signature([each.replace(kind=keyword) for each in parameters])  # type: ignore[attr-defined]
    return run
