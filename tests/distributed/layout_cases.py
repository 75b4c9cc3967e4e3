"""What the ranks run in `test_layouts`: a tiny pipeline on one rank, shared among several, and stock again."""

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from pipeboost import ParallelConfig, accelerate_pipeline
from pipeboost.distributed.collectives import groups as groups_module
from tests.floors import is_rounding, once
from tests.pipelines.tiny import TINY

BATCH = {
    "prompt": ["a fox", "two golden robots flying over the city at night"],
    "negative_prompt": ["blurry", "low quality and very blurry indeed"],
}


class Reference(NamedTuple):
    """Latents of one rank.

    Attributes:
        stock: of the stock pipeline.
        alone: of the accelerated one.
        other: of the same for another seed and prompt; None if nobody asks for it.
        tokens: of the image at a block.
    """

    stock: torch.Tensor
    alone: torch.Tensor
    other: torch.Tensor | None
    tokens: int


@once
def reference(
    name: str,
    /,
    *,
    quality: str = "lossless",
    cache: Any = None,
    quantize: Any = "auto",
    several: bool = False,
    **overrides: Any,
) -> Reference:
    """What ranks are compared to, made once in the process of the tests for all layouts."""
    entry, settings = TINY[name], {"output_type": "latent", **overrides}
    pipe = entry.build()
    with torch.no_grad():
        stock = entry.call(pipe, **settings)
        accelerate_pipeline(pipe, quality=quality, parallel=None, cache=cache, quantize=quantize, reuse=None)
        counts = _counted(pipe, entry.denoisers)
        alone = entry.call(pipe, **settings)
        other = entry.call(pipe, **_other(settings)) if several else None
        return Reference(stock, alone, other, counts["tokens"])


def is_as_near(difference: float, layout: Mapping[str, Any], name: str, **overrides: Any) -> bool:
    """Whether latents are those of one rank but for rounding; to the bit where ranks share nothing but branches."""
    if set(layout) == {"cfg"}:
        return difference == 0.0
    return is_rounding(difference, lambda: TINY[name].floor(output_type="latent", **overrides))


def differences(
    name: str,
    layout: Mapping[str, Any],
    expected: Reference,
    /,
    *,
    quality: str = "lossless",
    cache: Any = None,
    quantize: Any = "auto",
    several: bool = False,
    **overrides: Any,
) -> dict[str, Any]:
    """Largest differences of final latents, and what the ranks did to get there.

    Returns:
        `"shared"`: a call on these ranks to one on one rank at the same tier; if `several` calls are made, `"again"`:
        to a second one with the same seed, `"other"`: the same for another seed and prompt, `"removed"`: stock before
        to stock after; `"left"`: threads, groups and middleware there after `remove()`; `"forwards"`: how often this
        rank's denoisers ran; `"tokens"`: of the image at a block of this rank; `"cache"`: steps computed and skipped;
        `"carrier"`: what the report says carries heads and tokens.
    """
    entry = TINY[name]
    pipe = entry.build()
    settings = {"output_type": "latent", **overrides}
    threads, groups = set(threading.enumerate()), set(groups_module._groups)
    with torch.no_grad():
        parallel = ParallelConfig(**{"vae": False, **layout})
        accelerate_pipeline(pipe, quality=quality, parallel=parallel, cache=cache, quantize=quantize, reuse=None)
        counts = _counted(pipe, entry.denoisers)
        shared = entry.call(pipe, **settings)
        forwards, tokens = counts["forwards"], counts["tokens"]
        found = {"shared": _difference(shared, expected.alone)}
        if several:
            assert expected.other is not None
            found["again"] = _difference(entry.call(pipe, **settings), shared)
            found["other"] = _difference(entry.call(pipe, **_other(settings)), expected.other)
        report = pipe.acceleration.report()
        pipe.acceleration.remove()
        if several:
            found["removed"] = _difference(entry.call(pipe, **settings), expected.stock)
    return found | {
        "left": [
            # A progress bar of stock may have started tqdm's own.
            *(thread.name for thread in set(threading.enumerate()) - threads if thread.name != "tqdm_monitor"),
            *(set(groups_module._groups) - groups),
            *(name for name, module in pipe.transformer.named_modules() if "_pipeboost_chains" in vars(module)),
        ],
        "forwards": forwards,
        "tokens": tokens,
        "cache": report.cache,
        "carrier": report.ulysses,
    }


def compiled(name: str, layout: Mapping[str, Any], backend: str) -> dict[str, Any]:
    """The same with `fullgraph` regional compile; two prompts of other lengths must need no other graphs."""
    from pipeboost import CompileConfig

    entry = TINY[name]
    pipe = entry.build()
    settings = {"output_type": "latent"}
    with torch.no_grad():
        accelerate_pipeline(pipe, parallel=ParallelConfig(**layout), compile=CompileConfig(backend=backend), reuse=None)
        shared = entry.call(pipe, **settings)
        graphs = pipe.acceleration.report().compiled["transformer"]["graphs"]
        for prompt in ("a fox in the snow", "a very long tale of two golden robots that fly over a city at night"):
            entry.call(pipe, prompt=prompt, **settings)
        more = pipe.acceleration.report().compiled["transformer"]["graphs"]
        pipe.acceleration.remove()
    return {"shared": _difference(shared, entry.stock(**settings)), "graphs": graphs, "more": more - graphs}


def refused(name: str, layout: Mapping[str, Any], /, **settings: Any) -> str:
    """The sentence that refuses a layout; the pipeline must then be stock."""
    pipe = TINY[name].build()
    before = type(pipe), type(pipe.transformer)
    try:
        accelerate_pipeline(pipe, parallel=ParallelConfig(**layout), **settings)
    except Exception as error:
        assert (type(pipe), type(pipe.transformer)) == before
        assert not hasattr(pipe, "acceleration")
        return f"{type(error).__name__}: {error}"
    pipe.acceleration.remove()
    return "accepted"


def planned(name: str, **settings: Any) -> str:
    """The parallel line of the plan that `parallel="auto"` makes."""
    pipe = TINY[name].build()
    accelerate_pipeline(pipe, **settings)
    decision = pipe.acceleration.plan["parallel"]
    pipe.acceleration.remove()
    return f"{decision.choice}: {decision.why}"


def _counted(pipe: Any, denoisers: tuple[str, ...]) -> Counter[str]:
    """Counts of what this rank computes, kept by hooks inside everything of ours."""
    counts: Counter[str] = Counter()

    def forward(*_: Any) -> None:
        counts["forwards"] += 1

    def block(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        counts["tokens"] = max(counts["tokens"], states.shape[1])

    for name in denoisers:
        model = getattr(pipe, name)
        model.register_forward_pre_hook(forward)
        blocks = model.blocks if hasattr(model, "blocks") else model.transformer_blocks
        blocks[0].register_forward_pre_hook(block, with_kwargs=True)
    return counts


def _other(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings, "seed": 3, "prompt": settings.get("prompt", "two red birds")}


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def views_and_batches(layout: Mapping[str, Any]) -> dict[str, float]:
    """Two pipelines with two layouts at once, a `copy.copy` view, and batch 2 with prompts of unequal length."""
    import copy

    first, second = TINY["qwen_image"], TINY["wan21_t2v"]
    one, two = first.build(), second.build()
    batch = {"output_type": "latent", **BATCH}
    with torch.no_grad():
        accelerate_pipeline(one, parallel=None, reuse=None)
        accelerate_pipeline(two, parallel=None, reuse=None)
        alone = first.call(one, **batch), second.call(two, output_type="latent")
        accelerate_pipeline(one, parallel=ParallelConfig(**layout), reuse=None)
        swapped = {"ulysses": layout.get("ring", 1), "ring": layout.get("ulysses", 1), "cfg": layout.get("cfg", 1)}
        accelerate_pipeline(two, parallel=ParallelConfig(**swapped), reuse=None)
        assert one.acceleration._applied.team.token_ranks == two.acceleration._applied.team.token_ranks
        shared = first.call(one, **batch), second.call(two, output_type="latent")
        view = copy.copy(one)
        view.scheduler = copy.deepcopy(one.scheduler)
        viewed = first.call(view, **batch)
        one.acceleration.remove()
        still = second.call(two, output_type="latent")
        two.acceleration.remove()
    return {
        "batch": _difference(shared[0], alone[0]),
        "view": _difference(viewed, shared[0]),
        "second": _difference(shared[1], alone[1]),
        "second after the first was removed": _difference(still, shared[1]),
    }


def two_of_eight_text_tokens() -> dict[str, Any]:
    """Return the arguments of a call of HunyuanVideo with prompt embeddings of eight tokens, of which two are real."""
    generator = torch.Generator().manual_seed(5)
    config = TINY["hunyuan_video"].build().transformer.config
    return {
        "prompt": None,
        "prompt_embeds": torch.randn(1, 8, config.text_embed_dim, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, generator=generator),
        "prompt_attention_mask": torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0]]),
    }


def replicas() -> float:
    """Two replicas of two ranks each, with a prompt of their own, against one rank by itself."""
    from pipeboost.distributed import world

    entry = TINY["qwen_image"]
    pipe = entry.build()
    prompt = "a fox" if world().rank < 2 else "two golden robots"
    with torch.no_grad():
        stock = entry.call(pipe, prompt=prompt, output_type="latent")
        accelerate_pipeline(pipe, parallel=ParallelConfig(replicas=2, ulysses=2), reuse=None)
        shared = entry.call(pipe, prompt=prompt, output_type="latent")
        pipe.acceleration.remove()
    return _difference(shared, stock)


def run_twice_inside(layout: Mapping[str, Any]) -> float:
    """Each forward run twice by a layer inside the sharding of tokens, as the capture of a graph does."""
    from pipeboost.core.seams import add_middleware

    def twice(call_next: Any, owner: Any, *args: Any, **kwargs: Any) -> Any:
        call_next(*args, **kwargs)
        return call_next(*args, **kwargs)

    entry = TINY["flux_dev"]
    pipe = entry.build()
    with torch.no_grad():
        stock = entry.call(pipe, output_type="latent")
        accelerate_pipeline(pipe, parallel=ParallelConfig(**layout), reuse=None)
        add_middleware(pipe.transformer, "__call__", twice, place="component.graphs")
        return _difference(entry.call(pipe, output_type="latent"), stock)


def told(layout: Mapping[str, Any]) -> dict[str, Any]:
    """Whether this rank shows a progress bar, and what the report says of the VAE."""
    entry = TINY["flux_dev"]
    pipe = entry.build()
    del pipe._progress_bar_config
    accelerate_pipeline(pipe, parallel=ParallelConfig(**layout), reuse=None)
    with torch.no_grad():
        entry.call(pipe)
    found = {"bar": pipe.progress_bar(total=1).disable is not True, "vae": pipe.acceleration.report().vae}
    pipe.acceleration.remove()
    return {**found, "left": "_progress_bar_config" in vars(pipe) and "disable" in pipe._progress_bar_config}


def drifting() -> str:
    """What a call says whose second rank has come to other latents in the first step."""
    from pipeboost.core.seams import add_middleware
    from pipeboost.distributed import world
    from pipeboost.distributed.agreement.arguments import DisagreementError

    def drift(call_next: Any, owner: Any, *args: Any, **kwargs: Any) -> Any:
        latents, *rest = call_next(*args, **kwargs)
        return (latents + 0.5 * world().rank, *rest)

    entry = TINY["qwen_image"]
    pipe = entry.build()
    accelerate_pipeline(pipe, parallel=ParallelConfig(cfg=2), reuse=None)
    add_middleware(pipe.scheduler, "step", drift, place="component.stages")
    try:
        with torch.no_grad():
            entry.call(pipe, output_type="latent")
    except DisagreementError as error:
        return str(error)
    finally:
        pipe.acceleration.remove()
    return ""
