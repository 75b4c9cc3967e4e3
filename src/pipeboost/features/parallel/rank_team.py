"""`Team`: the ranks that run one accelerated pipeline together, and what each of them does to its components."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pipeboost.contract.model_info import Split, splits_of
from pipeboost.contract.registry import family_of, text_encoder_sharding
from pipeboost.core.config import ParallelConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import Family, TensorSharding
from pipeboost.core.hardware import device_of
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import stock_class
from pipeboost.distributed import (
    AXES,
    SEQUENCE,
    DisagreementError,
    Mesh,
    local_device,
    require_same_state,
    world_size,
)
from pipeboost.distributed.agreement.arguments import agreed_arguments
from pipeboost.distributed.beside import Beside
from pipeboost.distributed.failure.collective_errors import AllOrNone
from pipeboost.distributed.failure.watch import watched
from pipeboost.features.attention import refuse_stock_processors
from pipeboost.features.parallel import (
    AcrossRanks,
    RunningState,
    agree_on_interrupts,
    agree_on_stops,
    callback_apart,
    check_first_step,
    guard_pipeline,
    layout_in_words,
    parallelize_vae,
    settle_branches,
    shard_tokens,
    shard_weights,
    share_batch,
    share_branches,
    shares_text_encoders,
    shares_vae,
)
from pipeboost.plan import Decision, Plan


class Team:
    """The ranks of one pipeline. Every rank makes it at the same point of its program, and so it leaves it.

    Args:
        pipe: the pipeline, on this rank's device.
        plan: has a layout.

    Attributes:
        everyone: the ranks.
        mesh: those that denoise together: all, unless some are beside them; None where this rank is beside them.
        beside: the ranks beside the mesh; None where there are none.
        across: attention among the tokens of all ranks; None where each rank has all tokens.
        text_encoders: components whose weights the tensor ranks share; empty where the first rank encodes for all.

    Raises:
        UnsupportedError: the ranks planned differently, or cannot share what they were asked to.
    """

    def __init__(self, pipe: Any, plan: Plan) -> None:
        layout: ParallelConfig = plan["parallel"].settings
        self.text_encoders = _shared_encoders(pipe, layout, plan.facts.splits or {})
        self._layout = layout
        self._family: Family = plan.family
        self._state = RunningState()
        self._shares_vae = shares_vae(layout, plan.quality)
        ranks = None if layout.group is None else torch.distributed.get_process_group_ranks(layout.group)
        degrees, device = {axis: getattr(layout, axis) for axis in AXES}, device_of(pipe)
        self.mesh: Mesh | None = None
        self.beside: Beside | None = None
        if layout.beside:
            ranks = list(range(world_size())) if ranks is None else ranks
            # None of its axes is used: its ranks agree on arguments, and are watched together.
            self.everyone = Mesh({"ring": layout.size}, ranks=ranks, device=device, layout=layout_in_words(layout))
        else:
            self.everyone = self.mesh = Mesh(degrees, ranks=ranks, device=device)
        try:
            if layout.beside:
                self._join_beside(ranks or [], degrees, device)
            self._all_or_none = AllOrNone(self.mesh or self.everyone, "accelerate_pipeline")
            with self.watched(lambda: "accelerate_pipeline"):
                self._refuse_different_plans(plan)
        except BaseException:
            self.leave()
            raise
        self.across = AcrossRanks() if self.token_ranks > 1 else None

    def _join_beside(self, ranks: Sequence[int], degrees: Mapping[str, int], device: torch.device) -> None:
        count = self._layout.beside
        sharing, beside = ranks[:-count], ranks[-count:]
        if self.everyone.control.rank < len(sharing):
            self.mesh = Mesh(degrees, ranks=sharing, device=device)
            self.mesh.within = self.everyone
            self.everyone.further += self.mesh.groups
        self.beside = Beside(self.everyone, sharing, beside, device)

    @property
    def token_ranks(self) -> int:
        """How many ranks share the tokens."""
        return 1 if self.mesh is None else self.mesh.group(*SEQUENCE).size

    @property
    def carrier(self) -> str:
        """What carries heads and tokens between the ranks, in words; empty where they exchange none."""
        return "" if self.mesh is None or self.mesh.degree("ulysses") == 1 else self.mesh.group("ulysses").carrier

    def leave(self) -> None:
        """Give up the ranks' groups."""
        if self.mesh is not None:
            self.mesh.close()
        self.everyone.close()

    @contextlib.contextmanager
    def watched(self, stage: Callable[[], str]) -> Iterator[None]:
        """Inside, what ends a call on one rank ends it on all; `stage` tells another thread where the call is."""
        listening = contextlib.nullcontext() if self.beside is None else self.beside.listening()
        with listening, watched(self.everyone, stage=stage, timeout=self._layout.timeout):
            yield

    @contextlib.contextmanager
    def all_or_none(self, doing: str) -> Iterator[None]:
        """Inside, an error on one rank is an error on all of them; inside `watched`, so that none waits for ever.

        Raises:
            Exception: what this rank has raised.
            RankFailedError: another rank has raised something while it was `doing` this.
        """
        self._all_or_none = AllOrNone(self.mesh or self.everyone, doing)
        # What a mesh does, ranks beside it have no part in but the outcome.
        further = self.mesh is not None and self.mesh.within is not None
        with AllOrNone(self.everyone, doing)() if further else contextlib.nullcontext(), self._all_or_none():
            yield

    def telling(self) -> contextlib.AbstractContextManager[None]:
        """Inside `all_or_none`, an error is told before anything is taken back, for which ranks may need each other."""
        return self._all_or_none.telling()

    def agreed(self, signature: inspect.Signature, pipe: Any, args: Any, kwargs: Any) -> inspect.BoundArguments:
        """The arguments of a call that all ranks go on with.

        Raises:
            DisagreementError: they were called differently.
        """
        bound = agreed_arguments(self.everyone, signature.bind_partial(pipe, *args, **kwargs), self.everyone.device)
        callback = bound.arguments.get("callback_on_step_end")
        if callable(callback):
            bound.arguments["callback_on_step_end"] = callback_apart(callback)
        return bound

    def require_same_state(self, pipe: Any, counts: Callable[[str], bool]) -> None:
        """Refuse a call that ranks would run with different weights, settings or classes.

        Args:
            pipe: may be a view of the pipeline.
            counts: whether all ranks run the component of a name.

        Raises:
            DisagreementError: on all ranks alike.
        """
        if self.everyone.control.size > 1:
            digests = self._state.digests(pipe, counts)
            require_same_state(self.everyone, digests, functools.partial(self._state.facts, pipe))

    def agreed_to_overlap(self, requests: int, against: str | None) -> bool:
        """Whether so many requests overlap, as the first rank says; `against` is what this rank has against it.

        Raises:
            DisagreementError: on all ranks alike, where one has another number of requests.
        """
        control = self.everyone.control
        told = control.all_gather_objects((requests, against))
        for rank, (number, _) in zip(control.ranks, told, strict=True):
            if number != told[0][0]:
                raise DisagreementError(
                    f"run_many was given {told[0][0]} requests on rank {control.ranks[0]}, but {number} on rank "
                    f"{rank}; give all of them the same"
                )
        return told[0][1] is None

    def components(self, pipe: Any) -> dict[str, Any]:
        """Components that the ranks share beside those that every acceleration looks at."""
        names = [*self.text_encoders, *([self._family.guider] if self._family.guider else [])]
        return {name: pipe.components[name] for name in names}

    def share(self, path: str, obj: Any, ledger: Ledger, *, owner: object) -> None:
        """Let the ranks share one component of the pipeline, in the calls of `owner`."""
        family, mesh = self._family, self.mesh
        if mesh is None:
            if not path:
                _hide_progress_bar(obj, ledger)
            return
        if path in family.denoisers:
            if mesh.degree("tensor") > 1:
                assert family.tensor is not None
                self._shard_weights(obj, family.tensor, ledger)
            if mesh.degree("cfg") > 1:
                (share_branches if family.batched is None else share_batch)(obj, family, ledger)
            if self.across is not None:
                shard_tokens(obj, family, ledger)
        if not path and mesh.degree("tensor") > 1:
            guard_pipeline(obj, mesh.group("tensor"), ledger)
        if not path:
            agree_on_interrupts(obj, ledger)
        if not path and not mesh.main:
            _hide_progress_bar(obj, ledger)
        if path == "scheduler":
            settle_branches(obj, ledger)
            check_first_step(obj, ledger)
            agree_on_stops(obj, ledger)
        if path and path == family.guider:
            settle_branches(obj, ledger, door="__call__")
        if path == "vae" and self._shares_vae:
            parallelize_vae(obj, family.autoencoder, ledger, owner=owner)
        if path in self.text_encoders:
            sharding = text_encoder_sharding(obj)
            assert sharding is not None
            self._shard_weights(obj, sharding, ledger)
        if isinstance(obj, torch.nn.Module):  # whose weights have been split where they are to be
            self._state.watch(obj, ledger)

    def _shard_weights(self, model: Any, sharding: TensorSharding, ledger: Ledger) -> None:
        assert self.mesh is not None
        shard_weights(model, sharding, self.mesh.group("tensor"), ledger, ready=self._all_or_none.require_all)
        _take_from_host(model, self.mesh.device, ledger)

    def refuse_stock_processors(self, model: Any) -> None:
        """Refuse attention processors that would see a rank's own tokens only.

        Raises:
            UnsupportedError: a block has one.
        """
        if self.across is not None:
            refuse_stock_processors(model, [blocks.path for blocks in self._family.blocks])

    def _refuse_different_plans(self, plan: Plan) -> None:
        summary = (f"quality: {plan.quality}", *map(_in_words, plan.decisions))
        plans = self.everyone.control.all_gather_objects(summary)
        for rank, other in enumerate(plans):
            if other != plans[0]:
                first, theirs = next(pair for pair in zip(plans[0], other, strict=True) if pair[0] != pair[1])
                raise UnsupportedError(
                    f"ranks planned differently: rank 0 {first}, rank {rank} {theirs}; name the settings instead of "
                    "'auto', the same on every rank"
                )


def _in_words(decision: Decision) -> str:
    """What all ranks must have decided alike; weights may go to another device on each."""
    settings = decision.settings
    if isinstance(settings, ParallelConfig):
        settings = replace(settings, group=None)
    told = settings is not None and decision.feature != "offload"
    return f"{decision.feature}: {decision.choice}{f' ({settings})' if told else ''}"


def _hide_progress_bar(pipe: Any, ledger: Ledger) -> None:
    """One bar is enough for a team; a user who has said whether it is shown is obeyed."""
    before = getattr(pipe, "_progress_bar_config", None)
    if "disable" in (before or {}):
        return
    ours = pipe._progress_bar_config = {**(before or {}), "disable": True}
    reference = weakref.ref(pipe)

    def undo() -> None:
        ours.pop("disable", None)  # for copies of the pipeline, which have it too
        target = reference()
        if target is None or getattr(target, "_progress_bar_config", None) is not ours:
            return
        if before is None:
            del target._progress_bar_config
        else:
            target._progress_bar_config = before

    ledger.record("progress bar", undo)


def to_own_device(pipe: Any) -> None:
    """Move a pipeline that `.to("cuda")` has put on the first device, on every rank, to the one of this rank.

    Components that wait on the host for the ranks to split them stay there.
    """
    if world_size() == 1 or device_of(pipe).type != "cuda":
        return
    device = local_device()
    torch.cuda.set_device(device)
    if device_of(pipe) != device:
        waiting = [each for each in _modules(pipe).values() if _is_on_host(each)]
        if not waiting:
            pipe.to(device)
        for component in _modules(pipe).values():
            if component not in waiting:
                component.to(device)


def to_be_split(pipe: Any, layout: Any) -> tuple[str, ...]:
    """Components that may wait on the host for `accelerate_pipeline`, so that no device ever holds a whole one.

    It moves each rank's share to its device. The rest of the pipeline is on that device.

    Args:
        layout: the setting `parallel`; only where it names tensor ranks, components wait.

    Raises:
        UnsupportedError: as `Team`.
    """
    if not isinstance(layout, ParallelConfig) or layout.tensor == 1:
        return ()
    family, modules = family_of(pipe), _modules(pipe)
    if family.tensor is None:
        return ()
    denoisers = tuple(name for name in family.denoisers if name in modules)
    return denoisers + _shared_encoders(pipe, layout, splits_of(modules, family))


def _take_from_host(model: torch.nn.Module, device: torch.device, ledger: Ledger) -> None:
    """Move the share of a model that has waited on the host to its rank's device, and back before it is made whole."""
    if device.type == "cpu" or not _is_on_host(model):
        return
    reference = weakref.ref(model)

    def apply(inner: Ledger) -> None:
        model.to(device)
        inner.record(f"device of {stock_class(model).__name__}", back)

    def back() -> None:
        target = reference()
        if target is not None:
            target.to("cpu")

    ledger.share(model, "device", device, apply)


def _is_on_host(module: torch.nn.Module) -> bool:
    first = next(module.parameters(), None)
    return first is not None and first.device.type == "cpu"


def _modules(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: each for name, each in pipe.components.items() if isinstance(each, torch.nn.Module)}


def _shared_encoders(pipe: Any, layout: ParallelConfig, splits: Mapping[str, Split]) -> tuple[str, ...]:
    """The text encoders whose weights the ranks share; left to us, those that can be split so.

    Raises:
        UnsupportedError: they were asked to, and one cannot be split.
    """
    if not shares_text_encoders(layout):
        return ()
    shared = []
    for name, component in _modules(pipe).items():
        if not name.startswith("text_encoder"):
            continue
        if name in splits and layout.tensor in splits[name].degrees:
            shared.append(name)
        elif layout.text_encoder is True:
            raise UnsupportedError(
                f"{layout.tensor} ranks cannot share the weights of {name}, a {stock_class(component).__name__}; use "
                "ParallelConfig(text_encoder='auto')"
            )
    return tuple(shared)
