"""What the ranks run in `test_stage_parallelism`."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from pipeboost import ParallelConfig, accelerate_pipeline
from pipeboost.contract.call import Call, open_call
from pipeboost.contract.registry import family_of
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.ledger import Ledger
from pipeboost.distributed import Mesh
from pipeboost.stages import Checks, Stage, StageParallelism
from pipeboost.stages.composition import STAGES, Composition
from pipeboost.stages.instrument import instrument_component, instrumented_components
from pipeboost.stages.spans import RECORDER, Recorder
from pipeboost.stages.stage_middleware import run_user_stage
from tests.pipelines.tiny import TINY

CPU = torch.device("cpu")
Degrees = dict[str, int]
MAIN = StageParallelism.MAIN_RANK


@contextlib.contextmanager
def meshed_call(pipe: Any, degrees: Degrees, arguments: dict[str, Any] | None = None) -> Iterator[Call]:
    """A call of a watched pipeline on a mesh of ranks."""
    mesh, ledger, family = Mesh(degrees, device=CPU), Ledger(), family_of(pipe)
    try:
        for path, obj in instrumented_components(pipe, family).items():
            instrument_component(path, obj, family, ledger)
        with open_call(pipe, owner=None, arguments=arguments, device=CPU, mesh=mesh) as call:
            call[RECORDER], call[STAGES] = Recorder(call), Composition(family, pipe).for_call(mesh)
            yield call
    finally:
        ledger.undo()
        mesh.close()


@contextlib.contextmanager
def recomposed(call: Call) -> Iterator[Composition]:
    """Yield the stages, for a change that the call is to see."""
    composition = call[STAGES].composition
    yield composition
    call[STAGES] = composition.for_call(call.mesh)


@functools.cache
def stock(name: str) -> Any:
    """What the stock pipeline gives."""
    return TINY[name].call(TINY[name].build())


def shareable(name: str) -> list[str]:
    """The stages of a pipeline whose work is all in what they return."""
    pipe, found = TINY[name].build(), []
    for stage in Composition(family_of(pipe), pipe):
        with contextlib.suppress(UnsupportedError):
            stage.parallelism = MAIN
            found.append(stage.name)
    return found


def whole_call(name: str, degrees: Degrees, parallelisms: dict[str, StageParallelism]) -> dict[str, Any]:
    """A whole call whose stages are shared, how far it is from stock, and which encoders and VAEs have worked here."""
    entry = TINY[name]
    expected = stock(name)
    pipe, worked = entry.build(), set()
    for component in ("text_encoder", "text_encoder_2", "image_encoder"):
        module = getattr(pipe, component, None)
        if isinstance(module, torch.nn.Module):
            module.register_forward_pre_hook(lambda *_, component=component: worked.add(component))
    pipe.vae.decoder.register_forward_pre_hook(lambda *_: worked.add("decoder"))
    kwargs = entry.call_kwargs()
    with meshed_call(pipe, degrees, kwargs) as call:
        with recomposed(call) as composition:
            for stage, parallelism in parallelisms.items():
                composition[stage].parallelism = parallelism
        result = pipe(**kwargs)[0]
    return {
        "difference": float((torch.as_tensor(result) - expected).abs().max()),
        "worked": worked,
        "generator": kwargs["generator"].get_state(),
        "global": torch.get_rng_state(),
    }


def encoded(name: str, degrees: Degrees) -> dict[str, Any]:
    """What a door returns, on each rank and in stock, in words that tell its structure."""
    entry = TINY[name]
    pipe = entry.build()
    with torch.no_grad():
        expected = entry.build().encode_prompt("a cat", device=CPU)
        with meshed_call(pipe, degrees):
            found = pipe.encode_prompt("a cat", device=CPU)
    equal = [one is other or torch.equal(one, other) for one, other in zip(found, expected, strict=True)]
    return {"facts": _facts(found), "of stock": _facts(expected), "equal": equal}


def _facts(values: Any) -> list[Any]:
    each = [v if v is None else (str(v.dtype), tuple(v.shape), v.stride(), v.requires_grad) for v in values]
    return [type(values).__name__, *each]


class Drawing(Stage):
    """Notes that it ran, draws from everything, changes a value in place and gives back something of every kind."""

    def __init__(self, parallelism: StageParallelism) -> None:
        self.parallelism = parallelism
        self.runs = 0

    def run(self, values: dict[str, Any]) -> dict[str, Any]:
        self.runs += 1
        own = self.arguments["own"]
        own.add_(torch.rand(2, generator=self.arguments["generator"]) + torch.rand(2))
        return values | {
            "latents": values["latents"] + own[0],
            "flags": torch.tensor([True, False, True]),
            "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
            "empty": torch.zeros(0, 3),
            "plain": [{"a": (1, "x", None)}, own],
            "run": self.runs,
        }


def user_stage(parallelism: StageParallelism, degrees: Degrees, times: int = 1) -> dict[str, Any]:
    """The results of a stage of the user's that ran `times` times in a call, and how often it ran here."""
    pipe = TINY["flux_dev"].build()
    torch.manual_seed(5)
    own, generator = torch.zeros(2), torch.Generator().manual_seed(3)
    stage = Drawing(parallelism)
    with meshed_call(pipe, degrees, {"generator": generator, "own": own}) as call:
        with recomposed(call) as composition:
            composition.add("drawing", stage, after="decoding")
        for _ in range(times):
            values, _ = run_user_stage(call, stage, {"latents": torch.ones(1, 2), "own": own})
        assert call.mesh is not None
    values["plain"] = [values["plain"][0], values["plain"][1].tolist()]
    return {
        "runs": stage.runs,
        "values": values,
        "own": own,
        "stride": values["half"].stride(),
        "next": [torch.rand(1, generator=generator).item(), torch.rand(1).item()],
    }


class Odd(Exception):  # noqa: N818 - a name of the user's
    """An exception that takes what it likes."""

    def __init__(self, *, words: str) -> None:
        super().__init__(words)


class Failing(Stage):
    """Fails as asked."""

    parallelism = MAIN

    def __init__(self, how: str) -> None:
        self.how = how

    def run(self, values: dict[str, Any]) -> dict[str, Any]:
        if self.how == "raises":
            raise ZeroDivisionError("on purpose")
        if self.how == "raises what has no pickle":
            raise Odd(words="on purpose")
        if self.how == "returns what has no pickle":
            return values | {"images": lambda: None}
        return values

    def verify_output(self, values: Any) -> list[Any]:
        checks = Checks(values)
        checks.require("images", self.how != "fails its check", "better")
        return checks.failed


def failing(how: str, degrees: Degrees) -> list[str]:
    """The errors of a stage that fails on the main rank, and what a call after it gives."""
    entry = TINY["flux_dev"]
    pipe, kwargs = entry.build(), entry.call_kwargs()
    told = []
    try:
        with meshed_call(pipe, degrees, kwargs) as call:
            with recomposed(call) as composition:
                composition.add("failing", Failing(how), after="postprocessing")
            pipe(**kwargs)
    except Exception as error:
        told += [type(error).__name__, str(error)]
    kwargs = entry.call_kwargs()
    with meshed_call(pipe, degrees, kwargs):
        told.append(str(torch.equal(pipe(**kwargs)[0], stock("flux_dev"))))
    return told


class InPlaceOf(Stage):
    """Does the stock work of the stage it replaces, or its own."""

    def __init__(self, built_in: Stage, parallelism: StageParallelism, *, own_work: bool) -> None:
        self.built_in, self.parallelism, self.own_work, self.runs = built_in, parallelism, own_work, 0

    def run(self, values: dict[str, Any]) -> dict[str, Any]:
        self.runs += 1
        if self.own_work:
            return {"sample": torch.zeros(1, 3, 64, 96)}
        return self.built_in.run(values)


def replaced(stage: str, parallelism: StageParallelism, *, own_work: bool, name: str = "flux_dev") -> tuple[float, int]:
    """How far a call with a replaced stage is from stock, and how often the replacement ran here."""
    entry = TINY[name]
    pipe, kwargs = entry.build(), entry.call_kwargs()
    with meshed_call(pipe, {"ulysses": 2}, kwargs) as call:
        with recomposed(call) as composition:
            mine = InPlaceOf(composition[stage], parallelism, own_work=own_work)
            composition.replace(stage, mine)
        result = pipe(**kwargs)[0]
    return float((result - stock(name)).abs().max()), mine.runs


class Together(Stage):
    """Does nothing, on all ranks together."""

    parallelism = StageParallelism.TENSOR_PARALLEL


def refused(degrees: Degrees) -> str:
    """The error of a stage that these ranks cannot share."""
    entry = TINY["flux_dev"]
    pipe, kwargs = entry.build(), entry.call_kwargs()
    try:
        with meshed_call(pipe, degrees, kwargs) as call:
            with recomposed(call) as composition:
                composition.add("together", Together(), after="decoding")
            pipe(**kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it ran"


def accelerated(name: str, layout: Degrees) -> dict[str, Any]:
    """Two calls of an accelerated pipeline that reuses prompts: how far from stock, and what was encoded here."""
    entry = TINY[name]
    pipe = entry.build()
    settings = {"output_type": "latent"}
    encodings: list[int] = []
    with torch.no_grad():
        expected = entry.call(pipe, **settings)
        handle = pipe.text_encoder.register_forward_pre_hook(lambda *_: encodings.append(1))
        accelerate_pipeline(pipe, parallel=ParallelConfig(**layout), quality="exact")
        found, counts = [], []
        for _ in range(2):
            found.append(float((entry.call(pipe, **settings) - expected).abs().max()))
            counts.append(pipe.acceleration.report().reuse)
        pipe.acceleration.remove()
        handle.remove()
        after = entry.call(pipe, **settings)
    return {
        "difference": found,
        "encodings": len(encodings),
        "reuse": counts,
        "removed": float((after - expected).abs().max()),
    }
