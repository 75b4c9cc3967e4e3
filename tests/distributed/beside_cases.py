"""What the ranks run in `test_beside`: calls on a mesh with ranks beside it."""

import contextlib
import functools
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeboost import ParallelConfig, accelerate_pipeline
from pipeboost.core.errors import RankFailedError, UnsupportedError
from pipeboost.distributed import Group, world
from pipeboost.distributed import groups as groups_module
from pipeboost.distributed.agreement.serialization import Known, pack
from pipeboost.distributed.wire import Kind, Wire
from pipeboost.stages import Stage, StageParallelism
from tests.distributed.failure_cases import Trouble, outcome
from tests.pipelines.moves import plan_another_device
from tests.pipelines.tiny import TINY

Layout = dict[str, Any]


def results(name: str, layout: Layout, *, quality: str = "exact", **settings: Any) -> dict[str, Any]:
    """What two calls return on this rank, one with a generator and one without, and what they leave behind.

    Returns:
        `"results"`; `"worked"`: components that have worked here; `"random"`: states after the calls; `"removed"`: the
        result of the pipeline once it is stock again; `"left"`: threads and groups that there are then.
    """
    entry, groups = TINY[name], set(groups_module._groups)
    pipe, worked = entry.build(), set()
    hooks = _hooks(pipe, worked)
    torch.manual_seed(11 + dist.get_rank())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        accelerate_pipeline(pipe, quality=quality, parallel=ParallelConfig(**layout), reuse=None)
        found = [entry.call(pipe, generator=given, **settings) for given in (generator, None)]
        plan = str(pipe.acceleration.plan)
        pipe.acceleration.remove()
        for hook in hooks:
            hook.remove()
        random = [torch.rand(1, generator=generator).item(), torch.rand(1).item()]
        removed = entry.call(pipe, **settings)
    left = [*(set(groups_module._groups) - groups), *_threads()]
    return {"results": found, "worked": worked, "random": random, "removed": removed, "left": left, "plan": plan}


def of_list(
    name: str, layout: Layout, *, quality: str = "exact", take: int = 4, late: float = 0.0, **settings: Any
) -> dict[str, Any]:
    """What `run_many` yields for four requests on this rank, and each call by itself.

    Args:
        take: how many are taken.
        late: seconds by which a rank gives the others up later than the rank before it.

    Returns:
        `"list"`, `"alone"`: results; `"stages"`: of the report of the last; `"after"`: of a call after it.
    """
    entry = TINY[name]
    pipe = entry.build()
    with torch.no_grad():
        accelerate_pipeline(pipe, quality=quality, parallel=ParallelConfig(**layout))
        listed = []
        outputs = pipe.acceleration.run_many(requests_of(name, **settings))
        for _ in range(take):
            listed.append(next(outputs)[0])
        time.sleep(late * dist.get_rank())
        outputs.close()
        stages = set(pipe.acceleration.report().stages)
        alone = [pipe(**request)[0] for request in requests_of(name, **settings)]
        pipe.acceleration.remove()
    return {"list": listed, "alone": alone, "stages": stages, "left": _threads()}


def of_list_after_a_move(name: str, layout: Layout) -> bool:
    """Whether a list that is the first thing to run on another device gives what each call by itself gives."""
    pipe = TINY[name].build()
    with torch.no_grad():
        accelerate_pipeline(pipe, quality="exact", parallel=ParallelConfig(**layout))
        here = plan_another_device(pipe)
        listed = [output[0] for output in pipe.acceleration.run_many(requests_of(name, 2))]
        alone = [pipe(**request)[0] for request in requests_of(name, 2)]
        same = all(map(torch.equal, listed, alone)) and pipe.acceleration.plan == here
        pipe.acceleration.remove()
    return same and len(listed) == 2


def requests_of(name: str, count: int = 4, **settings: Any) -> list[dict[str, Any]]:
    """Arguments of `count` calls, each with a seed, a prompt and a number of steps of its own."""
    prompts = ("a cat", "two dogs on a long walk by the sea", "a bird", "a boat")
    entry = TINY[name]
    return [
        entry.call_kwargs(seed=seed, prompt=prompts[seed % len(prompts)], steps=2 + seed % 2, **settings)
        for seed in range(count)
    ]


def _hooks(pipe: Any, worked: set[str]) -> list[Any]:
    hooks = []
    for component, module in pipe.components.items():
        parts = {component: module} if component != "vae" else {"encoder": module.encoder, "decoder": module.decoder}
        for part, hooked in parts.items():
            if isinstance(hooked, torch.nn.Module):
                hooks.append(hooked.register_forward_pre_hook(lambda *_, part=part: worked.add(part)))
    return hooks


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "pipeboost" in thread.name]


def overlapping(name: str, layout: Layout, tag: str) -> int:
    """How many requests of a list came through, where loops, encodings and decodings each wait until others have begun.

    Request i's loop ends only once request i - 1 is being decoded and the text of request i + 1 being encoded; and
    request i - 1's decoding only once request i's loop has begun.
    """
    pipe, store, last, steps = TINY[name].build(), world().store, 3, 2
    requests = [{**request, "num_inference_steps": steps} for request in requests_of(name, last + 1)]
    counts = {"loop": 0, "encoding": 0, "decoding": 0}

    def begins(what: str, runs: int, *others: tuple[str, int], at: int = 0) -> Any:
        def hook(*_: Any) -> None:
            request, run = divmod(counts[what], runs)
            counts[what] += 1
            if run == at:
                store.set(f"{tag} {what} {request}", "begun")
            wanted = [(other, request + offset) for other, offset in others if 0 <= request + offset <= last]
            if wanted:
                store.wait([f"{tag} {other} {number}" for other, number in wanted], _SOON)

        return hook

    pipe.transformer.register_forward_pre_hook(begins("loop", steps, ("decoding", -1), ("encoding", 1)))
    # Not before the second prompt: the rank beside must be through with both before it waits in a decoding.
    pipe.text_encoder.register_forward_pre_hook(begins("encoding", 2, at=1))
    pipe.vae.decoder.register_forward_pre_hook(begins("decoding", 1, ("loop", 1)))
    with torch.no_grad():
        accelerate_pipeline(pipe, quality="exact", parallel=ParallelConfig(**layout), reuse=None)
        count = len(list(pipe.acceleration.run_many(requests)))
        pipe.acceleration.remove()
    return count


_SOON = timedelta(seconds=20)


def failing(name: str, layout: Layout, kind: str, rank: int, stage: str, *, listed: bool = False) -> dict[str, Any]:
    """A call or a list of them, in which one rank fails at a stage, and the next call; what each raised or returned."""
    entry = TINY[name]
    pipe, trouble = entry.build(), Trouble(kind, rank, stage)
    accelerate_pipeline(pipe, quality="exact", parallel=ParallelConfig(**layout), reuse=None)
    pipe.acceleration.progress = lambda told: trouble.at(told.stage) if told.step in (None, 1) else None

    def call() -> float:
        if listed:
            return sum(output[0].mean().item() for output in pipe.acceleration.run_many(requests_of(name)))
        return entry.call(pipe).mean().item()

    before = time.monotonic()
    first = outcome(call)
    first["seconds"] = time.monotonic() - before
    pipe.acceleration.progress = None
    return {"first": first, "second": outcome(lambda: entry.call(pipe).mean().item()), "threads": _threads()}


def bad_request(name: str, layout: Layout) -> dict[str, Any]:
    """A list of requests whose third one the script refuses, and the next call; with what the second rank differs."""
    entry = TINY[name]
    pipe = entry.build()
    accelerate_pipeline(pipe, quality="exact", parallel=ParallelConfig(**layout), reuse=None)
    requests = requests_of(name)
    requests[2]["prompt"] = 3
    taken = []

    def take() -> None:
        for output in pipe.acceleration.run_many(requests):
            taken.append(output)

    refused = outcome(take)
    other = {"prompt": f"rank {dist.get_rank()}"}
    disagreement = outcome(lambda: entry.call(pipe, **other).mean().item())
    lengths = outcome(lambda: list(pipe.acceleration.run_many(requests_of(name, 3 + dist.get_rank() // 2))))
    with contextlib.suppress(StopIteration):
        outputs = pipe.acceleration.run_many(requests_of(name))
        next(outputs)
        inside = outcome(lambda: entry.call(pipe).mean().item())
        outputs.close()
    after = outcome(lambda: entry.call(pipe).mean().item())
    pipe.acceleration.remove()
    return {
        "taken": len(taken),
        "refused": refused,
        "disagreement": disagreement,
        "lengths": lengths,
        "inside": inside,
        "after": after,
        "stock": entry.call(pipe).mean().item(),
    }


class Beside(Stage):
    """Wants what only built-in stages can have."""

    parallelism = StageParallelism.BESIDE


def user_stage_beside() -> str:
    """The sentence that refuses a user's stage beside the mesh."""
    entry = TINY["flux_dev"]
    pipe = entry.build()
    accelerate_pipeline(pipe, quality="exact", parallel=ParallelConfig(beside=1))
    pipe.acceleration.add_stage("mine", Beside(), after="decoding")
    try:
        entry.call(pipe)
    except UnsupportedError as error:
        return f"UnsupportedError: {error}"
    finally:
        pipe.acceleration.remove()
    return "it ran"


class Noting(Stage):
    """Notes how often it ran; in the place of a built-in stage it does the stock work."""

    def __init__(self, parallelism: StageParallelism, instead_of: Stage | None = None) -> None:
        self.parallelism, self.instead_of, self.runs = parallelism, instead_of, 0

    def run(self, values: dict[str, Any]) -> dict[str, Any]:
        self.runs += 1
        return values if self.instead_of is None else self.instead_of.run(values)


def user_stages(name: str, layout: Layout, parallelism: StageParallelism) -> dict[str, Any]:
    """A call and a list of calls with stages of the user's at doors whose work is done beside; how often they ran."""
    entry = TINY[name]
    pipe = entry.build()
    with torch.no_grad():
        stock = entry.call(pipe)
        accelerate_pipeline(pipe, quality="exact", parallel=ParallelConfig(**layout))
        handle = pipe.acceleration
        stages = [Noting(parallelism), Noting(parallelism), Noting(parallelism, handle.stages["decoding"])]
        handle.add_stage("first", stages[0], after="text encoding")
        handle.add_stage("second", stages[1], after="decoding")
        handle.replace_stage("decoding", stages[2])
        found = [entry.call(pipe), *(output[0] for output in handle.run_many([entry.call_kwargs() for _ in range(2)]))]
        with handle.paused():
            found.append(entry.call(pipe))
        found.append(pipe(**entry.call_kwargs(), return_trajectory=True).images)
        verified = handle.verify(**entry.call_kwargs()).passed
        handle.remove()
    differences = [float((each - stock).abs().max()) for each in found]
    return {"differences": differences, "runs": [stage.runs for stage in stages], "verified": verified}


def torn_message() -> list[str]:
    """A message of which only the beginning got through, and two after it; what each of the sender's calls raised."""
    groups: list[Group] = []
    wire = Wire((0, 1), torch.device("cpu"), groups)
    if world().rank == 0:
        wire.control.broadcast(torch.empty(4, dtype=torch.int64), 1)  # what the sender begins with
        raised = []
    else:
        given = wire.control.broadcast

        def once(tensor: torch.Tensor, source: int) -> None:
            if tensor.dtype == torch.uint8:
                raise RankFailedError("rank 0 has failed", rank=0, stage="denoising")
            given(tensor, source)

        wire.control.broadcast = once
        parcel = pack(torch.ones(3), Known(()), "something")
        raised = [
            outcome(functools.partial(wire.send, kind, parcel=each))["raised"]
            for kind, each in ((Kind.ERRAND, parcel), (Kind.FAILED, parcel), (Kind.OVER, None))
        ]
        wire.control.broadcast = given
    for group in groups:
        group.close()
    return raised
