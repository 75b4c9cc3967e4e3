"""`pipeboost generate`: prompts in, saved images or videos out; what is finished stays, whatever happens next."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from pipeboost.cli.generate_output import Output, Results
from pipeboost.cli.generate_progress import BatchProgress
from pipeboost.cli.quiet import quiet_libraries
from pipeboost.core.config import ParallelConfig
from pipeboost.core.errors import (
    ConfigurationError,
    PipeboostError,
    RankFailedError,
    UnsupportedError,
    quoted,
    shortened,
)
from pipeboost.core.seams import stock_class
from pipeboost.core.user_files import parse_yaml
from pipeboost.distributed import world, world_size
from pipeboost.generate import LoadedModel
from pipeboost.generate.loading import ModelSettings
from pipeboost.generate.outputs import DEFAULT_FPS, check_fps
from pipeboost.generate.prompt_file import read_prompts
from pipeboost.generate.requests import Request, make_requests

_FIRST_TO_SPEAK = 1.0
"""Seconds by which a rank lets the first one tell of what all of them refuse."""


def run_generate(
    settings: ModelSettings,
    *,
    prompts: Sequence[str],
    prompt_file: Path | None,
    request: Mapping[str, Any],
    call: Sequence[str],
    fps: int | None,
    warm_up: bool,
    output: Output,
) -> None:
    """Make and save one output for each prompt.

    Args:
        request: values for all requests, by the names of `Request`.
        call: further arguments of the pipeline's call, `NAME=VALUE` each.

    Raises:
        PipeboostError: something cannot be done as asked, or an output cannot be saved; earlier ones are kept.
    """
    if fps is not None:
        check_fps(fps)
    defaults, of_model = {**request, "call": _call_arguments(call)}, settings.request_defaults
    rows: list[dict[str, Any]] = [{"prompt": text} for text in prompts]
    if prompt_file is not None:
        rows += read_prompts(prompt_file)
    if not rows:
        if "prompt" not in of_model:
            raise ConfigurationError("there is no prompt; give --prompt or --prompt-file")
        rows = [{}]
    requests = make_requests(rows, defaults, of_model=of_model)
    first = world().rank == 0
    if not first:
        output = Output(None)
    with quiet_libraries(), BatchProgress(len(requests), silent=not first) as progress:
        model = LoadedModel(settings, tell=progress.tell)
        with model:
            _require_shared(model)
            _make_all(model, requests, fps=fps, warm_up=warm_up, output=output, progress=progress)


def _require_shared(model: LoadedModel) -> None:
    """Refuse that each of several ranks does all of the work.

    Raises:
        UnsupportedError: the ranks share nothing of it.
    """
    parallel = model.pipe.acceleration.plan["parallel"]
    if world_size() > 1 and not parallel.on:
        raise UnsupportedError(
            f"--num-gpus {world_size()}: {stock_class(model.pipe).__name__} would be computed whole on each of them "
            f"({parallel.why}); use --num-gpus 1"
        )


def _make_all(
    model: LoadedModel,
    requests: Sequence[Request],
    *,
    fps: int | None,
    warm_up: bool,
    output: Output,
    progress: BatchProgress,
) -> None:
    if fps is not None and model.kind != "video":
        raise UnsupportedError(f"--fps {fps}: the model makes images; leave it out")
    output.check(model.kind, len(requests))
    outputs = model.generate(
        requests,
        fps=fps or DEFAULT_FPS,
        progress=progress.step,
        profiled=output.profile is not None,
        warm_up=warm_up,
    )
    results = Results(model, len(requests))
    progress.print(model.loaded_line)
    try:
        for made in outputs:
            path, line = output.save(made)
            results.add(made, path)
            progress.finished(f"{line}  seed {made.seed}  {made.report.seconds:.2f} s")
            for note in made.notes:
                progress.note(note, about=made.prompt)
    except BaseException as error:
        # Of two failures, as on a full disk, the first is told.
        with contextlib.suppress(PipeboostError):
            results.write(output)
        progress.close()
        if isinstance(error, KeyboardInterrupt):
            if world().rank == 0:
                print(f"pipeboost: stopped{results.kept}", file=sys.stderr)
            raise typer.Exit(130) from None
        if isinstance(error, PipeboostError):
            line, blank, trace = str(error).partition("\n")
            error.args = (f"{line}{results.kept}{blank}{trace}",)
        raise
    results.write(output)


def accelerated_by(settings: Any, **flags: Any) -> dict[str, Any]:
    """Arguments of `accelerate_pipeline`: the config file's `acceleration:` mapping, then the flags that were given.

    Raises:
        ConfigurationError: `acceleration:` is not a mapping.
    """
    if not isinstance(settings, Mapping | None):
        raise ConfigurationError(f"acceleration: {quoted(settings)} in the config file must be a mapping of settings")
    if flags["compile"] is True:
        flags["compile"] = "regional"
    elif flags["compile"] is False:
        flags["compile"] = "off"
    return {**(settings or {}), **{name: value for name, value in flags.items() if value is not None}}


def generate_on_ranks(settings: ModelSettings, ranks: int, **arguments: Any) -> None:
    """`run_generate` on as many processes as the model is to be shared by, of which the first tells and saves.

    Args:
        ranks: how many; those that are running already are taken.

    Raises:
        PipeboostError: as `run_generate`, or a process failed.
    """
    if ranks in (1, world_size()):
        run_generate(settings, **arguments)
        return
    if world_size() > 1:
        raise ConfigurationError(f"--num-gpus {ranks} contradicts the {world_size()} processes that are running")
    from pipeboost.distributed.launch import launch

    launch(_on_rank, settings, arguments, num_gpus=ranks)


def _on_rank(settings: ModelSettings, arguments: dict[str, Any]) -> None:
    """`run_generate` on one rank; what it raises for the user ends all ranks, and is told once, without a traceback."""
    try:
        run_generate(settings, **arguments)
    except RankFailedError:
        raise
    except PipeboostError as error:
        rank = world().rank
        if rank == 0:
            raise RankFailedError(str(error), rank=0) from error
        time.sleep(_FIRST_TO_SPEAK)
        raise RankFailedError(f"{error} (rank {rank})", rank=rank) from error


def parallel_by(
    *, gpus: int | None, cfg: bool, ulysses: int | None, ring: int | None, tensor: int | None
) -> tuple[ParallelConfig | None, int]:
    """The layout that the flags ask for, None where they leave it open, and the number of ranks.

    Raises:
        ConfigurationError: a degree that is not positive, or degrees that do not make up the GPUs.
    """
    if not cfg and (ulysses, ring, tensor) == (None,) * 3 and (gpus is None or gpus > 1):
        return None, world_size() if gpus is None else gpus
    given = {"cfg": 2 if cfg else None, "ulysses": ulysses, "ring": ring, "tensor": tensor}
    degrees: dict[str, Any] = {name: degree for name, degree in given.items() if degree is not None}
    layout = ParallelConfig(**degrees)
    if gpus is not None and gpus < 1:
        raise ConfigurationError(f"--num-gpus {gpus} must be at least 1")
    if gpus is not None and layout.size != gpus:
        raise ConfigurationError(f"--num-gpus {gpus} is not the product of the parallel flags, {layout.size}")
    return layout, layout.size


def _call_arguments(words: Sequence[str]) -> dict[str, Any]:
    arguments = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigurationError(
                f"--call {shortened(word)} must be NAME=VALUE, such as --call max_sequence_length=256"
            )
        arguments[name] = parse_yaml(value, f"--call {shortened(word)}: the value")
    return arguments
