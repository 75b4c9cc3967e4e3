"""Where a batch is: a bar on a terminal, and a line for each finished output everywhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from pipeboost.generate import Generated
    from pipeboost.stages import Progress as StageProgress


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
        super().__init__(
            TextColumn("{task.description}"),
            *columns,
            console=console,
            transient=True,
            disable=silent or not console.is_terminal,
        )
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
