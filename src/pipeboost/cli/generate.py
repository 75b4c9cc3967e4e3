"""`pipeboost generate`: prompts in, saved images or videos out; what is finished stays, whatever happens next."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from pipeboost.cli import STOPPED
from pipeboost.cli.generate_output import Output, Results
from pipeboost.cli.quiet import quiet_libraries
from pipeboost.core.errors import ConfigurationError, PipeboostError, RankFailedError, UnsupportedError, shortened
from pipeboost.core.seams import stock_class
from pipeboost.core.user_files import parse_yaml
from pipeboost.distributed import world, world_size
from pipeboost.generate import LoadedModel
from pipeboost.generate.loading import ModelSettings
from pipeboost.generate.outputs import DEFAULT_FPS
from pipeboost.generate.requests import GenerationRequest, make_requests, read_prompts

if TYPE_CHECKING:
    from pipeboost.generate import Generated
    from pipeboost.stages import Progress as StageProgress

T = TypeVar("T")

_FIRST_TO_SPEAK = 1.0
"""Seconds that other ranks leave the first one to report what all of them refuse."""


class BatchProgress(Progress):
    """The progress of one command; outputs go to stdout, the bar to stderr.

    Args:
        requests: how many outputs it makes.
        silent: nothing is shown, for another process shows it.
    """

    def __init__(self, requests: int, *, silent: bool = False) -> None:
        self._requests = requests
        self._silent = silent
        self._done = 0
        self._noted: set[tuple[str, str]] = set()
        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        disable = silent or not console.is_terminal
        super().__init__("{task.description}", *columns, console=console, transient=True, disable=disable)
        self._task = self.add_task("loading", total=None)

    def show_status(self, text: str) -> None:
        """Say what is being done before the first output."""
        self.update(self._task, description=escape(text))

    def step(self, progress: StageProgress) -> None:
        """Show where the running call is."""
        if progress.steps:
            self.update(self._task, total=progress.steps, completed=progress.step or 0)
        elif progress.step is None:
            which = f" {self._done + 1} of {self._requests}" if self._requests > 1 else ""
            self.show_status(f"{progress.stage}{which}")

    def done(self, line: str, made: Generated) -> None:
        """Say that an output is done; what is to be noted about it is said once for each prompt."""
        self._done += 1
        self.print_line(line)
        for text in made.notes:
            if (text, made.prompt) not in self._noted:
                self._noted.add((text, made.prompt))
                self.print_line(f"  note: {text}", sys.stderr)

    def print_line(self, line: str, file: TextIO | None = None) -> None:
        """Print a line above the bar; Rich itself would wrap a long path at the width of a terminal."""
        if self._silent:
            return
        running = self.live.is_started
        if running:
            self.stop()
        try:
            print(line, flush=True, file=file)
        finally:
            if running:
                self.start()


def requests_from(
    prompts: Sequence[str], prompt_file: Path | None, defaults: Mapping[str, Any], of_model: Mapping[str, Any]
) -> list[GenerationRequest]:
    """Return a request for each prompt.

    Args:
        defaults: values of all of them, by the names of `GenerationRequest`; `call` as words, `NAME=VALUE` each.
        of_model: what the model would be asked for by itself.

    Raises:
        ConfigurationError: there is no prompt, or a value is not allowed.
    """
    rows: list[dict[str, Any]] = [{"prompt": text} for text in prompts]
    if prompt_file is not None:
        rows += read_prompts(prompt_file)
    if not rows and "prompt" not in of_model:
        raise ConfigurationError("there is no prompt; give --prompt or --prompt-file")
    call = {}
    for word in defaults["call"]:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigurationError(f"--call {shortened(word)} must be NAME=VALUE, as --call max_sequence_length=256")
        call[name] = parse_yaml(value, f"--call {shortened(word)}: the value")
    return make_requests(rows or [{}], {**defaults, "call": call}, of_model=of_model)


def generate_on_ranks(
    settings: ModelSettings, ranks: int, requests: Sequence[GenerationRequest], **arguments: Any
) -> None:
    """Make and save an output for each request, on as many processes as are to share the model.

    Args:
        ranks: how many; those that are running already are taken.
        arguments: those of `run_generate`.

    Raises:
        PipeboostError: as `run_generate`, or a process failed.
    """
    if ranks == world_size():
        run_generate(settings, requests, **arguments)
        return
    if world_size() > 1:
        raise ConfigurationError(f"--num-gpus {ranks} contradicts the {world_size()} processes that are running")
    from pipeboost.distributed.launch import launch

    launch(on_rank, run_generate, settings, requests, num_gpus=ranks, **arguments)


def on_rank(run: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run a command on one rank; a mistake of the user ends all ranks and is reported once, without a traceback."""
    try:
        return run(*args, **kwargs)
    except RankFailedError:
        raise
    except PipeboostError as error:
        rank = world().rank
        time.sleep(_FIRST_TO_SPEAK if rank else 0)
        raise RankFailedError(f"{error} (rank {rank})" if rank else str(error), rank=rank) from error


def run_generate(
    settings: ModelSettings, requests: Sequence[GenerationRequest], *, fps: int | None, warm_up: bool, output: Output
) -> None:
    """Make and save an output for each request; of several ranks, the first one saves and reports.

    Args:
        warm_up: first make an output that is not reported.

    Raises:
        PipeboostError: something cannot be done as asked, or an output cannot be saved; earlier ones are kept.
    """
    first = world().rank == 0
    if not first:
        output = Output(None)
    with (
        quiet_libraries(),
        BatchProgress(len(requests), silent=not first) as progress,
        LoadedModel(settings, on_status=progress.show_status) as model,
    ):
        # Each of several ranks would do all of the work.
        if world_size() > 1 and not (parallel := model.pipe.acceleration.plan["parallel"]).on:
            name = stock_class(model.pipe).__name__
            raise UnsupportedError(
                f"--num-gpus {world_size()}: {name} would be computed whole on each of them ({parallel.why}); use "
                "--num-gpus 1"
            )
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
        results = Results(model, len(requests), output)
        progress.print_line(model.memory_line)
        try:
            for made in outputs:
                progress.done(f"{results.add(made)}  seed {made.seed}  {made.report.seconds:.2f} s", made)
        except BaseException as error:
            # Of two failures, as on a full disk, the first is reported.
            with contextlib.suppress(PipeboostError):
                results.write()
            progress.stop()
            if isinstance(error, KeyboardInterrupt):
                if first:
                    print(f"pipeboost: stopped{results.kept}", file=sys.stderr)
                raise SystemExit(STOPPED) from None
            if isinstance(error, PipeboostError):
                line, blank, trace = str(error).partition("\n")
                error.args = (f"{line}{results.kept}{blank}{trace}",)
            raise
        results.write()
