"""The worker on the demo model, in real processes; `test_worker_deaths` is about its ends."""

import gc
import os
import re
import resource
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeboost.generate import LoadedModel, load_model
from pipeboost.serving.errors import JobCancelled, JobError
from pipeboost.serving.jobs import OUT_OF_MEMORY, REFUSED, Lora
from pipeboost.serving.supervisor import WorkerSettings
from pipeboost.serving.wire import Start
from pipeboost.serving.worker_model import WorkerModel
from pipeboost.serving.worker_previews import preview_steps
from tests.pipelines.tiny_adapters import lora_state_dict
from tests.serving.worker_support import DEMO, PROMPT, Served, job, of, pixels, serving, wait_until, write_lora


@pytest.fixture(scope="module")
def alone() -> LoadedModel:
    """The same model in this process."""
    with load_model(compile=None) as model:
        yield model


@pytest.fixture(scope="module")
def loras(tmp_path_factory, alone) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("ink", "clay", "wax")):
        write_lora(folder, name, alone.pipe.transformer, seed=seed)
    (folder / "broken.safetensors").write_bytes(b"\0" * 100)
    foreign = lora_state_dict(alone.pipe.transformer, rank=2)
    save_file({name: torch.cat((each, each)) for name, each in foreign.items()}, folder / "foreign.safetensors")
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory, loras):
    settings = WorkerSettings(acceleration=DEMO.acceleration, lora_dir=str(loras))
    with serving(tmp_path_factory.mktemp("data"), settings) as served:
        yield served


def image_alone(model: LoadedModel, **request) -> np.ndarray:
    return of(model.generate_image(PROMPT, **{"seed": 1, "num_inference_steps": 2, **request}).image)


def right(served: Served, name: str, model: LoadedModel) -> bool:
    """Whether the next image is as it should be."""
    return np.array_equal(pixels(served.run(job(name))), image_alone(model))


def test_every_output_equals_generate_image_alone_to_the_bit(served, alone):
    running = served.begin(job("bits", count=2, seed=7, steps=3))
    ran = running.future.result(240)
    assert ran.seeds == (7, 8)
    assert [path.parent for path in ran.arrays] == [served.paths.of("bits")] * 2
    for index, seed in enumerate(ran.seeds):
        assert np.array_equal(pixels(ran, index), image_alone(alone, seed=seed, num_inference_steps=3))
    assert (ran.steps, ran.fps) == (3, None)
    assert sum(ran.stages.values()) == pytest.approx(ran.seconds)
    counted = [step for _, step, steps in running.steps if steps]
    assert counted == sorted(counted)
    assert set(range(1, 7)) <= set(counted)
    assert running.steps[-1][1:] == (6, 6)
    assert {"preparing", "text encoding", "denoising", "decoding"} <= {stage for stage, _, _ in running.steps}


def test_the_card_says_what_the_model_takes(served, alone):
    card = served.supervisor.card
    assert (card.pipeline, card.kind, card.width, card.num_inference_steps) == ("FluxPipeline", "image", 128, 28)
    assert (card.size_multiple, card.loras, card.takes_mask, card.quality) == (16, True, False, "lossless")
    assert re.fullmatch("lossless-[0-9a-f]{12}", card.plan)
    assert served.supervisor.memory["rss"] > 2**27


def test_a_cancelled_job_ends_within_a_step_and_the_next_is_right(served, alone):
    running = served.begin(job("long", steps=5000))
    running.wait_for_step(2)
    before = running.steps[-1][1]
    served.cancel("someone else's")
    served.cancel("long")
    with pytest.raises(JobCancelled):
        running.future.result(0)
    # What was under way when it was told, and what was said before that came to be read.
    assert running.steps[-1][1] - before < 20
    assert right(served, "after cancel", alone)


def test_whoever_waits_for_a_job_may_go_and_the_next_is_right(served, alone):
    running = served.begin(job("left", steps=5000))
    running.wait_for_step(1)
    running.future.cancel()
    assert wait_until(lambda: served.supervisor._running is None)
    assert right(served, "after leaving", alone)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"width": 100}, "width=100 is not a multiple of 16, as FluxPipeline needs; use 96 or 112"),
        ({"num_frames": 5}, "num_frames=5: FluxPipeline, which makes images, has no such argument; leave it out"),
        ({"negative_prompt": "x"}, "negative_prompt='x' does nothing in FluxPipeline at true_cfg_scale=1.0"),
        ({"arguments": {"ip_adapter_image": "/etc/passwd"}}, "upload the picture"),
        ({"arguments": {"no_such": 1}}, "no_such"),
        ({"images": ("../../secret.png",)}, "is not a file of the job"),
        ({"images": ("noise.png",)}, "image noise.png cannot be read as a picture"),
        ({"images": ("fine.png",)}, "makes images from text alone"),
        ({"mask": "fine.png"}, "takes no mask"),
        ({"kind": "video"}, "makes images; use /v1/images"),
        ({"loras": (Lora("../ink"),)}, "is not one of this server's"),
        ({"loras": (Lora("absent"),)}, "is not one of this server's"),
        ({"loras": (Lora("broken"),)}, "lora 'broken' cannot be loaded into FluxPipeline"),
        ({"loras": (Lora("ink"), Lora("foreign"))}, "lora 'foreign' cannot be loaded into FluxPipeline"),
        ({"loras": (Lora("ink"), Lora("ink", 0.5))}, "name each once"),
        ({"guidance_scale": float("nan")}, "cannot be written as JSON"),
    ],
)
def test_what_the_model_finds_fault_with_is_refused_in_a_sentence_without_paths(served, call, sentence):
    folder = served.paths.of("bad")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "noise.png").write_bytes(b"no picture")
    Image.new("RGB", (16, 16)).save(folder / "fine.png")
    with pytest.raises(JobError, match=re.escape(sentence)) as error:
        served.run(job("bad", **call))
    assert error.value.code == REFUSED
    assert str(folder) not in error.value.message
    assert served.supervisor.settings.lora_dir not in error.value.message
    assert served.supervisor.restarts == 0


def test_after_what_was_refused_the_next_is_right(served, alone):
    assert right(served, "after refusals", alone)


def test_an_adapter_acts_as_when_loaded_alone_and_nothing_of_it_is_left(served, alone, loras):
    ink, both = (Lora("ink"),), (Lora("clay", 0.5), Lora("ink"))
    first, plain, again, mixed, last, after = (
        pixels(served.run(job(f"lora {number}", loras=asked)))
        for number, asked in enumerate((ink, (), ink, both, ink, ()))
    )
    stock = image_alone(alone)
    assert np.array_equal(plain, stock)
    assert np.array_equal(after, stock)
    assert not np.array_equal(first, stock)
    assert np.array_equal(again, first)
    assert np.array_equal(last, first)
    with load_model(compile=None, lora_path=[f"{loras}/clay.safetensors=0.5", f"{loras}/ink.safetensors"]) as model:
        assert np.array_equal(mixed, image_alone(model))
        model.pipe.set_adapters(["lora_1"])
        assert np.array_equal(first, image_alone(model))


def test_previews_come_on_the_way_and_change_nothing(served, alone):
    running = served.begin(job("seen", steps=6, previews=2))
    ran = running.future.result(240)
    assert [path.name for path in running.previews] == ["preview-0-2.npy", "preview-0-4.npy"]
    early, late = (np.load(path).astype(int) for path in running.previews)
    final = pixels(ran)
    assert early.shape == final.shape
    assert np.array_equal(final, image_alone(alone, num_inference_steps=6))
    assert np.abs(late - final).mean() < np.abs(early - final).mean()
    assert [stage for stage, _, _ in running.steps].count("decoding") == 1
    assert ran.notes == ()


def test_previews_are_spread_evenly():
    assert preview_steps(3, 28) == {7, 14, 21}
    assert preview_steps(3, 2) == {1}
    assert preview_steps(0, 28) == set()
    assert preview_steps(2, 1) == set()


def test_out_of_memory_has_its_code_and_the_next_is_right(served, alone):
    pid = served.group
    used = int(re.search(r"VmSize:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (used + 2**26, before[1]))
    try:
        with pytest.raises(JobError, match="ran out of the host's memory at width=1024, height=1024") as error:
            served.run(job("large", steps=1, width=1024, height=1024))
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, before)
    assert error.value.code == OUT_OF_MEMORY
    assert served.group == pid
    assert right(served, "after memory", alone)


def test_a_result_that_cannot_be_written_fails_the_job_and_leaves_no_part(served, alone):
    pid = served.group
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(JobError, match="could not be written to the server's disk: File too large"):
            served.run(job("full"))
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    assert os.listdir(served.paths.of("full")) == []
    assert right(served, "after full", alone)


@pytest.mark.exhaustive
def test_cancellations_at_random_moments_mix_nothing_up_and_leave_nothing_open(served, alone):
    def opened() -> list[int]:
        processes = served.group, os.getpid()
        return [len(os.listdir(f"/proc/{pid}/{what}")) for pid in processes for what in ("fd", "task")]

    random, expected, before, cancelled = Random(0), image_alone(alone), None, 0
    for number in range(80):
        running = served.begin(job(f"random {number}", steps=random.choice((2, 2, 60))))
        if random.random() < 0.5:
            time.sleep(0.5 * random.random())
            served.cancel(f"random {number}")
        try:
            ran = running.future.result(60)
        except JobCancelled:
            cancelled += 1
            continue
        assert ran.steps == 60 or np.array_equal(pixels(ran), expected)
        before = before or opened()
    assert cancelled > 10
    assert opened() == before


@pytest.fixture(scope="module")
def model(loras) -> WorkerModel:
    """The worker's model in this process, with room for one adapter that does not act."""
    settings = WorkerSettings(acceleration=DEMO.acceleration, lora_dir=str(loras))
    model = WorkerModel(settings, on_status=lambda text: None)
    yield model
    model.model.close()
    gc.collect()


def run_here(model: WorkerModel, folder: Path, each) -> dict[str, int]:
    start = Start(each.id, each.owner, each.kind, each.call, folder)
    model.run(start, advance=lambda *_: None, preview=lambda _: None, is_stopped=lambda: False)
    return model.pipe.acceleration.report().reuse


def test_a_prompt_of_one_owner_is_not_found_for_another(model, tmp_path):
    owners = "ann", "ben", "ann", "ben"
    found = [run_here(model, tmp_path, job("p", steps=1, owner=owner))["hits"] for owner in owners]
    assert found == [0, 0, 1, 1]


def test_adapters_stay_loaded_within_their_memory_the_latest_first(model, tmp_path):
    run_here(model, tmp_path, job("l", steps=1, loras=(Lora("ink"),)))
    size = model.loras._loaded["ink"].size
    assert size > 0
    model.loras._memory = size
    for name in ("clay", "wax"):
        run_here(model, tmp_path, job("l", steps=1, loras=(Lora(name),)))
    assert model.loras.names == ("clay", "wax")
    run_here(model, tmp_path, job("l", steps=1))
    assert model.loras.names == ()
    assert not any("lora" in name for name, _ in model.pipe.transformer.named_modules())
