"""Metrics of pictures and films: what they are of known pictures, and the sentence where something is missing."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from pipeboost.core.errors import MissingPackageError
from pipeboost.demo_model.captions import parse_caption
from pipeboost.demo_model.render import render_scene
from pipeboost.demo_model.text import build_clip_tokenizer
from pipeboost.quality import call_metrics
from pipeboost.quality.call_metrics import METRICS, Made, metrics_for
from pipeboost.quality.contact_sheet import contact_sheet
from pipeboost.quality.pictures import pictures_in, spread

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 5, 48, 64, 3), dtype=np.uint8)
CAPTION = "a large red circle on the left on a cream background"


def made(*films: np.ndarray, prompts: tuple[str, ...] = ()) -> Made:
    return Made({}, list(films), list(prompts))


def drawn(caption: str) -> np.ndarray:
    return ((render_scene(parse_caption(caption)) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()[None]


@pytest.mark.parametrize(
    "output",
    [
        PIXELS.astype(np.float32) / 255,
        torch.from_numpy(PIXELS).movedim(-1, -3).double() / 255,
        list(torch.from_numpy(PIXELS).movedim(-1, -3) / 255),
        [[Image.fromarray(frame) for frame in film] for film in PIXELS],
        list(np.concatenate([PIXELS, PIXELS[..., :1]], -1)),
    ],
    ids=["array", "tensor", "list of tensors", "PIL", "alpha"],
)
def test_films_are_found_in_every_form_that_pipelines_return_them_in(output):
    films = pictures_in(
        {"frames": list(output) if isinstance(output, tuple) else output, "audio": torch.zeros(2, 1, 9)}
    )
    assert len(films) == 2
    assert all(np.array_equal(film, expected) for film, expected in zip(films, PIXELS, strict=True))


@pytest.mark.parametrize(
    "output",
    [
        PIXELS[0] / 255,
        torch.from_numpy(PIXELS[0]).movedim(-1, -3) / 255,
        [Image.fromarray(picture) for picture in PIXELS[0]],
        list(torch.from_numpy(PIXELS[0]).movedim(-1, -3) / 255),
    ],
    ids=["array", "tensor", "PIL", "list of tensors"],
)
def test_pictures_are_films_of_one_frame(output):
    pictures = pictures_in({"images": output})
    assert len(pictures) == 5
    assert all(np.array_equal(found[0], expected) for found, expected in zip(pictures, PIXELS[0], strict=True))


def test_latents_and_sound_are_no_pictures():
    assert pictures_in({"audio": torch.zeros(1, 2, 900), "0": torch.zeros(2, 4, 8, 8), "1": "text"}) == []
    assert Made.of({"images": torch.zeros(1, 3, 8, 8)}, {"output_type": "latent"}).pictures == []


def test_several_pictures_of_one_prompt_have_its_text():
    result = {"images": torch.zeros(4, 3, 8, 8)}
    assert Made.of(result, {"prompt": ["a", "b"]}).prompts == ["a", "a", "b", "b"]
    assert Made.of(result, {"prompt": "a"}).prompts == ["a"] * 4
    assert Made.of(result, {"prompt_embeds": torch.zeros(1)}).prompts == []


def test_ssim_is_the_worst_pictures_and_one_of_equal_ones():
    measure = METRICS["ssim"].make()
    assert measure(made(*PIXELS), made(*PIXELS)) == pytest.approx(1.0)
    noisy = PIXELS[1] // 2 + 60
    worst = measure(made(noisy), made(PIXELS[1]))
    assert 0 < worst < 0.95
    assert measure(made(PIXELS[0], noisy), made(*PIXELS)) == pytest.approx(worst)


def test_flicker_is_the_mean_difference_of_successive_frames():
    film = np.zeros((3, 4, 4, 3), np.uint8)
    film[1] = 51
    assert METRICS["flicker"].make()(made(film), made(film)) == pytest.approx(0.2)
    assert METRICS["flicker"].make()(made(film, film[1:2]), made()) == pytest.approx(0.2)
    assert not METRICS["flicker"].applies(made(film[:1]))


def test_drawn_is_the_share_of_pictures_that_show_their_captions():
    wrong = CAPTION.replace("red", "blue")
    right = made(drawn(CAPTION), drawn(wrong), prompts=(CAPTION, CAPTION))
    assert METRICS["drawn"].applies(right)
    assert METRICS["drawn"].make()(right, made()) == 0.5
    assert not METRICS["drawn"].applies(made(drawn(CAPTION), prompts=("a red fox",)))
    assert not METRICS["drawn"].applies(made(drawn(CAPTION)[:, :64], prompts=(CAPTION,)))
    assert not METRICS["drawn"].applies(made(drawn(CAPTION)))


def test_clip_scores_picture_against_prompt_by_a_model_on_this_machine(tmp_path, monkeypatch):
    tokenizer = build_clip_tokenizer()
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**size, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 16}, projection_dim=8)
    model = CLIPModel(config).eval()
    processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer
    )
    texts = ["a red circle", "a blue star on the left"]
    inputs = processor(text=texts, images=[PIXELS[0][0]], return_tensors="pt", padding=True)
    with torch.no_grad():
        cosines = model(**inputs).logits_per_image[0] / model.logit_scale.exp()
        model.text_projection.weight *= cosines[0].sign()  # so that the first is positive
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    monkeypatch.setattr(call_metrics, "CLIP_MODEL", str(tmp_path))
    measure = METRICS["clip"].make()
    scores = [measure(made(PIXELS[0][:1], prompts=(text,)), made()) for text in texts]
    expected = [max(0.0, 100 * float(cosine)) for cosine in cosines * cosines[0].sign()]
    assert scores == pytest.approx(expected, abs=1e-3)
    assert scores[0] > 0
    both = made(PIXELS[0][:1], PIXELS[0][:1], prompts=tuple(texts))
    assert measure(both, made()) == pytest.approx(sum(scores) / 2)


@pytest.mark.parametrize(
    ("name", "module", "sentence"),
    [
        ("ssim", "skimage.metrics", "ssim needs scikit-image: pip install scikit-image"),
        ("lpips", "torchmetrics.image.lpip", "lpips needs torchmetrics and torchvision: pip install"),
        ("drawn", "pipeboost.demo_model.score", "drawn needs scikit-image and scipy"),
    ],
)
def test_a_metric_whose_package_is_missing_is_left_out_and_named(monkeypatch, name, module, sentence):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=sentence):
        METRICS[name].make()
    found, missing = metrics_for(made(drawn(CAPTION), prompts=(CAPTION,)))
    assert name not in found
    assert missing[name].startswith(sentence)


def test_a_clip_model_that_is_not_here_is_not_downloaded(monkeypatch):
    monkeypatch.setattr(call_metrics, "CLIP_MODEL", "nobody/has-this-model")
    with pytest.raises(MissingPackageError, match="hf download nobody/has-this-model"):
        METRICS["clip"].make()


def test_weights_for_lpips_that_are_not_here_are_not_downloaded(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics.image.lpip")
    pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(MissingPackageError, match=f"weights of AlexNet at {Path(tmp_path)}"):
        METRICS["lpips"].make()


def test_frames_are_spread_from_the_first_to_the_last():
    film = np.arange(9)[:, None, None, None]
    assert spread(film, 4)[:, 0, 0, 0].tolist() == [0, 3, 5, 8]
    assert spread(film[:2], 4)[:, 0, 0, 0].tolist() == [0, 1]


def test_a_contact_sheet_shows_stock_ours_and_the_difference_amplified():
    stock = [np.full((9, 48, 64, 3), 100, np.uint8)]
    sheet = np.asarray(contact_sheet("title", stock, [stock[0] + 10]))
    rows = [sheet[40 + row * (216 + 8) + 108, 150 + 144].tolist() for row in range(3)]
    assert rows == [[100] * 3, [110] * 3, [160] * 3]
    assert sheet.shape[1] == 150 + 4 * (288 + 8)
    same = np.asarray(contact_sheet("title", stock, stock))
    assert same[40 + 2 * (216 + 8) + 108, 150 + 144].tolist() == [0] * 3
