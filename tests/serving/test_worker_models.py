"""The worker's model in this process, on tiny pipelines of several kinds and in tier `fast`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeboost import accelerate_pipeline
from pipeboost.core.errors import ConfigurationError, UnsupportedError
from pipeboost.generate import load_model, session
from pipeboost.serving.wire import Ran, Start, WorkerSettings
from pipeboost.serving.worker_model import WorkerModel
from tests.pipelines.tiny import TINY, mask, picture
from tests.serving.worker_support import PROMPT, job, pixels
from tests.unit.generate_support import stored

TINY_SIZE = {"width": 96, "height": 64}


@contextlib.contextmanager
def built(name: str) -> Iterator[WorkerModel]:
    """One that cannot be written to a folder, as if it had been loaded from one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "load_pipeline", lambda *_: accelerate_pipeline(TINY[name].build(), compile=None))
        with loaded("flux_dev") as model:
            yield model


@contextlib.contextmanager
def loaded(name: str | None, **settings) -> Iterator[WorkerModel]:
    path = None if name is None else stored(name)
    settings = {"compile": "off", **settings}
    model = WorkerModel(
        WorkerSettings(model_path=path, device="cpu", acceleration=settings), on_status=lambda text: None
    )
    try:
        yield model
    finally:
        model.model.close()


def run(model: WorkerModel, folder: Path, seen: list[Path] | None = None, **call) -> Ran:
    each, seen = job("j", **call), [] if seen is None else seen
    start = Start(each.id, each.owner, each.kind, each.call, folder)
    return model.run(start, advance=lambda *_: None, preview=seen.append, is_stopped=lambda: False)


def test_a_video_model_makes_videos_and_images_of_one_frame(tmp_path):
    with loaded("wan21_t2v") as model:
        assert (model.card.kind, model.card.one_frame, model.card.size_multiple) == ("video", True, 16)
        assert (model.card.fps, model.card.frame_multiple) == (16, 4)
        seen: list[Path] = []
        ran = run(model, tmp_path, seen, kind="video", num_frames=5, previews=1, **TINY_SIZE)
        assert pixels(ran).shape == (5, 64, 96, 3)
        assert ran.fps == 16
        assert np.load(seen[0]).shape == (64, 96, 3)
        with load_model(stored("wan21_t2v"), device="cpu", compile=None) as stock:
            alone = stock.generate_video(PROMPT, seed=1, num_inference_steps=2, num_frames=5, **TINY_SIZE)
        assert np.array_equal(pixels(ran), alone.frames)
        assert pixels(run(model, tmp_path, kind="image", **TINY_SIZE)).shape == (64, 96, 3)
        with pytest.raises(ConfigurationError, match="num_frames=5 makes no image"):
            run(model, tmp_path, kind="image", num_frames=5)


def test_pictures_and_masks_of_the_job_reach_the_pipeline(tmp_path):
    first, second = picture(), picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, image in (("a.png", first), ("b.png", second), ("m.png", mask())):
        image.save(tmp_path / name)
    with built("qwen_image_edit_plus") as model:
        assert (model.card.needs_image, model.card.several_images) == (True, True)
        seen: list[Path] = []
        one = pixels(run(model, tmp_path, seen, images=("a.png",), previews=1, **TINY_SIZE))
        assert np.load(seen[0]).shape == one.shape
        assert not np.array_equal(one, pixels(run(model, tmp_path, images=("a.png", "b.png"), **TINY_SIZE)))
        with pytest.raises(ConfigurationError, match="needs an image"):
            run(model, tmp_path, **TINY_SIZE)
    with loaded("flux_inpaint") as model:
        assert (model.card.takes_mask, model.card.several_images) == (True, False)
        ran = run(model, tmp_path, images=("a.png",), mask="m.png", **TINY_SIZE)
        with load_model(stored("flux_inpaint"), device="cpu", compile=None) as stock:
            request = {"image_path": first, "call": {"mask_image": mask()}, **TINY_SIZE}
            alone = stock.generate_image(PROMPT, seed=1, num_inference_steps=2, **request)
        assert np.array_equal(pixels(ran), np.asarray(alone.image))
        with pytest.raises(UnsupportedError, match="makes images; use /v1/images"):
            run(model, tmp_path, kind="video", images=("a.png",))


@pytest.mark.exhaustive
def test_what_lays_latents_out_its_own_way_says_that_it_has_no_previews(tmp_path):
    with loaded("ltx2") as model:
        seen: list[Path] = []
        ran = run(model, tmp_path, seen, kind="video", num_frames=9, previews=1, **TINY_SIZE)
        assert ran.fps == model.card.fps == 24
        assert seen == []
        assert ran.notes[-1:] == ("no previews: the pipeline's latents are laid out in a way of its own",)


def test_quality_varies_how_many_steps_are_skipped_within_tier_fast_and_comes_back(tmp_path):
    with loaded(None, quality="fast") as model:
        computed, plans, images = [], [], []
        for quality in (None, "high", "low", "medium"):
            ran = run(model, tmp_path, steps=12, cache=quality)
            computed.append(model.pipe.acceleration.report().computed_steps)
            plans.append(ran.plan)
            images.append(pixels(ran))
        own, high, low, medium = computed
        assert high is None
        assert low < own == medium < 12
        assert np.array_equal(images[0], images[3])
        assert plans[0] == plans[3] == model.card.plan
        assert len(set(plans)) == 3
        with load_model(compile=None, quality="fast", cache=None) as stock:
            alone = stock.generate_image(PROMPT, seed=1, num_inference_steps=12)
        assert np.array_equal(images[1], np.asarray(alone.image))
        with pytest.raises(ConfigurationError, match="use low, medium or high"):
            run(model, tmp_path, cache="best")


def test_where_no_step_is_skipped_all_qualities_are_alike(tmp_path):
    with loaded("flux_dev") as model:
        before = model.pipe.acceleration
        images = [pixels(run(model, tmp_path, cache=quality, **TINY_SIZE)) for quality in ("low", "high")]
        assert np.array_equal(*images)
        assert model.pipe.acceleration is before
