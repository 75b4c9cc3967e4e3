"""Training data by number: scene n, batch n. The same numbers give the same data, however many processes draw them."""

import itertools
import random
from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from .captions import write_caption
from .scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene, place_on_canvas, sample_scene
from .text import build_clip_tokenizer, build_t5_tokenizer

TEXT_LENGTH = 64
CAPTION_DROPOUT = 0.1


def training_scene(number: int, *, seed: int) -> tuple[Scene, list[list[float]], int]:
    """Scene `number` of the endless training set, with its canvas: the scene, its rows and its background."""
    rng = random.Random(f"scene {seed}/{number}")
    scene = sample_scene(rng)
    return scene, *place_on_canvas(scene, rng)


class Canvases(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Item n holds scenes n·size to (n+1)·size as `render` takes them: rows (size, things, 6), background (size,)."""

    def __init__(self, *, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        scenes = [training_scene(number * self.size + index, seed=self.seed) for index in range(self.size)]
        return torch.tensor([rows for _, rows, _ in scenes]), torch.tensor([background for *_, background in scenes])


class Captions(Dataset[tuple[torch.Tensor, ...]]):
    """Item n holds `wordings` captions of each of the scenes n·size to (n+1)·size.

    The scenes' numbers (size·wordings,), their CLIP ids and their T5 ids, both (size·wordings, 64), padded, and their
    layouts (size·wordings, 28): shape, colour and size of the nine places, counted from 1, and the background.
    """

    def __init__(self, *, size: int, wordings: int, seed: int) -> None:
        self.size, self.wordings, self.seed = size, wordings, seed
        self.clip, self.t5 = build_clip_tokenizer(), build_t5_tokenizer()

    def __getitem__(self, number: int) -> tuple[torch.Tensor, ...]:
        rng = random.Random(f"captions {self.seed}/{number}")
        numbers = range(number * self.size, (number + 1) * self.size)
        scenes = [training_scene(index, seed=self.seed)[0] for index in numbers for _ in range(self.wordings)]
        chosen = torch.tensor([index for index in numbers for _ in range(self.wordings)])
        layouts = torch.tensor([_layout(scene) for scene in scenes], dtype=torch.int16)
        return chosen, *self.encode([write_caption(scene, rng).text for scene in scenes]), layouts

    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP and T5 ids of some captions, both (captions, 64), in 16 bits."""
        padding = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True, "return_tensors": "pt"}
        return self.clip(texts, **padding).input_ids.short(), self.t5(texts, **padding).input_ids.short()


def _layout(scene: Scene) -> list[int]:
    rows = {place: [0, 0, 0] for place in PLACES}
    for thing in scene.things:
        assert thing.place is not None
        assert thing.size is not None
        rows[thing.place] = [
            1 + SHAPES.index(thing.shape),
            1 + tuple(COLOURS).index(thing.colour),
            1 + tuple(SIZES).index(thing.size),
        ]
    assert scene.background is not None
    return [*itertools.chain.from_iterable(rows.values()), tuple(BACKGROUNDS).index(scene.background)]


def batches(
    dataset: Dataset[tuple[torch.Tensor, ...]],
    *,
    device: torch.device,
    workers: int,
    numbers: Iterable[int] | None = None,
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the items of these numbers (0, 1, 2, … for ever by default) in order, on `device`."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=itertools.count() if numbers is None else numbers,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
    )
    for item in loader:
        yield tuple(tensor.to(device, non_blocking=True) for tensor in item)
