"""The demo model: its renderer and its judge agree, its held-out scenes are held out, and the weights draw."""

import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.demo_model.captions import parse_caption, write_caption
from examples.demo_model.data import training_scene
from examples.demo_model.prompts import DEMO_CALL, DEMO_PROMPTS, WEIGHTS, held_out_scenes
from examples.demo_model.render import render, render_scene
from examples.demo_model.scenes import COLOURS, PLACES, SHAPES, Scene, Thing, is_held_out, sample_scene
from examples.demo_model.score import is_right, score_images

needs_weights = pytest.mark.skipif(not (WEIGHTS / "model_index.json").exists(), reason="the weights are not here")

SCENE = Scene(
    (Thing("star", "red", "top left", "large"), Thing("ring", "blue", "right", "small")),
    "cream",
)


def picture(scene: Scene) -> np.ndarray:
    return ((render_scene(scene) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def test_judge_reads_ground_truth() -> None:
    scenes = [training_scene(number, seed=5) for number in range(150)]
    images = render(torch.tensor([rows for _, rows, _ in scenes]), torch.tensor([back for *_, back in scenes]))
    pictures = list(((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    assert score_images(pictures, [scene for scene, _, _ in scenes]) >= 0.99


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", ["small", "large"])
def test_judge_reads_every_shape_and_size(shape: str, size: str) -> None:
    scene = Scene((Thing(shape, "green", "centre", size),), "silver")
    assert is_right(picture(scene), scene)


def test_judge_takes_what_a_caption_leaves_open() -> None:
    said = Scene(tuple(replace(thing, size=None, place=None) for thing in SCENE.things[::-1]))
    assert is_right(picture(SCENE), said)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(SCENE, background="mint"),
        replace(SCENE, things=SCENE.things[:1]),
        replace(SCENE, things=(*SCENE.things, Thing("heart", "pink", "bottom", "large"))),
        replace(SCENE, things=(replace(SCENE.things[0], colour="blue"), replace(SCENE.things[1], colour="red"))),
        replace(SCENE, things=(replace(SCENE.things[0], shape="circle"), SCENE.things[1])),
        replace(SCENE, things=(replace(SCENE.things[0], place="top"), SCENE.things[1])),
        replace(SCENE, things=(replace(SCENE.things[0], size="small"), SCENE.things[1])),
    ],
    ids=["background", "missing thing", "extra thing", "swapped colours", "shape", "place", "size"],
)
def test_judge_rejects_a_wrong_picture(wrong: Scene) -> None:
    assert is_right(picture(SCENE), SCENE)
    assert not is_right(picture(wrong), SCENE)


def test_judge_rejects_noise_and_blank_pictures() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    assert not is_right(noise, SCENE)
    assert not is_right(np.full_like(noise, 240), SCENE)


def test_captions_parse_back_to_their_scene() -> None:
    rng = random.Random(3)
    for _ in range(500):
        prompt = write_caption(sample_scene(rng), rng)
        assert parse_caption(prompt.text) == prompt.scene, prompt.text


def test_held_out_captions_are_fixed_distinct_and_never_drawn_in_training() -> None:
    prompts = held_out_scenes(200)
    assert prompts[:20] == held_out_scenes(20)
    assert len({prompt.text for prompt in prompts}) == 200
    assert all(is_held_out(prompt.scene) for prompt in prompts)
    assert not any(is_held_out(training_scene(number, seed=0)[0]) for number in range(2000))


def test_every_shape_colour_and_place_is_in_training() -> None:
    things = [thing for number in range(2000) for thing in training_scene(number, seed=0)[0].things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.colour for thing in things} == set(COLOURS)
    assert {thing.place for thing in things} == set(PLACES)


def test_demo_prompts_say_their_scenes_and_are_held_out() -> None:
    assert len(DEMO_PROMPTS) == 4
    for prompt in DEMO_PROMPTS:
        assert parse_caption(prompt.text) == prompt.scene
        assert is_held_out(prompt.scene)


@needs_weights
def test_weights_fit_in_16_megabytes() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*.safetensors")) <= 16_000_000


@needs_weights
def test_stock_pipeline_draws_a_demo_prompt() -> None:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(str(WEIGHTS))
    pipe.set_progress_bar_config(disable=True)
    prompt = DEMO_PROMPTS[0]
    image = pipe(prompt.text, generator=torch.Generator().manual_seed(0), **DEMO_CALL).images[0]
    assert isinstance(image, Image.Image)
    assert is_right(image, prompt.scene)


@needs_weights
def test_unknown_words_do_not_crash_and_prompts_differ() -> None:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(str(WEIGHTS), vae=None, transformer=None)
    prompts = ["a red circle", "a blue circle", "zebra Ünïcode 42", ""]
    words, _, _ = pipe.encode_prompt(prompts, max_sequence_length=64)
    for index in range(1, len(prompts)):
        assert not torch.allclose(words[0], words[index], atol=1e-2)
