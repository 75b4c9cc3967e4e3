"""Endless training batches: scenes and their token ids, drawn by worker processes from a fixed seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .captions import write_caption
from .scenes import place_on_canvas, sample_scene
from .text import build_clip_tokenizer, build_t5_tokenizer

TEXT_LENGTH = 64
CAPTION_DROPOUT = 0.1


@dataclass
class Batch:
    """`rows` and `background` as `render` takes them; `clip_ids` and `t5_ids` are (batch, 64), padded."""

    rows: torch.Tensor
    background: torch.Tensor
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))


class SceneBatches(IterableDataset[Batch]):
    """Every worker draws from its own generator; the loader takes them in turn, so the order is fixed."""

    def __init__(self, *, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = random.Random(f"{self.seed}/{worker.id if worker else 0}")
        clip, t5 = build_clip_tokenizer(), build_t5_tokenizer()
        padding = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True, "return_tensors": "pt"}
        while True:
            scenes = [sample_scene(rng) for _ in range(self.batch_size)]
            texts = ["" if rng.random() < CAPTION_DROPOUT else write_caption(scene, rng).text for scene in scenes]
            rows, backgrounds = zip(*(place_on_canvas(scene, rng) for scene in scenes), strict=True)
            yield Batch(
                torch.tensor(rows),
                torch.tensor(backgrounds),
                clip(texts, **padding).input_ids,
                t5(texts, **padding).input_ids,
            )


def batches(*, batch_size: int, seed: int, workers: int, device: torch.device) -> Iterator[Batch]:
    """Yield batches on `device` for ever."""
    loader = DataLoader(
        SceneBatches(batch_size=batch_size, seed=seed),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        yield batch.to(device)
