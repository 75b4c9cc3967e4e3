"""The errors pipeboost raises; every one is a `PipeboostError` and says what to do instead."""

from __future__ import annotations

from collections.abc import Iterable


class PipeboostError(Exception):
    """Base of all errors of this package."""


class ConfigurationError(PipeboostError, ValueError):
    """A setting has a value that cannot be used; nothing was changed."""


class UnsupportedError(PipeboostError, TypeError):
    """The object, model or combination cannot be accelerated as asked; nothing was changed."""


class MissingPackageError(PipeboostError, ImportError):
    """A setting needs a package that is not installed; the message holds the install command."""


class Cancelled(PipeboostError):  # noqa: N818 - the public name is fixed by the design
    """A running call was cancelled by `Acceleration.cancel`."""


class RankFailedError(PipeboostError):
    """Another rank ended the call on all of them, or a rank that `launch` had started failed.

    Attributes:
        rank: the first one that failed; None if it cannot be told.
        stage: the last that is known of where it was; empty if nothing is.
        signal: name of the signal that killed it, such as `"SIGKILL"`; None where none did.
        traceback: its traceback as Python prints it; empty where it raised nothing.
    """

    def __init__(
        self, message: str, *, rank: int | None = None, stage: str = "", signal: str | None = None, traceback: str = ""
    ) -> None:
        super().__init__(f"{message}\n\n{traceback}" if traceback else message)
        self.rank = rank
        self.stage = stage
        self.signal = signal
        self.traceback = traceback


def not_one_of(argument: str, value: object, allowed: Iterable[object]) -> ConfigurationError:
    """The error for a value outside a fixed set: names the argument, the value and what is allowed."""
    return ConfigurationError(f"{argument}={value!r} is not allowed; use one of {', '.join(map(repr, allowed))}")
