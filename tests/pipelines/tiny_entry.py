"""What one tiny pipeline of the registry is: how to build it, how to call it, what its denoisers receive."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from tests.floors import floor_of, once
from tests.pipelines.tiny_parts import seeded

PROMPT = "a small red fox walking in the snow"
OTHER_PROMPT = "a photo of two golden robots flying over the xylophone city at night, soft light"
NEGATIVE_PROMPT = "low quality, blurry"

# Height and width differ, so that exchanging them shows; both are multiples of 16.
HEIGHT, WIDTH, FRAMES = 64, 96, 5
HEADS, HEAD_DIM = 4, 16
LATENT_CHANNELS = 4
TRUE_CFG = {"negative_prompt": NEGATIVE_PROMPT, "true_cfg_scale": 4.0}


@dataclass(frozen=True, kw_only=True)
class TinyPipeline:
    """One variant of one pipeline class.

    Attributes:
        name: its key in the registry.
        make: builds the pipeline; `build` calls it with a fixed seed.
        inputs: gives the variant's own call arguments, freshly made.
        family: the model family's name, or None for a model that pipeboost has no family for.
        denoisers: the components that the denoising loop calls.
        branches: how often the script calls its denoiser in one step (two with sequential guidance).
        steps: `num_inference_steps` of a call that names none.
    """

    name: str
    make: Callable[[], DiffusionPipeline]
    inputs: Callable[[], Mapping[str, Any]]
    family: str | None = None
    denoisers: tuple[str, ...] = ("transformer",)
    branches: int = 1
    steps: int = 2

    def build(self) -> DiffusionPipeline:
        """A fresh fp32 pipeline on the CPU, every time with the same weights and with its progress bar off."""
        with seeded(0):
            pipe = self.make()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call_kwargs(self, *, seed: int = 0, steps: int | None = None, **overrides: Any) -> dict[str, Any]:
        """Arguments of one call with a fresh generator; `overrides` replace or add arguments."""
        kwargs = {
            "prompt": PROMPT,
            "num_inference_steps": steps or self.steps,
            "generator": torch.Generator("cpu").manual_seed(seed),
            "output_type": "pt",
        }
        return {**kwargs, **self.inputs(), **overrides}

    def call(
        self, pipe: DiffusionPipeline, *, seed: int = 0, steps: int | None = None, **overrides: Any
    ) -> torch.Tensor:
        """The output of one call: `(batch, channels, height, width)`, with a frame axis after batch for a video."""
        output = pipe(**self.call_kwargs(seed=seed, steps=steps, **overrides))[0]
        return output if isinstance(output, torch.Tensor) else torch.as_tensor(np.asarray(output))

    def __reduce__(self) -> tuple[Callable[[str], "TinyPipeline"], tuple[str]]:
        return _named, (self.name,)

    def stock(self, **arguments: Any) -> torch.Tensor:
        """The output of `call` by a fresh stock pipeline, made once for each set of arguments; not to be written to."""
        return _stock(self, **arguments)

    def floor(self, **arguments: Any) -> float:
        """How far the order of sums alone moves that output, by which `is_rounding` judges."""
        return _floor(self, **arguments)

    def forward_inputs(
        self, pipe: DiffusionPipeline, *, denoiser: str = "transformer", seed: int = 0, **overrides: Any
    ) -> dict[str, Any]:
        """Keyword arguments of the first call that a generation by `pipe` makes to `pipe.<denoiser>`, where it ends.

        They are copies: `getattr(pipe, denoiser)(**copy.deepcopy(inputs))` can be repeated at will, and the copy is
        needed only where the arguments hold a dictionary, from which Diffusers pops.
        """
        calls: list[dict[str, Any]] = []
        module = getattr(pipe, denoiser)

        def capture(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(copy.deepcopy(inspect.signature(module.forward).bind(*args, **kwargs).arguments))
            raise _Captured

        hook = module.register_forward_pre_hook(capture, with_kwargs=True)
        try:
            self.call(pipe, seed=seed, **{"output_type": "latent", **overrides})
        except _Captured:
            pass
        finally:
            hook.remove()
        if not calls:
            raise ValueError(f"{self.name} made no call to {denoiser!r}; it calls {self.denoisers}")
        return calls[0]


class _Captured(Exception):  # noqa: N818 - no error: what is left of the call is of no interest
    pass


def _named(name: str) -> TinyPipeline:
    from tests.pipelines.tiny import TINY

    return TINY[name]


@once
def _stock(entry: TinyPipeline, /, **arguments: Any) -> torch.Tensor:
    return entry.call(entry.build(), **arguments)


@once
def _floor(entry: TinyPipeline, /, **arguments: Any) -> float:
    pipe = entry.build()
    models = [getattr(pipe, name) for name in entry.denoisers]
    models += [pipe.vae] if arguments.get("output_type") != "latent" else []
    return floor_of(lambda: entry.call(pipe, **arguments), *models, stock=entry.stock(**arguments))


def picture(*, seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A reference picture: a smooth gradient with noise on it."""
    noise = np.random.default_rng(seed).normal(0, 24, (height, width, 3))
    rows, columns = np.mgrid[0:height, 0:width]
    gradient = np.stack([rows * 255 / height, columns * 255 / width, np.full((height, width), 128)], axis=-1)
    return Image.fromarray((gradient + noise).clip(0, 255).astype(np.uint8))


def mask() -> Image.Image:
    """A mask picture whose right half is to be painted anew."""
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    pixels[:, WIDTH // 2 :] = 255
    return Image.fromarray(pixels)
