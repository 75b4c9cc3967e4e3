"""The stages that a stock script has, and how one call runs them with the user's own among them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeboost.contract.call import Slot, current_call
from pipeboost.core.errors import PipeboostError, UnsupportedError
from pipeboost.stages.stage import Checks, FailedCheck, Stage, StageParallelism, Values

if TYPE_CHECKING:
    from pipeboost.stages.composition import Composition

INPUT_VALIDATION = "input validation"
TEXT_ENCODING = "text encoding"


class BuiltInStage(Stage):
    """A stage that the stock script has; `run` does what stock does, from within a stage that replaces it.

    Args:
        returns: whether everything it does is in what it returns, so that some ranks can do it for the others.
    """

    def __init__(self, name: str, *, returns: bool = False) -> None:
        self.name = name
        self._returns = returns
        # Encoders are large and quick: one copy of them is enough, and their results are small.
        on_main = returns and name == TEXT_ENCODING
        self._parallelism = StageParallelism.MAIN_RANK if on_main else StageParallelism.REPLICATED

    @property
    def parallelism(self) -> StageParallelism:
        """How the ranks share it; may be set between calls, on all ranks alike."""
        return self._parallelism

    @parallelism.setter
    def parallelism(self, parallelism: StageParallelism) -> None:
        if parallelism is not StageParallelism.REPLICATED and not self._returns:
            raise UnsupportedError(
                f"stage {self.name!r} cannot be {parallelism!s}: what it does is not in what it returns, so every rank "
                "runs it; use StageParallelism.REPLICATED"
            )
        self._parallelism = parallelism

    def run(self, values: Values) -> Values:
        """Go on as stock: the method's own work on these arguments.

        Raises:
            PipeboostError: not inside the stage that replaces this one.
        """
        call = current_call()
        stages = None if call is None else call.get(STAGES)
        if stages is None or self.name not in stages.replaced:
            raise PipeboostError(f"the stage {self.name!r} runs inside a call, from the stage that replaces it")
        return stages.replaced[self.name](values)


class InputValidation(BuiltInStage):
    """Checks what stock would die of in the middle of a call. It never refuses what stock accepts."""

    def verify_input(self, values: Mapping[str, Any]) -> list[FailedCheck]:
        """Check the step count and size of a call's arguments."""
        checks = Checks(values)
        if "num_inference_steps" in values and values.get("sigmas") is None and values.get("timesteps") is None:
            steps = values["num_inference_steps"]
            try:
                counts = operator.index(steps) >= 1
            except TypeError:
                counts = False
            checks.require("num_inference_steps", counts, "a positive integer")
        for size in ("height", "width"):
            value = values.get(size)
            negative = isinstance(value, (int, float)) and value < 0
            checks.require(size, not isinstance(value, str) and not negative, "a positive integer")
        return checks.failed


@dataclass
class CallStages:
    """The stages that one call runs: those there were when it began.

    Attributes:
        composition: loads them.
        users: where the user has stages: name of the built-in stage → those at its methods, in order; the one that has
            its name is itself or stands for it.
        parallelisms: how the ranks share each built-in stage.
        inside: the built-in stages whose methods the call is in.
        replaced: the stock work of the stages that are being replaced, by name.
    """

    composition: Composition
    users: Mapping[str, tuple[Stage, ...]]
    parallelisms: Mapping[str, StageParallelism]
    inside: list[str] = field(default_factory=list)
    replaced: dict[str, Callable[[Values], Values]] = field(default_factory=dict)


STAGES = Slot[CallStages]()
