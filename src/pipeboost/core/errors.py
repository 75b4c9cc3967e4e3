"""The errors pipeboost raises; every one is a `PipeboostError` and says what to do instead."""

from __future__ import annotations

import reprlib
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
        rank: the first one that failed; None if that is not known.
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


class _Quote(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 200, 200
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 8

    def repr_int(self, value: int, level: int) -> str:
        # Python itself refuses to write the decimals of a very long one.
        return f"<an integer of {value.bit_length()} bits>" if value.bit_length() > 1000 else repr(value)


_QUOTE = _Quote()


def quoted(value: object) -> str:
    """Return a user's value as messages show it: as Python writes it, shortened where it is long, wide or deep."""
    return _QUOTE.repr(value)


def shortened(text: str, most: int = 200) -> str:
    """Return a text in one line of at most `most` characters."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most and len(text) <= 4 * most else f"{line[: most - 3]}..."


def one_line(error: BaseException) -> str:
    """Return what a library says of its error, in one line that is not endless."""
    return shortened(str(error), 300) or type(error).__name__


def not_one_of(argument: str, value: object, allowed: Iterable[object]) -> ConfigurationError:
    """Return the error for a value outside a fixed set: names the argument, the value and what is allowed."""
    return ConfigurationError(f"{argument}={quoted(value)} is not allowed; use one of {', '.join(map(repr, allowed))}")
