"""`Stage`: a named part of a pipeline's call, with what goes in and out by name, and checks of both.

A user's stage is a subclass with a `run`, put before or after a built-in one by `Acceleration.add_stage`:

    class Polite(Stage):
        def run(self, values):
            return values | {"prompt": values["prompt"] + ", please"}

    pipe.acceleration.add_stage("manners", Polite(), before="text encoding")
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from pipeboost.contract.call import current_call
from pipeboost.core.errors import PipeboostError, quoted

Values = dict[str, Any]
Shape = Sequence[int | None]


class StageParallelism(Enum):
    """How the ranks that work on one sample share a stage. On one rank all of them are the same."""

    REPLICATED = "replicated"
    """Every rank runs it."""
    MAIN_RANK = "main rank"
    """The first rank runs it and sends the others what comes out."""
    CFG_PARALLEL = "cfg-parallel"
    """The ranks of one guidance branch run it: those of the first at its first run in a call, and so on in turn. They
    send the others what comes out."""
    TENSOR_PARALLEL = "tensor-parallel"
    """The ranks share its weights, so that all of them run it together. Needs tensor ranks."""


@dataclass(frozen=True)
class FailedCheck:
    """One thing that is wrong with what goes into a stage or comes out of it.

    Attributes:
        field: the value's name.
        value: the value in words; a tensor's shape and dtype.
        rule: what it should be, such as `"a positive integer"`.
    """

    field: str
    value: str
    rule: str

    def __str__(self) -> str:
        return f"{self.field}={self.value} must be {self.rule}"


class StageVerificationError(PipeboostError, ValueError):
    """A stage's `verify_input` or `verify_output` found something wrong.

    Attributes:
        stage: the stage's name.
        failed: every failed check.
    """

    def __init__(self, stage: str, side: str, failed: Sequence[FailedCheck]) -> None:
        super().__init__(f"{side} of stage {stage!r}: {'; '.join(map(str, failed))}")
        self.stage = stage
        self.failed = tuple(failed)
        self._side = side

    def __reduce__(self) -> Any:
        return type(self), (self.stage, self._side, self.failed)


class Stage:
    """A part of a call. Subclass it and give `run`; the rest is optional.

    Attributes:
        name: given to it when it is added.
        parallelism: how the ranks share it.
    """

    name: str = ""
    parallelism: StageParallelism = StageParallelism.REPLICATED

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The arguments of the pipeline's running call, by name, defaults included.

        Raises:
            PipeboostError: no call is running in this thread.
        """
        call = current_call()
        if call is None:
            raise PipeboostError(f"stage {self.name!r} knows the call's arguments only while it runs")
        return call.arguments

    def run(self, values: Values) -> Values:
        """Do the stage's work.

        Args:
            values: before a built-in stage, its arguments by name; after one, its results by name. A stage that
                replaces a built-in one gets the arguments and returns the results.

        Returns:
            The values that the call goes on with, under the same names.
        """
        return values

    def verify_input(self, values: Mapping[str, Any]) -> list[FailedCheck]:
        """Everything that is wrong with the values before `run`; `Checks` helps to say it."""
        return []

    def verify_output(self, values: Mapping[str, Any]) -> list[FailedCheck]:
        """Everything that is wrong with the values after `run`."""
        return []

    def load(self) -> None:
        """Put what `run` needs where it needs it; called before its first run, and again after `offload`."""

    def offload(self) -> None:
        """Give up what `load` took: after each call that offloads components, and when the stage is removed."""


class Checks:
    """Collects failed checks of named values.

    checks = Checks(values)
    checks.positive_integer("num_inference_steps")
    checks.tensor("latents", shape=(None, 16, None, None))
    checks.no_nan("latents")
    return checks.failed
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.failed: list[FailedCheck] = []

    def require(self, field: str, passed: bool, rule: str) -> None:
        """Note a check of your own."""
        if not passed:
            self.failed.append(FailedCheck(field, _describe(self._values.get(field)), rule))

    def positive_integer(self, field: str) -> None:
        """An integer of at least 1."""
        value = self._values.get(field)
        self.require(field, isinstance(value, numbers.Integral) and int(value) >= 1, "a positive integer")

    def tensor(self, field: str, *, shape: Shape | None = None, dtype: torch.dtype | None = None) -> None:
        """A tensor, of a shape in which None stands for any size, and of a dtype."""
        value = self._values.get(field)
        rule = "a tensor"
        passed = isinstance(value, torch.Tensor)
        if shape is not None:
            rule += f" of shape ({', '.join('any' if size is None else str(size) for size in shape)})"
            passed = passed and _fits(value.shape, shape)  # type: ignore[union-attr]
        if dtype is not None:
            rule += f" of {dtype}"
            passed = passed and value.dtype == dtype  # type: ignore[union-attr]
        self.require(field, passed, rule)

    def no_nan(self, field: str) -> None:
        """A tensor without NaN; on a GPU this waits for it."""
        value = self._values.get(field)
        self.require(field, isinstance(value, torch.Tensor) and not bool(value.isnan().any()), "a tensor without NaN")


def verified(stage: Stage, side: str, values: Values) -> Values:
    """Return the values, once `stage` has nothing against them.

    Args:
        side: `"input"` or `"output"`.

    Raises:
        StageVerificationError: it has.
    """
    failed = stage.verify_input(values) if side == "input" else stage.verify_output(values)
    if failed:
        raise StageVerificationError(stage.name, side, failed)
    return values


def _fits(actual: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(actual) == len(wanted) and all(want in (None, size) for size, want in zip(actual, wanted, strict=True))


def _describe(value: Any) -> str:
    return f"tensor {tuple(value.shape)} of {value.dtype}" if isinstance(value, torch.Tensor) else quoted(value)
