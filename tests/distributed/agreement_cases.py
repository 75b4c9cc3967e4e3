"""What the ranks run in `test_agreement`."""

import contextlib
import inspect
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchLCMScheduler
from PIL import Image

from pipeboost import ParallelConfig, accelerate_pipeline
from pipeboost.distributed import Mesh
from pipeboost.distributed.agreement.arguments import DisagreementError, agreed_arguments, checked_latents
from tests.pipelines.tiny import TINY

CPU = torch.device("cpu")


class Custom:
    """An argument of a class of the user's own."""

    def __init__(self, value: Any) -> None:
        self.value = value


def script(
    self: Any,
    image: Any,
    prompt: Any = None,
    height: int = 480,
    sigmas: Any = None,
    generator: Any = None,
    latents: Any = None,
    callback: Any = None,
    **kwargs: Any,
) -> None:
    """Stands for a pipeline's `__call__`."""


def kept_callback(*_: Any) -> None:
    """A callback of the user's."""


@contextlib.contextmanager
def meshed(degrees: dict[str, int]) -> Iterator[Mesh]:
    mesh = Mesh(degrees, device=CPU)
    try:
        yield mesh
    finally:
        mesh.close()


def arguments_of(case: str, rank: int) -> dict[str, Any]:
    """What the rank was called with."""
    return CASES[case](rank)


def _picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8))


def _everything(rank: int) -> dict[str, Any]:
    """One of everything that a stock call takes, made anew on each rank."""
    return {
        "image": [_picture(0), _picture(1)],
        "prompt": ["a cat", "a dog"],
        "height": np.int64(64),
        "sigmas": np.linspace(1, 0.5, 3),
        "generator": [torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)],
        "latents": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
        "callback": lambda *_: rank,
        "attention_kwargs": {"scale": 0.8, "states": (torch.ones(2, dtype=torch.bool), None), "ids": {3, 1, 2}},
        "custom": Custom({"a": 1}),
        "objects": np.array([{"x": 1}, None], dtype=object),
        "stream": iter([1, 2]),
    }


CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    "everything": _everything,
    "only the first": lambda rank: (
        {name: value for name, value in _everything(rank).items() if name not in ("callback", "stream")}
        if rank == 0
        else {}
    ),
    "prompts": lambda rank: {"image": None, "prompt": f"picture {rank}"},
    "sizes": lambda rank: {"image": None, "height": 64 + 16 * rank},
    "a size that is the default": lambda rank: {"image": None, "height": 480 if rank else 64},
    "a prompt on the last": lambda rank: {"image": None, "prompt": "a cat" if rank else None},
    "a prompt on all": lambda rank: {"image": None, "prompt": "a cat"},
    "another picture": lambda rank: {"image": _picture(rank)},
    "another tensor": lambda rank: {"image": None, "latents": torch.full((2, 2), float(rank))},
    "another custom": lambda rank: {"image": None, "custom": Custom({"a": rank})},
    "a callback on the first": lambda rank: {"image": None, "callback": None if rank else kept_callback},
    "a generator on the last": lambda rank: {"image": None, "generator": torch.Generator() if rank else None},
    "an unpicklable": lambda rank: {"image": None if rank else {"lock": threading.Lock()}},
    "an unexpected name": lambda rank: {"image": None} | ({} if rank else {"scale": 0.5}),
    "seeds": lambda rank: {"image": None, "generator": torch.Generator().manual_seed(rank)},
    "lists of seeds": lambda rank: {
        "image": None,
        "generator": [torch.Generator().manual_seed(rank + place) for place in range(2 - rank)],
    },
    "one generator twice": lambda rank: {
        "image": None,
        "generator": None if rank else [torch.Generator().manual_seed(7)] * 2,
    },
}


def agree(case: str, degrees: dict[str, int] | None = None) -> Any:
    """The arguments a rank goes on with, or the error it raised."""
    with meshed(degrees or {"ulysses": 2}) as mesh:
        bound = inspect.signature(script).bind_partial("the pipeline", **arguments_of(case, mesh.control.rank))
        try:
            agreed = agreed_arguments(mesh, bound, CPU)
        except Exception as error:
            return type(error).__name__, str(error)
        found = {**agreed.arguments, **agreed.arguments.get("kwargs", {})}
        found["callback"] = found.get("callback") is not None
        for name in ("self", "kwargs", "stream"):
            found.pop(name, None)
        drawn = found.pop("generator", None)
        if drawn is not None:
            found["drawn"] = [torch.rand(2, generator=each) for each in (drawn if isinstance(drawn, list) else [drawn])]
            kept = bound.arguments.get("generator")
            found["kept generator"] = drawn is kept
        return found


def random_state(case: str) -> list[Any]:
    """What each source of random numbers gives after the agreement; the ranks come with states of their own."""
    with meshed({"ulysses": 2}) as mesh:
        torch.manual_seed(mesh.control.rank)
        random.seed(mesh.control.rank)
        np.random.seed(mesh.control.rank)
        bound = inspect.signature(script).bind_partial("the pipeline", **arguments_of(case, mesh.control.rank))
        agreed_arguments(mesh, bound, CPU)
        return [torch.rand(2).tolist(), random.random(), np.random.rand()]


def raise_then_agree() -> Any:
    """What a call after one that was refused gives."""
    agree("prompts")
    return agree("everything")


def of_replicas(case: str) -> Any:
    """Ranks that work on samples of their own, two and two."""
    with meshed({"replicas": 2, "ulysses": 2}) as mesh:
        replica = mesh.index("replicas")
        bound = inspect.signature(script).bind_partial("the pipeline", **arguments_of(case, replica))
        return agreed_arguments(mesh, bound, CPU).arguments["prompt"]


def latents(kind: str, degrees: dict[str, int]) -> str | None:
    """The error of a check of latents, or None."""
    with meshed(degrees) as mesh:
        own = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        last = mesh.control.rank == mesh.control.size - 1
        if kind == "rounding" and last:
            own = own * (1 + 1e-6)
        elif kind == "one token" and last:
            own[0, :, 3, 5] = 3.0
        elif kind == "another sample" and last:
            own = torch.randn(own.shape, generator=torch.Generator().manual_seed(1))
        elif kind == "another shape" and last:
            own = own[..., :-1]
        elif kind == "one nan" and last:
            own[0, 0, 0, 0] = torch.nan
        elif kind == "all nan":
            own[:] = torch.nan
        elif kind == "zeros":
            own[:] = 0.0
        try:
            checked_latents(mesh, own)
        except Exception as error:
            return str(error)
        return None


def accelerated(name: str, layout: dict[str, int], kind: str) -> dict[str, Any]:
    """A pipeline that is called by ranks with what `kind` gives each; on one rank, with what the first one has."""
    entry = TINY[name]
    rank = torch.distributed.get_rank()

    def build() -> Any:
        pipe = entry.build()
        if kind == "a scheduler that draws":
            pipe.scheduler = FlowMatchLCMScheduler.from_config(pipe.scheduler.config)
        return pipe

    def call(pipe: Any, rank: int, last: int) -> torch.Tensor:
        kwargs = entry.call_kwargs(output_type="latent")
        if kind == "nothing on the others":
            kwargs = kwargs if rank == 0 else {"output_type": "latent"}
        elif kind == "no generator":
            del kwargs["generator"]
        elif kind == "other seeds":
            kwargs["generator"].manual_seed(rank)
        elif kind == "another prompt on the last" and rank == last:
            kwargs["prompt"] = "two golden robots"
        torch.manual_seed(rank)
        return pipe(**kwargs)[0]

    with torch.no_grad():
        alone = call(build(), 0, -1)
        pipe = accelerate_pipeline(build(), parallel=ParallelConfig(**layout), quality="exact", reuse=None)
        try:
            shared, error = call(pipe, rank, torch.distributed.get_world_size() - 1), ""
        except DisagreementError as caught:
            shared, error = None, str(caught)
        again = entry.call(pipe, output_type="latent")
        pipe.acceleration.remove()
    return {
        "difference": None if shared is None else float((shared - alone).abs().max()),
        "error": error,
        "again": again,
    }
