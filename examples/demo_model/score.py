"""Marks pictures against what their captions say, and prints the share drawn right.

python -m examples.demo_model.score --captions 200
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path

import torch
from diffusers import FluxPipeline
from PIL import Image

from .captions import Prompt
from .prompts import WEIGHTS, held_out_scenes
from .reading import Picture, read_scene
from .scenes import PIXELS, Scene, Thing


def is_right(image: Picture, scene: Scene) -> bool:
    """Whether the picture shows this scene and nothing else; what the scene leaves open (None) may be anything."""
    seen = read_scene(image).scene
    if seen is None or len(seen.things) != len(scene.things):
        return False
    if scene.background not in (None, seen.background):
        return False
    return any(
        all(_fits(thing, wanted) for thing, wanted in zip(order, scene.things, strict=True))
        for order in permutations(seen.things)
    )


def score_images(images: Sequence[Picture], scenes: Sequence[Scene]) -> float:
    """Share of the pictures that are right. Raises ValueError unless there are as many scenes as pictures."""
    if len(images) != len(scenes) or not images:
        raise ValueError(f"{len(images)} pictures do not match {len(scenes)} scenes; give one scene for each picture")
    return sum(map(is_right, images, scenes)) / len(images)


def draw(
    pipe: FluxPipeline, prompts: Sequence[Prompt], *, batch_size: int = 20, **call: int | float
) -> Iterator[Image.Image]:
    """Draw every prompt at 128×128, the n-th with seed n, so that the batch size changes nothing but rounding.

    `call` goes to the pipeline as it is; a `true_cfg_scale` above 1 is guided away from the empty prompt.
    """
    guided = float(call.get("true_cfg_scale", 1.0)) > 1
    for start in range(0, len(prompts), batch_size):
        texts = [prompt.text for prompt in prompts[start : start + batch_size]]
        seeds = [torch.Generator().manual_seed(start + index) for index in range(len(texts))]
        negative = {"negative_prompt": [""] * len(texts)} if guided else {}
        yield from pipe(texts, height=PIXELS, width=PIXELS, generator=seeds, **negative, **call).images


def contact_sheet(
    images: Sequence[Image.Image], *, columns: int = 10, right: Sequence[bool] | None = None
) -> Image.Image:
    """All pictures on one sheet, the wrong ones (where `right` is given) with a dark frame."""
    edge = PIXELS + 8
    sheet = Image.new("RGB", (columns * edge, math.ceil(len(images) / columns) * edge), "white")
    for index, image in enumerate(images):
        left, top = index % columns * edge, index // columns * edge
        if right is not None and not right[index]:
            sheet.paste((60, 0, 0), (left, top, left + edge, top + edge))
        sheet.paste(image, (left + 4, top + 4))
    return sheet


def main() -> None:
    """Draw held-out captions with the stock pipeline and score them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--max-sequence-length", type=int, default=64)
    parser.add_argument("--true-cfg-scale", type=float, default=1.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--sheet", type=Path, help="write a contact sheet here, wrong pictures framed")
    settings = parser.parse_args()
    pipe = FluxPipeline.from_pretrained(str(settings.weights), torch_dtype=getattr(torch, settings.dtype))
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    prompts = held_out_scenes(settings.captions)
    images = list(
        draw(
            pipe,
            prompts,
            batch_size=settings.batch_size,
            num_inference_steps=settings.steps,
            max_sequence_length=settings.max_sequence_length,
            true_cfg_scale=settings.true_cfg_scale,
        )
    )
    right = [is_right(image, prompt.scene) for image, prompt in zip(images, prompts, strict=True)]
    for prompt, image, good in zip(prompts, images, right, strict=True):
        if not good:
            print(f"wrong: {prompt.text!r}\n       {read_scene(image)}")
    if settings.sheet is not None:
        contact_sheet(images, right=right).save(settings.sheet)
    print(
        f"{sum(right)} of {len(right)} captions drawn right: {sum(right) / len(right):.3f} ({settings.steps} steps, "
        f"text length {settings.max_sequence_length}, true CFG {settings.true_cfg_scale}, {settings.dtype})"
    )


def _fits(thing: Thing, wanted: Thing) -> bool:
    return (
        (thing.shape, thing.colour) == (wanted.shape, wanted.colour)
        and wanted.place in (None, thing.place)
        and wanted.size in (None, thing.size)
    )


if __name__ == "__main__":
    main()
