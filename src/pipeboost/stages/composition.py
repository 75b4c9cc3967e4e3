"""`Composition`: the stages of one accelerated pipeline in the order of its call, and the user's own among them."""

from __future__ import annotations

import inspect
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeboost.contract.call import Slot, current_call
from pipeboost.core.errors import ConfigurationError, PipeboostError, UnsupportedError, not_one_of
from pipeboost.core.families import Family, StageDoor
from pipeboost.distributed import Mesh
from pipeboost.stages.ranks import require_ranks
from pipeboost.stages.spans import DENOISING, WHOLE_CALL
from pipeboost.stages.stage import Checks, FailedCheck, Stage, StageParallelism, Values, verified

INPUT_VALIDATION = "input validation"
TEXT_ENCODING = "text encoding"
_ORDER = (
    INPUT_VALIDATION,
    TEXT_ENCODING,
    "image encoding",
    "image VAE encoding",
    "timestep preparation",
    "latent preparation",
    DENOISING,
    "decoding",
    "postprocessing",
    WHOLE_CALL,
)
_COMPONENTS = {
    **dict.fromkeys(("text_encoder", "tokenizer", "processor"), TEXT_ENCODING),
    **dict.fromkeys(("image_encoder", "feature_extractor"), "image encoding"),
}
"""How names of components begin that a stage runs from a method of the pipeline."""
STOCK_WORK = Slot[dict[str, Callable[[Values], Values]]](dict)
"""The stock work of the stages that are being replaced, by name."""


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
        """Go on as stock: the door's own work on these arguments.

        Raises:
            PipeboostError: not inside the stage that replaces this one.
        """
        call = current_call()
        replaced = call[STOCK_WORK] if call is not None else {}
        if self.name not in replaced:
            raise PipeboostError(f"the stage {self.name!r} runs inside a call, from the stage that replaces it")
        return replaced[self.name](values)


class InputValidation(BuiltInStage):
    """Checks what stock would die of in the middle of a call. It never refuses what stock accepts."""

    def verify_input(self, values: Mapping[str, Any]) -> list[FailedCheck]:
        """Step count and size of a call's arguments."""
        checks = Checks(values)
        if "num_inference_steps" in values and values.get("sigmas") is None and values.get("timesteps") is None:
            checks.require(
                "num_inference_steps", _is_positive_index(values["num_inference_steps"]), "a positive integer"
            )
        for size in ("height", "width"):
            value = values.get(size)
            negative = isinstance(value, (int, float)) and value < 0
            checks.require(size, not isinstance(value, str) and not negative, "a positive integer")
        return checks.failed


@dataclass(frozen=True)
class _Entry:
    """One stage in its place: the built-in stage whose door it runs at, and on which side of it."""

    stage: Stage
    anchor: str
    side: str
    built_in: Stage | None = None


@dataclass(frozen=True)
class UserStages:
    """The user's stages at one built-in stage."""

    before: tuple[Stage, ...]
    instead: Stage | None
    after: tuple[Stage, ...]


class Composition:
    """The stages of a pipeline, in order: a sequence of `Stage`, also by name.

    Args:
        family: says which doors begin and end a stage.
        pipe: has some of these doors.
    """

    def __init__(self, family: Family, pipe: Any) -> None:
        there = {door.stage for door in family.doors if has_door(pipe, door)} | {DENOISING, WHOLE_CALL}
        own = {door.stage: None for door in family.doors if door.stage not in _ORDER}
        names = [*(name for name in _ORDER[:-1] if name in there), *(name for name in own if name in there), WHOLE_CALL]
        silent = {door.stage for door in family.doors if not door.outputs} | {DENOISING, WHOLE_CALL}
        stages = [
            InputValidation(name) if name == INPUT_VALIDATION else BuiltInStage(name, returns=name not in silent)
            for name in names
        ]
        self._entries = tuple(_Entry(stage, stage.name, "self", stage) for stage in stages)
        # Where a call takes no picture, nothing encodes one.
        idle = () if _takes_pictures(pipe) else ("image VAE encoding",)
        self._stages_of: dict[str, set[str]] = {}
        for door in family.doors:
            if door.stage not in idle:
                self._stages_of.setdefault(door.component, set()).add(door.stage)
        self._loaded: dict[int, Stage] = {}
        self._lock = threading.RLock()

    def __iter__(self) -> Iterator[Stage]:
        return iter([entry.stage for entry in self._entries])

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return any(entry.stage.name == name for entry in self._entries)

    def __getitem__(self, key: str | int) -> Stage:
        if isinstance(key, int):
            return self._entries[key].stage
        return self._entries[self._index(key)].stage

    def __repr__(self) -> str:
        return "\n".join(
            entry.stage.name if entry.stage is entry.built_in else f"{entry.stage.name}  ({type(entry.stage).__name__})"
            for entry in self._entries
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The stages' names, in order."""
        return tuple(entry.stage.name for entry in self._entries)

    def verify_arguments(self, arguments: Values) -> None:
        """The built-in check of a call's arguments, where the pipeline has one that the user did not replace.

        Raises:
            StageVerificationError: stock would die of them.
        """
        for stage in self:
            if isinstance(stage, InputValidation):
                verified(stage, stage.name, "input", arguments)

    def user_stages(self) -> Mapping[str, UserStages]:
        """The user's stages, by the built-in stage at whose door they run; a snapshot."""
        users: dict[str, UserStages] = {}
        for entry in self._entries:
            if entry.stage is entry.built_in:
                continue
            around = users.get(entry.anchor, UserStages((), None, ()))
            if entry.side == "before":
                around = replace(around, before=(*around.before, entry.stage))
            elif entry.side == "after":
                around = replace(around, after=(*around.after, entry.stage))
            else:
                around = replace(around, instead=entry.stage)
            users[entry.anchor] = around
        return users

    def parallelisms(self, mesh: Mesh | None) -> Mapping[str, StageParallelism]:
        """How the ranks share each built-in stage; a snapshot.

        Raises:
            UnsupportedError: these ranks cannot share a stage as it asks for.
        """
        if mesh is not None:
            for stage in self:
                require_ranks(stage.name, stage.parallelism, mesh)
        built_in = [entry.built_in for entry in self._entries if entry.built_in is not None]
        return {stage.name: stage.parallelism for stage in built_in}

    def run_on_all_ranks(self, component: str) -> bool:
        """Whether a component is at work on more than the main rank, which does some stages for all."""
        found = self._stages_of.get(component) or {
            stage for begin, stage in _COMPONENTS.items() if component.startswith(begin)
        }
        stages = [entry.built_in for entry in self._entries if entry.built_in is not None and entry.stage.name in found]
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
            self._require_new(name, stage, self._entries)
            position = self._index(before if before is not None else after)
            beside = self._entries[position]
            side = "before" if before is not None else "after"
            if beside.anchor == WHOLE_CALL:
                raise ConfigurationError(f"{WHOLE_CALL!r} is the rest of the call, so no stage can stand beside it")
            if beside.anchor == DENOISING and side == "before" and beside.side == "self":
                raise ConfigurationError(
                    "denoising begins with the transformer's first call, so no stage can stand before it; use "
                    "after='latent preparation'"
                )
            entry = _Entry(stage, beside.anchor, side if beside.side == "self" else beside.side)
            position += side == "after"
            self._entries = (*self._entries[:position], entry, *self._entries[position:])
            stage.name = name

    def replace(self, name: str, stage: Stage) -> None:
        """Put a stage in the place of another; it keeps the name.

        Raises:
            ConfigurationError: there is no such stage, or it is the loop or the rest of the call.
            UnsupportedError: not a `Stage`.
        """
        _require_stage(name, stage)
        with self._lock:
            position = self._index(name)
            entry = self._entries[position]
            if entry.side == "self" and entry.anchor in (DENOISING, WHOLE_CALL):
                raise ConfigurationError(
                    f"{name!r} is the pipeline's own script and cannot be replaced; add a stage beside another one"
                )
            self._require_new(name, stage, (*self._entries[:position], *self._entries[position + 1 :]))
            self._give_up(entry.stage)
            self._put(position, replace(entry, stage=stage))
            stage.name = name

    def remove(self, name: str) -> None:
        """Take a user's stage out; where it had replaced a built-in one, that one is back.

        Raises:
            ConfigurationError: there is no such stage, or it is a built-in one.
        """
        with self._lock:
            position = self._index(name)
            entry = self._entries[position]
            if entry.stage is entry.built_in:
                raise ConfigurationError(
                    f"{name!r} is built in and the script needs it; replace_stage puts another in its place"
                )
            self._give_up(entry.stage)
            if entry.built_in is not None:
                self._put(position, replace(entry, stage=entry.built_in))
            else:
                self._entries = (*self._entries[:position], *self._entries[position + 1 :])

    def load(self, stage: Stage) -> None:
        """Load a stage unless it is loaded."""
        with self._lock:
            if id(stage) not in self._loaded:
                stage.load()
                self._loaded[id(stage)] = stage

    def offload(self) -> None:
        """Offload every stage that is loaded, also one that a call still ran when it was removed."""
        for stage in tuple(self._loaded.values()):
            self._give_up(stage)

    def _give_up(self, stage: Stage) -> None:
        with self._lock:
            if self._loaded.pop(id(stage), None) is not None:
                stage.offload()

    def _require_new(self, name: str, stage: Stage, entries: Sequence[_Entry]) -> None:
        for entry in entries:
            if stage is entry.stage or stage is entry.built_in:
                raise ConfigurationError(
                    f"stage {name!r} stands at {entry.stage.name!r} already; use another instance of "
                    f"{type(stage).__name__}"
                )

    def _put(self, position: int, entry: _Entry) -> None:
        self._entries = (*self._entries[:position], entry, *self._entries[position + 1 :])

    def _index(self, name: str | None) -> int:
        for position, entry in enumerate(self._entries):
            if entry.stage.name == name:
                return position
        raise not_one_of("stage", name, self.names)


def has_door(pipe: Any, door: StageDoor) -> bool:
    """Whether a pipeline has a door."""
    owner = pipe if not door.component else getattr(pipe, door.component, None)
    return callable(getattr(owner, door.method, None))


def _takes_pictures(pipe: Any) -> bool:
    given = [name for name in inspect.signature(pipe.__call__).parameters if "ip_adapter" not in name]
    return any(name.split("_")[-1] in ("image", "images", "video") for name in given)


def _require_stage(name: str, stage: Any) -> None:
    if not isinstance(stage, Stage):
        raise UnsupportedError(f"stage {name!r} must be an instance of pipeboost.Stage, not {type(stage).__name__}")
    if not isinstance(stage.parallelism, StageParallelism):
        raise not_one_of(f"{type(stage).__name__}.parallelism", stage.parallelism, list(StageParallelism))


def _is_positive_index(value: Any) -> bool:
    try:
        return operator.index(value) >= 1
    except TypeError:
        return False
