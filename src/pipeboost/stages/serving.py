"""`Serving`: what a rank beside a mesh does while the others run their calls: their errands, one after another."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import Any

import torch

from pipeboost.contract.call import Call
from pipeboost.core.errors import PipeboostError, RankFailedError
from pipeboost.distributed.agreement.broadcast import packed_failure, raise_failure
from pipeboost.distributed.agreement.random_state import generators_in, set_global_state
from pipeboost.distributed.agreement.serialization import Known, Parcel, pack
from pipeboost.distributed.beside import Beside
from pipeboost.distributed.wire import Kind, Message
from pipeboost.stages.errands import INSIDE, Errand, own_objects
from pipeboost.stages.ranks import Effects


class Serving:
    """The errands of a call, or of a list of requests, on a rank beside; and what came of each request."""

    def __init__(self, beside: Beside) -> None:
        self._beside = beside
        self._outcomes: dict[int, Message] = {}
        self._values: dict[int, Any] = {}
        self._told: bytes | None = None
        self._failure: BaseException | None = None
        self._over = False
        self._changed = threading.Condition()

    def run(self, call: Call) -> None:
        """Do what is asked until the ranks of the mesh are done, in a call that was opened for it.

        An errand that fails fails where it was asked for; this goes on.

        Raises:
            RankFailedError: a rank has failed.
        """
        (inbox,), (wire,) = self._beside.inboxes, self._beside.answers
        try:
            inbox.start()
            while not self._over:
                message = inbox.next()
                if message.kind is Kind.ERRAND:
                    self._answer(call, message)
                    continue
                if message.kind is Kind.OVER:
                    wire.send(Kind.OVER)
                with self._changed:
                    self._over = message.kind is Kind.OVER
                    if not self._over:
                        self._outcomes[message.request] = message
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._over = True
                self._changed.notify_all()
            raise

    def has_returned(self, request: int) -> bool:
        """Whether a request has returned something on the mesh, once it has come to its end; else it has raised.

        Raises:
            RankFailedError: a rank has failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: request in self._outcomes or self._over)
            if self._failure is not None:
                raise self._failure
            message = self._outcomes.get(request)
        if message is not None and message.kind is Kind.OUTCOME:
            value = message.open(Known(()))
            if not isinstance(value, bytes):
                self._values[request] = value
                return True
            self._told = value
        elif message is not None:
            self._told = message.open(Known(()))
        else:
            error = PipeboostError("the call has ended on the first rank without a result")
            self._told = packed_failure(error, self._beside.rank)
        return False

    def outcome(self, request: int, arguments: dict[str, Any], *, alone: bool) -> Any:
        """What a request has returned on the mesh, after `has_returned`; random state is then as it is there.

        Args:
            arguments: of the request.
            alone: whether no other request is under way.

        Raises:
            Exception: what it has raised on the first rank.
        """
        self.raise_what_was_told()
        (result,), found = self._values.pop(request)
        Effects(generators_in(arguments.values()), self._beside.device, None, everywhere=alone).repeat(found)
        return result

    def raise_what_was_told(self) -> None:
        """Raise what a request has raised on the first rank, if one has."""
        if self._told is not None:
            raise_failure(self._told)

    @contextlib.contextmanager
    def excusing(self) -> Iterator[None]:
        """Goes around the watched call: an error of all ranks of the mesh is told by the first, and is raised so."""
        try:
            yield
        except RankFailedError:
            if self._told is None:
                raise

    def _answer(self, call: Call, message: Message) -> None:
        (wire,) = self._beside.answers
        try:
            parcel, kind = self._done(call, message), Kind.DONE
        except Exception as error:
            parcel, kind = pack(packed_failure(error, self._beside.rank), Known(()), "an error"), Kind.FAILED
        if self._beside.device.type == "cuda":
            # The others begin to receive when they are told, and should not do so while this is still being computed.
            torch.cuda.current_stream(self._beside.device).synchronize()
        wire.send(kind, message.request, message.number, parcel)

    def _done(self, call: Call, message: Message) -> Parcel:
        errand = message.open(Known(()))
        if isinstance(errand, bytes):
            raise_failure(errand)
        assert isinstance(errand, Errand)
        door, args, kwargs = errand.door, errand.args, errand.kwargs
        known = Known(own_objects(args, kwargs))
        pipe = copy.copy(call.pipe)
        vars(pipe).update(errand.attributes)
        alone = errand.random is not None
        if errand.random is not None:
            set_global_state(errand.random, self._beside.device)
        view = None if door.component else pipe
        effects = Effects(generators_in([*args, *kwargs.values()]), self._beside.device, view, everywhere=alone)
        inside: list[str] = call.state.setdefault(INSIDE, [])
        inside.append(door.stage)  # the user's stages at this door run where it was asked for
        effects.begin()
        try:
            with torch.set_grad_enabled(errand.gradients):
                owner = getattr(pipe, door.component) if door.component else pipe
                outcome = getattr(owner, door.method)(*args, **kwargs)
                return pack((outcome, effects.found()), known, f"the outcome of stage {door.stage!r}")
        finally:
            inside.pop()
