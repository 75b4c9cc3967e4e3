"""`Composition`: the stages that a stock script has, in the order of its call, and the user's own among them."""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeboost.contract.call import Slot, current_call
from pipeboost.core.errors import ConfigurationError, PipeboostError, UnsupportedError, not_one_of
from pipeboost.core.families import Family, StageDoor
from pipeboost.core.seams import signature_of, stock_class
from pipeboost.distributed import Mesh
from pipeboost.stages.spans import DENOISING, WHOLE_CALL
from pipeboost.stages.stage import Checks, FailedCheck, Stage, StageParallelism, Values, verified

INPUT_VALIDATION = "input validation"
TEXT_ENCODING = "text encoding"
_ORDER = (
    INPUT_VALIDATION, TEXT_ENCODING, "image encoding", "image VAE encoding", "timestep preparation",
    "latent preparation", DENOISING, "decoding", "postprocessing", WHOLE_CALL,
)  # fmt: skip
_COMPONENTS = {
    **dict.fromkeys(("text_encoder", "tokenizer", "processor"), TEXT_ENCODING),
    **dict.fromkeys(("image_encoder", "feature_extractor"), "image encoding"),
}
"""How names of components begin that a stage runs from a method of the pipeline."""


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
        users: where the user has stages: name of the built-in stage → those at its methods, in order, and which of them
            is itself or stands for it.
        parallelisms: how the ranks share each built-in stage.
        inside: the built-in stages whose methods the call is in.
        replaced: the stock work of the stages that are being replaced, by name.
    """

    composition: Composition
    users: Mapping[str, tuple[tuple[Stage, ...], int]]
    parallelisms: Mapping[str, StageParallelism]
    inside: list[str] = field(default_factory=list)
    replaced: dict[str, Callable[[Values], Values]] = field(default_factory=dict)


STAGES = Slot[CallStages]()


class Composition:
    """The stages of a pipeline, in order: a sequence of `Stage`, also by name.

    Args:
        family: says at which methods a stage begins and ends.
        pipe: has some of these methods.
    """

    def __init__(self, family: Family, pipe: Any) -> None:
        there = {door.stage for door in family.doors if _has_method(pipe, door)} | {DENOISING, WHOLE_CALL}
        own = {door.stage: None for door in family.doors if door.stage not in _ORDER}
        names = [*(name for name in _ORDER[:-1] if name in there), *(name for name in own if name in there), WHOLE_CALL]
        silent = {door.stage for door in family.doors if not door.outputs} | {DENOISING, WHOLE_CALL}
        self._built_in = {
            name: InputValidation(name) if name == INPUT_VALIDATION else BuiltInStage(name, returns=name not in silent)
            for name in names
        }
        # What runs at the methods of a built-in stage; a stage in its place has its name.
        self._stages: dict[str, tuple[Stage, ...]] = {name: (stage,) for name, stage in self._built_in.items()}
        # Where a call takes no picture, nothing encodes one.
        given = [name for name in signature_of(stock_class(pipe), "__call__").parameters if "ip_adapter" not in name]
        takes_pictures = any(name.split("_")[-1] in ("image", "images", "video") for name in given)
        idle = () if takes_pictures else ("image VAE encoding",)
        self._stages_of: dict[str, set[str]] = {}
        for door in family.doors:
            if door.stage not in idle:
                self._stages_of.setdefault(door.component, set()).add(door.stage)
        self._loaded: dict[int, Stage] = {}
        self._lock = threading.RLock()

    def __iter__(self) -> Iterator[Stage]:
        return itertools.chain.from_iterable(self._stages.values())

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, key: str | int) -> Stage:
        if isinstance(key, int):
            return [*self][key]
        at, index = self._find(key)
        return self._stages[at][index]

    def __repr__(self) -> str:
        return "\n".join(
            stage.name if isinstance(stage, BuiltInStage) else f"{stage.name}  ({type(stage).__name__})"
            for stage in self
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The stages' names, in order."""
        return tuple(stage.name for stage in self)

    def verify_arguments(self, arguments: Values) -> None:
        """Run the built-in check of a call's arguments, where the pipeline has one that the user did not replace.

        Raises:
            StageVerificationError: stock would die of them.
        """
        for stage in self:
            if isinstance(stage, InputValidation):
                verified(stage, "input", arguments)

    def for_call(self, mesh: Mesh | None) -> CallStages:
        """Return the stages of a call that begins on these ranks.

        Raises:
            UnsupportedError: the ranks cannot share a stage as it asks for.
        """
        for stage in self if mesh is not None and mesh.control.size > 1 and mesh.degree("tensor") == 1 else ():
            if stage.parallelism is StageParallelism.TENSOR_PARALLEL:
                raise UnsupportedError(
                    f"stage {stage.name!r} asks for {stage.parallelism!s}, but the mesh has no tensor ranks; use "
                    "ParallelConfig(tensor=2) or more, or StageParallelism.MAIN_RANK"
                )
        parallelisms = {name: stage.parallelism for name, stage in self._built_in.items()}
        changed = {name: stages for name, stages in self._stages.items() if stages != (self._built_in[name],)}
        users = {name: (stages, [each.name for each in stages].index(name)) for name, stages in changed.items()}
        return CallStages(self, users, parallelisms)

    def run_on_all_ranks(self, component: str) -> bool:
        """Whether a component is at work on more than the main rank, which does some stages for all."""
        found = self._stages_of.get(component) or {
            stage for begin, stage in _COMPONENTS.items() if component.startswith(begin)
        }
        stages = [stage for name, stage in self._built_in.items() if name in found]
        return not stages or any(stage.parallelism is not StageParallelism.MAIN_RANK for stage in stages)

    def add(self, name: str, stage: Stage, *, before: str | None = None, after: str | None = None) -> None:
        """Put a stage right before or right after another one.

        Raises:
            ConfigurationError: the name is taken, there is no such place, or nothing can stand there.
            UnsupportedError: not a `Stage`.
        """
        _require_stage(name, stage)
        if (before is None) == (after is None):
            raise ConfigurationError(f"add_stage({name!r}, ...) needs either before= or after=, and not both")
        with self._lock:
            if name in self:
                raise ConfigurationError(f"there is a stage {name!r} already; replace_stage puts another in its place")
            at, index = self._find(before if before is not None else after)
            self._refuse_second_place(name, stage)
            if at == WHOLE_CALL:
                raise ConfigurationError(f"{WHOLE_CALL!r} is the rest of the call, so no stage can be added to it")
            index += after is not None
            if index == 0 and at == DENOISING:
                raise ConfigurationError(
                    "denoising begins with the transformer's first call, so no stage can stand before it; use "
                    "after='latent preparation'"
                )
            self._put(at, index, index, stage)
            stage.name = name

    def replace(self, name: str, stage: Stage) -> None:
        """Put a stage in the place of another; it keeps the name.

        Raises:
            ConfigurationError: there is no such stage, or it is the loop or the rest of the call.
            UnsupportedError: not a `Stage`.
        """
        _require_stage(name, stage)
        with self._lock:
            if name in (DENOISING, WHOLE_CALL):
                raise ConfigurationError(f"{name!r} is the script itself and cannot be replaced; add a stage")
            at, index = self._find(name)
            self._refuse_second_place(name, stage)
            self._offload(self[name])
            self._put(at, index, index + 1, stage)
            stage.name = name

    def remove(self, name: str) -> None:
        """Take a user's stage out; where it had replaced a built-in one, that one is back.

        Raises:
            ConfigurationError: there is no such stage, or it is a built-in one.
        """
        with self._lock:
            at, index = self._find(name)
            stage, built_in = self[name], self._built_in.get(name)
            if stage is built_in:
                raise ConfigurationError(f"{name!r} is built in, and the script needs it; replace_stage replaces it")
            self._offload(stage)
            self._put(at, index, index + 1, *(() if built_in is None else (built_in,)))

    def load(self, stage: Stage) -> None:
        """Load a stage unless it is loaded."""
        with self._lock:
            if id(stage) not in self._loaded:
                stage.load()
                self._loaded[id(stage)] = stage

    def offload(self) -> None:
        """Offload every stage that is loaded, also one that a call still ran when it was removed."""
        for stage in tuple(self._loaded.values()):
            self._offload(stage)

    def _offload(self, stage: Stage) -> None:
        with self._lock:
            if self._loaded.pop(id(stage), None) is not None:
                stage.offload()

    def _refuse_second_place(self, name: str, stage: Stage) -> None:
        for other in (*self, *self._built_in.values()):
            if stage is other and other.name != name:
                raise ConfigurationError(
                    f"stage {name!r} stands at {other.name!r} already; use another instance of {type(stage).__name__}"
                )

    def _put(self, at: str, start: int, end: int, *stages: Stage) -> None:
        now = self._stages[at]
        self._stages = {**self._stages, at: (*now[:start], *stages, *now[end:])}

    def _find(self, name: str | None) -> tuple[str, int]:
        """Return the built-in stage at whose methods a stage runs, and which of the stages there it is."""
        for at, stages in self._stages.items():
            for index, stage in enumerate(stages):
                if stage.name == name:
                    return at, index
        raise not_one_of("stage", name, self.names)


def _has_method(pipe: Any, door: StageDoor) -> bool:
    owner = pipe if not door.component else getattr(pipe, door.component, None)
    return callable(getattr(owner, door.method, None))


def _require_stage(name: str, stage: Any) -> None:
    if not isinstance(stage, Stage):
        raise UnsupportedError(f"stage {name!r} must be an instance of pipeboost.Stage, not {type(stage).__name__}")
    if not isinstance(stage.parallelism, StageParallelism):
        raise not_one_of(f"{type(stage).__name__}.parallelism", stage.parallelism, list(StageParallelism))
