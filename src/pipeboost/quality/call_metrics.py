"""Metrics of whole calls by name, each with what it asks for and what it needs on this machine.

Nothing is downloaded: where a package or its weights are missing, making the metric raises one sentence that says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from pipeboost.core.errors import MissingPackageError, one_line
from pipeboost.demo_model.captions import parse_caption
from pipeboost.demo_model.scenes import PIXELS
from pipeboost.quality.metrics import outputs_on_host, psnr
from pipeboost.quality.pictures import pictures_in, spread

CLIP_MODEL = "openai/clip-vit-large-patch14"
"""The model of CLIP scores, looked for in the cache of Hugging Face."""
_CLIP_FRAMES = 4


@dataclass(frozen=True)
class Made:
    """What one call made, on the host.

    Attributes:
        outputs: output → all its numbers in a row.
        pictures: its pictures and films, uint8 `(frames, height, width, 3)`.
        prompts: the text of each of them; empty where the call gave no texts.
    """

    outputs: Mapping[str, torch.Tensor]
    pictures: list[np.ndarray]
    prompts: list[str]

    @classmethod
    def of(cls, result: Any, call: Mapping[str, Any]) -> Made:
        """Read what `pipe(**call)` returned."""
        pictures = [] if call.get("output_type") == "latent" else pictures_in(result)
        texts = call.get("prompt")
        texts = [texts] if isinstance(texts, str) else list(texts or ())
        # Several pictures of one prompt follow each other.
        prompts = [texts[index * len(texts) // len(pictures)] for index in range(len(pictures))] if texts else []
        return cls(outputs_on_host(result), pictures, prompts)


Measure = Callable[[Made, Made], float]
"""Takes what a call made and what stock made of it."""


@dataclass(frozen=True)
class Metric:
    """One figure of a whole call.

    Attributes:
        make: return the function; raises MissingPackageError where a package or weights are not on this machine.
        applies: whether it can judge what a call made.
        asks: for what, in words.
        higher: whether more is better; None where neither is.
        alone: whether it judges each result by itself; the others compare it with stock's.
        form: how its numbers are written.
    """

    make: Callable[[], Measure]
    applies: Callable[[Made], bool]
    asks: str
    higher: bool | None
    alone: bool = False
    form: str = ".4f"


def worst_psnr(ours: Made, stock: Made) -> float:
    """Return the PSNR to stock of the worst output, in dB."""
    return min(psnr(ours.outputs[name].numpy(), row.numpy()) for name, row in stock.outputs.items())


def flicker(ours: Made, stock: Made) -> float:
    """Return the mean absolute difference of successive frames, of the range of a pixel; the mean over the films.

    It grows with motion too: read it beside stock's. One minus this is the temporal flickering of VBench.
    """
    films = (film for film in ours.pictures if len(film) > 1)
    return fmean(
        fmean(float(np.abs(b.astype(np.int16) - a).mean()) for a, b in itertools.pairwise(film)) / 255 for film in films
    )


def _make_ssim() -> Measure:
    """Return the structural similarity to stock with Wang et al.'s window; mean over frames, worst over pictures."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise MissingPackageError("ssim needs scikit-image: pip install scikit-image") from error
    settings = {"channel_axis": -1, "data_range": 255, "gaussian_weights": True, "use_sample_covariance": False}
    return _worst_of_frames(lambda ours, stock: float(structural_similarity(ours, stock, **settings)), min)


def _make_lpips() -> Measure:
    """Return the LPIPS distance to stock by AlexNet's features; mean over frames, worst over pictures."""
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
        from torchvision.models import AlexNet_Weights
    except (ImportError, RuntimeError) as error:  # a torchvision that was built for another torch raises the latter
        raise MissingPackageError(
            f"lpips needs torchmetrics and torchvision: pip install torchmetrics torchvision ({one_line(error)})"
        ) from error
    url = AlexNet_Weights.IMAGENET1K_V1.url
    weights = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not weights.is_file():
        raise MissingPackageError(f"lpips needs the weights of AlexNet at {weights}, which are those of {url}")
    distance = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).eval()

    @torch.no_grad()
    def compare(ours: np.ndarray, stock: np.ndarray) -> float:
        tensors = (torch.from_numpy(each.copy()).permute(2, 0, 1)[None] / 255 for each in (ours, stock))
        return float(distance(*tensors))

    return _worst_of_frames(compare, max)


def _make_clip() -> Measure:
    """Return the CLIP score, 100 times the cosine of picture and prompt, at least 0; mean of all, of films 4 frames."""
    from transformers import CLIPModel

    try:
        model = CLIPModel.from_pretrained(CLIP_MODEL, local_files_only=True).eval()
        from transformers import CLIPProcessor  # which has something to say when it is imported

        processor = CLIPProcessor.from_pretrained(CLIP_MODEL, local_files_only=True)
    except OSError as error:
        raise MissingPackageError(f"clip needs {CLIP_MODEL} on this machine: hf download {CLIP_MODEL}") from error

    @torch.no_grad()
    def score(frame: np.ndarray, prompt: str) -> float:
        inputs = processor(text=[prompt], images=[frame], return_tensors="pt", padding=True, truncation=True)
        found = model(**inputs)
        return max(0.0, 100 * float((found.image_embeds * found.text_embeds).sum()))

    return lambda ours, stock: fmean(
        score(frame, prompt)
        for film, prompt in zip(ours.pictures, ours.prompts, strict=True)
        for frame in spread(film, _CLIP_FRAMES)
    )


def _make_drawn() -> Measure:
    """Return the share of the demo model's pictures that show just what their captions say."""
    try:
        from pipeboost.demo_model.score import score_images
    except ImportError as error:
        raise MissingPackageError("drawn needs scikit-image and scipy: pip install scikit-image scipy") from error
    return lambda ours, stock: float(
        score_images([picture[0] for picture in ours.pictures], [parse_caption(text) for text in ours.prompts])
    )


def _worst_of_frames(compare: Callable[[np.ndarray, np.ndarray], float], worst: Callable[..., float]) -> Measure:
    return lambda ours, stock: worst(
        fmean(compare(a, b) for a, b in zip(*films, strict=True))
        for films in zip(ours.pictures, stock.pictures, strict=True)
    )


def _is_of_demo_model(made: Made) -> bool:
    """Whether these are pictures of the demo model's size, by captions of its grammar."""
    if not made.prompts or any(picture.shape[:3] != (1, PIXELS, PIXELS) for picture in made.pictures):
        return False
    try:
        return all(parse_caption(text) for text in made.prompts)
    except ValueError:
        return False


METRICS = {
    "psnr": Metric(lambda: worst_psnr, lambda made: bool(made.outputs), "outputs", True, form=".1f"),
    "ssim": Metric(_make_ssim, lambda made: bool(made.pictures), "pictures", True),
    "lpips": Metric(_make_lpips, lambda made: bool(made.pictures), "pictures", False),
    "flicker": Metric(
        lambda: flicker, lambda made: any(len(film) > 1 for film in made.pictures), "films", None, alone=True
    ),
    "clip": Metric(
        _make_clip, lambda made: bool(made.prompts), "pictures with their prompts", True, alone=True, form=".2f"
    ),
    "drawn": Metric(
        _make_drawn, _is_of_demo_model, "pictures of the demo model with their captions", True, alone=True, form=".3f"
    ),
}


def metrics_for(made: Made) -> tuple[dict[str, Measure], dict[str, str]]:
    """Return the metrics that can judge what a call made, and why those that could but for what is missing cannot."""
    found, missing = {}, {}
    for name, metric in METRICS.items():
        if metric.applies(made):
            try:
                found[name] = metric.make()
            except MissingPackageError as error:
                missing[name] = str(error)
    return found, missing
