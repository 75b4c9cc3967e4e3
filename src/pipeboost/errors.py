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


def not_one_of(argument: str, value: object, allowed: Iterable[object]) -> ConfigurationError:
    """The error for a value outside a fixed set: names the argument, the value and what is allowed."""
    return ConfigurationError(f"{argument}={value!r} is not allowed; use one of {', '.join(map(repr, allowed))}")
