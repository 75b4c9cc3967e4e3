"""Where a batch is: a bar on a terminal, and a line for each finished output everywhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from pipeboost.stages import Progress as StageProgress


class BatchProgress:
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
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=silent or not console.is_terminal)
        self._task = self._bar.add_task("loading", total=None)

    def tell(self, text: str) -> None:
        """Say what is being done before the first output."""
        self._bar.update(self._task, description=escape(text))

    def step(self, progress: StageProgress) -> None:
        """What the running call tells."""
        which = f" {self._done + 1} of {self._requests}" if self._requests > 1 else ""
        if progress.steps:
            self._bar.update(self._task, total=progress.steps, completed=progress.step or 0)
        elif progress.step is None:
            self._bar.update(self._task, description=f"{escape(progress.stage)}{which}")

    def finished(self, line: str) -> None:
        """One output is done."""
        self._done += 1
        self.print(line)

    def note(self, text: str, *, about: str) -> None:
        """Something about the output before it, said once for each prompt."""
        if (text, about) not in self._noted:
            self._noted.add((text, about))
            self.print(f"  note: {text}", sys.stderr)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()

    def print(self, line: str, file: TextIO | None = None) -> None:
        """A line above the bar."""
        # Rich would wrap a long path at the width of a terminal.
        if self._silent:
            return
        running = self._bar.live.is_started
        if running:
            self._bar.stop()
        try:
            print(line, flush=True, file=file)
        finally:
            if running:
                self._bar.start()

    def __enter__(self) -> BatchProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
