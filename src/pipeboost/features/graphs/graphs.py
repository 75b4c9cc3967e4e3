"""CUDA graphs of a transformer's forward: one per signature, replayed while nothing but numbers in tensors changes.

A replay launches all kernels of a forward at once. That pays where the host launches them more slowly than the device
runs them (small images, few frames, shards of several GPUs), and a little where it does not, since kernels follow each
other without gaps; `"auto"` measures the second. It computes what eager computes, to the bit.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pipeboost.contract.call import Call, alone, current_call
from pipeboost.core.fingerprint import numerics
from pipeboost.core.ledger import Ledger
from pipeboost.distributed import SEQUENCE, Group, finish
from pipeboost.features.graphs.capture import CapturedForward, aligned, capture, new_pool
from pipeboost.features.graphs.model_fingerprint import ModelFingerprint
from pipeboost.features.graphs.signature import Arguments, NotCapturable, read, with_writes
from pipeboost.features.graphs.trial import LAUNCH_BOUND, WORTH_TRYING, Trial, with_launch_share

MOST_GRAPHS = 8
"""Graphs of one model; the least recently used goes first."""

_MOST_SIGNATURES = 64


@dataclass
class _Seen:
    """A signature without a graph.

    Attributes:
        forwards: how many ran so far.
        off: why it will not be captured; None where it may.
        launch_share: host's time to launch it over the device's to run it, once it was measured.
        trial: times its graph while it is open whether that pays.
    """

    forwards: int = 0
    off: str | None = None
    launch_share: float | None = None
    trial: Trial | None = None


@dataclass
class GraphCounts:
    """What became of a model's forwards in this process.

    Attributes:
        captured: graphs made.
        replayed: forwards that replayed one.
        nbytes: memory that the present graphs hold, static inputs included; they share what activations take.
        dropped: how often the model had changed, so that all graphs were given up.
        change: what had changed the last time.
        eager: reason → forwards that ran without a graph.
    """

    captured: int = 0
    replayed: int = 0
    nbytes: int = 0
    dropped: int = 0
    change: str | None = None
    eager: dict[str, int] = field(default_factory=lambda: defaultdict(int))


class Graphs:
    """Middleware on a transformer's `__call__` that captures and replays.

    Args:
        owner: whose calls it acts in; None for every call.
        wanted: True captures every signature, `"auto"` those that are measured to be faster so.

    Attributes:
        counts: what became of the forwards.
    """

    def __init__(self, owner: Any, wanted: Literal[True, "auto"]) -> None:
        self.counts = GraphCounts()
        # The owner keeps this, so this must not keep the owner.
        self._owner = None if owner is None else weakref.ref(owner)
        self._wanted = wanted
        self._graphs: OrderedDict[Hashable, CapturedForward] = OrderedDict()
        self._seen: OrderedDict[Hashable, _Seen] = OrderedDict()
        self._fingerprint: ModelFingerprint | None = None
        self._pool: Any = None
        self._saving: float | None = None  # milliseconds a forward, as the latest trial found
        self._share = 0.0  # of launches in the forward that was tried then
        self._cost = 0.0  # milliseconds of the latest capture
        # Calls in several threads share this; an eager run holds up nobody.
        self._lock = threading.RLock()

    def __call__(self, call_next: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Replay the forward where there is a graph of it; else run it, and capture it if it is time to."""
        call = current_call()
        acts = call is not None and (self._owner is None or call.owner is self._owner())
        if call is None or not acts or torch.compiler.is_compiling():
            return call_next(*args, **kwargs)
        try:
            arguments = read(args, kwargs)
            device = _fit(arguments)
        except NotCapturable as reason:
            self.counts.eager[str(reason)] += 1
            return call_next(*args, **kwargs)
        signature = (arguments.key, _decided(call), numerics(device.type))
        ranks = None if call.mesh is None else call.mesh.forward
        with self._lock:
            graph = self._graph_of(model, signature, device)
            seen, unfit = self._noted(signature), self._fingerprint.unfit if self._fingerprint is not None else None
            if seen.trial is not None and graph is not None:
                graph = self._judged(signature, seen, graph, ranks)
            replays = graph is not None and (seen.trial is None or seen.trial.replays)
            timing = contextlib.nullcontext() if seen.trial is None else seen.trial.timed(replay=replays)
            if graph is not None and replays:
                self._graphs.move_to_end(signature)
                self.counts.replayed += 1
                with timing:
                    output = graph.replay(arguments.tensors)
                _follow_ranks(call)
                return output
            off = unfit or seen.off
            seen.forwards += off is None
        if off is not None:
            self.counts.eager[off] += 1
            return call_next(*args, **kwargs)
        if graph is not None:
            self.counts.eager["timed against its graph"] += 1
            try:
                with timing:
                    return call_next(*args, **kwargs)
            except torch.OutOfMemoryError:
                if ranks is not None:  # which all go on with the trial, or none
                    raise
                # It has run without the memory that its graph keeps, and does so again.
                with self._lock:
                    self._close(self._graphs.pop(signature))
                    seen.trial, seen.off = None, "there is no memory for a graph beside forwards without one"
            torch.cuda.empty_cache()
            return call_next(*args, **kwargs)
        if seen.forwards == 1:
            self.counts.eager["first run with these shapes and settings"] += 1
            output, written = with_writes(call_next, arguments, args, kwargs)
            seen.off = "it writes to its arguments" if written else None
            return output
        if self._wanted == "auto" and seen.launch_share is not None and not self._pays(seen):
            self.counts.eager["a graph would cost more than it has had time to save"] += 1
            return call_next(*args, **kwargs)
        with alone() as undisturbed:
            # A capture runs the forward once more, and with it the ranks' collectives: all of them do so, or none.
            undisturbed = all(_of_ranks(ranks, undisturbed))
            if undisturbed and (self._wanted is True or seen.launch_share is not None):
                return self._capture(call, call_next, signature, seen, arguments, device, args, kwargs)
            if undisturbed:
                self.counts.eager["second run, timed"] += 1
                output, share = with_launch_share(call_next, device, args, kwargs)
                seen.launch_share = max(_of_ranks(ranks, share))
                if seen.launch_share < WORTH_TRYING:
                    seen.off = (
                        f"launching it takes the host {seen.launch_share:.0%} of the time that the device runs it"
                    )
                return output
        self.counts.eager["another call was running, which a capture could disturb"] += 1
        return call_next(*args, **kwargs)

    def summary(self) -> dict[str, Any]:
        """Return the counts as a report shows them."""
        return {**vars(self.counts), "eager": dict(self.counts.eager)}

    def close(self) -> None:
        """Give up all graphs and free their memory."""
        with self._lock:
            self._forget()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _graph_of(self, model: nn.Module, signature: Hashable, device: torch.device) -> CapturedForward | None:
        """The graph of a signature, once the model was found to be what it was."""
        seen = self._seen.get(signature)
        if self._fingerprint is not None and (self._graphs or seen is None or seen.off is None):
            change = self._fingerprint.change()
            if change is not None:
                self.counts.dropped += 1
                self.counts.change = change
                self._forget()
        if self._fingerprint is None:
            self._fingerprint = ModelFingerprint(model, device)
        return self._graphs.get(signature)

    def _pays(self, seen: _Seen) -> bool:
        """Whether graphs like the latest that was tried would have saved a capture's cost by now, or it is unlike."""
        share = seen.launch_share or 0.0
        unlike = self._saving is None or share >= min(LAUNCH_BOUND, 1.5 * self._share)
        return unlike or seen.forwards * (self._saving or 0.0) >= self._cost

    def _judged(
        self, signature: Hashable, seen: _Seen, graph: CapturedForward, ranks: Group | None
    ) -> CapturedForward | None:
        """Return the graph, or None once the trial has found that it does not pay."""
        assert seen.trial is not None
        saving = seen.trial.saving(lambda times: list(map(max, *_of_ranks(ranks, times), times)))
        if saving is None:
            return graph
        found, seen.trial = seen.trial.description(), None
        self._saving, self._share = saving, seen.launch_share or 0.0
        if saving > 0:
            return graph
        self._close(self._graphs.pop(signature))
        seen.off = f"a graph is no faster: {found}"
        return None

    def _noted(self, signature: Hashable) -> _Seen:
        seen = self._seen.setdefault(signature, _Seen())
        self._seen.move_to_end(signature)
        if len(self._seen) > _MOST_SIGNATURES:
            self._seen.popitem(last=False)
        return seen

    def _capture(
        self,
        call: Call,
        call_next: Callable[..., Any],
        signature: Hashable,
        seen: _Seen,
        arguments: Arguments,
        device: torch.device,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        ranks = None if call.mesh is None else call.mesh.forward
        with self._lock:
            while len(self._graphs) >= MOST_GRAPHS:
                self._close(self._graphs.popitem(last=False)[1])
            if not self._graphs:
                # A pool is gone with its last graph.
                self._pool = new_pool()
            call.captures, start = True, time.perf_counter()
            try:
                output, graph = capture(call_next, args, kwargs, arguments.tensors, device, self._pool)
            finally:
                call.captures = False
            self._cost = max(_of_ranks(ranks, (time.perf_counter() - start) * 1e3))
            against = _of_ranks(ranks, str(graph) if isinstance(graph, NotCapturable) else None)
            if isinstance(graph, NotCapturable) or any(against):
                seen.off = next(filter(None, against))
                self.counts.eager[seen.off] += 1
                if not isinstance(graph, NotCapturable):
                    graph.close()
                return call_next(*args, **kwargs) if output is None else output
            self._graphs[signature] = graph
            if seen.launch_share is not None and seen.launch_share < LAUNCH_BOUND:
                seen.trial = Trial()
            self.counts.captured += 1
            self.counts.nbytes += graph.nbytes
            self.counts.eager["run captured for the next time"] += 1
            return output

    def _forget(self) -> None:
        while self._graphs:
            self._close(self._graphs.popitem()[1])
        self._seen.clear()
        self._fingerprint = None

    def _close(self, graph: CapturedForward) -> None:
        self.counts.nbytes -= graph.nbytes
        graph.close()


def capture_graphs(model: nn.Module, wanted: Literal[True, "auto"], ledger: Ledger, *, owner: Any = None) -> Graphs:
    """Run a transformer's forward from CUDA graphs inside our calls; undone, and their memory freed, by the ledger.

    A signature (shapes, strides and dtypes of the tensors, values of all other arguments, settings of torch) runs
    eagerly first, and is captured later; a change of the model's weights' places, adapters, processors, hooks or other
    attributes gives up all graphs. What cannot be captured runs eagerly, and `Graphs.counts.eager` says why. Call it
    after `compile_model`, so that compiled code is what is captured.

    A graph keeps the memory of one forward's activations for itself; the graphs of a model share it.

    A replay runs no Python, so middleware further in (`core/nesting.py`, and that on its submodules) keeps
    no tensor of one forward for the next, and obeys nothing but the call's features, mesh and `decided`.

    Args:
        wanted: True captures every signature that comes twice; `"auto"` those bound by their launches, and those
            of the others whose replays are faster when both are timed in turn.
        owner: the acceleration in whose calls it acts; several may do so on one model, each with graphs of its own.
            None for every call.
    """
    graphs = Graphs(owner, wanted)
    ledger.record("CUDA graphs", graphs.close)
    ledger.add_middleware(model, "__call__", graphs, place="component.graphs")
    return graphs


def _decided(call: Call) -> Hashable:
    """What is the same in all forwards of a call, or was decided for this one outside of its arguments."""
    return (call.features, None if call.mesh is None else id(call.mesh), frozenset(call.decided))


def _follow_ranks(call: Call) -> None:
    """Have the collectives that a replay just put on the stream watched, as those of an eager forward are."""
    groups = () if call.mesh is None else (call.mesh.group(*SEQUENCE), call.mesh.group("tensor"))
    for group in groups:
        if group.size > 1:
            finish(group, "replayed forward")


def _fit(arguments: Arguments) -> torch.device:
    """The device that the forward runs on.

    Raises:
        NotCapturable: it cannot be captured, whatever the model.
    """
    devices = {tensor.device for tensor in arguments.tensors}
    others = [str(device) for device in devices if device.type != "cuda"]
    if others or len(devices) != 1:
        raise NotCapturable(f"its arguments are on {' and '.join(sorted(map(str, devices))) or 'no device'}")
    (device,) = devices
    if torch.is_grad_enabled():
        raise NotCapturable("gradients are on")
    if _get_current_dispatch_mode() is not None or torch._C._len_torch_function_stack() > 0:
        raise NotCapturable("a mode of torch looks at each operation")
    if torch.cuda.is_current_stream_capturing():
        raise NotCapturable("it is being captured already")
    if device.index != torch.cuda.current_device():
        raise NotCapturable("the current device is another one")
    if not aligned(arguments.tensors):
        raise NotCapturable("an argument begins in the middle of a memory word")
    return device


def _of_ranks(ranks: Group | None, value: Any) -> list[Any]:
    """What each rank that computes this forward has; they all ask at the same forward of a signature."""
    return [value] if ranks is None else ranks.all_gather_objects(value)
