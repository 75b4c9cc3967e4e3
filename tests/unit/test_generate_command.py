"""`pipeboost generate`: every flag does something, every mistake is one line, and what is finished is kept."""

import errno
import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pipeboost import Acceleration, OffloadConfig
from pipeboost.cli import generate as command
from pipeboost.cli import generate_output
from pipeboost.core.errors import PipeboostError
from pipeboost.demo_model.prompts import DEMO_PROMPTS, WEIGHTS
from pipeboost.generate import outputs
from pipeboost.runner import Calls
from tests.pipelines.tiny import TINY, picture
from tests.unit.generate_support import png, run_main, served, stored, stored_lora

pytestmark = pytest.mark.skipif(not (WEIGHTS / "model_index.json").exists(), reason="the demo model is not here")

TINY_CALL = ["--device", "cpu", "--width", 96, "--height", 64, "--num-inference-steps", 2, "--seed", 1]
FLUX = ["--model-path", "flux_dev", *TINY_CALL, "--call", "max_sequence_length=35"]

PIXELS: dict[tuple[str, ...], bytes] = {}
"""Of images that command lines have made."""


class Result:
    """What one command line left behind."""

    def __init__(self, code: int, out: str, err: str, folder: Path) -> None:
        self.code, self.out, self.err = code, out, err
        report = folder / "report.json"
        self.report = json.loads(report.read_text()) if report.exists() else None

    @property
    def paths(self) -> list[Path]:
        return [Path(row["path"]) for row in self.report["requests"]]

    @property
    def pixels(self) -> bytes:
        return np.asarray(Image.open(self.paths[0])).tobytes()

    def plan(self, feature: str) -> str:
        return next(line.split(None, 1)[1] for line in self.report["plan"] if line.split()[:1] == [feature])


@pytest.fixture
def generate(tmp_path, monkeypatch, capfd):
    """Runs `pipeboost generate` in an empty folder, two steps of the demo model if nothing else is said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PIPEBOOST_QUALITY", raising=False)

    def run(*words, steps=2, seed=1) -> Result:
        words = [stored(word) if word in TINY else word for word in words]
        capfd.readouterr()
        if "--model-path" not in words:
            defaults = {"--num-inference-steps": steps, "--seed": seed}
            words += [part for name, value in defaults.items() if value and name not in words for part in (name, value)]
        (tmp_path / "report.json").unlink(missing_ok=True)
        code = run_main(monkeypatch, "generate", *words, *(() if "--report" in words else ("--report", "report.json")))
        return Result(code, *capfd.readouterr(), tmp_path)

    return run


@pytest.fixture
def made(generate):
    """Runs a command line that must succeed."""

    def run(*words, **settings) -> Result:
        result = generate(*words, **settings)
        assert (result.code, result.err) == (0, ""), result.err
        return result

    return run


@pytest.fixture
def refused(generate):
    """Runs a command line that must fail in one line; returns that line."""

    def run(*words, out="", **settings) -> str:
        result = generate(*words, **settings)
        assert (result.code, result.out, result.err.count("\n")) == (2, out, 1), result.err
        return result.err

    return run


def test_without_a_flag_an_image_of_the_shipped_model_is_saved(generate):
    result = generate(steps=None, seed=None)
    assert (result.code, result.err) == (0, "")
    (row,) = result.report["requests"]
    assert row["prompt"] == DEMO_PROMPTS[-1].text
    assert len(row["report"]["steps"]) == 28
    path = Path(row["path"])
    assert (path.parent, Image.open(path).size) == (Path("outputs"), (128, 128))
    assert f"{path}  seed {row['seed']}" in result.out


@pytest.mark.parametrize(
    ("base", "flags"),
    [
        ([], ["--prompt", "a blue ring"]),
        ([], ["--seed", 2]),
        ([], ["--num-inference-steps", 3]),
        ([], ["--guidance-scale", 3]),
        (["--guidance-scale", 3], ["--negative-prompt", "a red star"]),
        ([], ["--call", "max_sequence_length=16"]),
        ([], ["--quality", "fast", "--num-inference-steps", 8]),
        (["--width", 96, "--height", 64], [*FLUX, "--prompt", "a fox"]),
    ],
    ids=lambda words: str(words[0]) if words else "",
)
def test_a_flag_changes_the_image(made, base, flags):
    if "--quality" in flags:
        base = flags[2:]
    without = tuple(map(str, base))
    if without not in PIXELS:
        PIXELS[without] = made(*base).pixels
    assert PIXELS[without] != made(*base, *flags).pixels


def test_the_size_flags_set_the_size(made):
    assert Image.open(made("--width", 96, "--height", 64).paths[0]).size == (96, 64)


def test_image_path_is_the_picture_that_is_edited_from_a_path_or_a_url(made, tmp_path):
    words = ["--model-path", "flux_kontext", *TINY_CALL, "--prompt", "a fox"]
    words += ["--call", "max_sequence_length=35", "--call", "_auto_resize=false"]
    picture().save(tmp_path / "a.png")
    with served({"/b.png": (200, png(picture(seed=1)))}) as address:
        drawn = [made(*words, "--image-path", source).pixels for source in ("a.png", f"{address}/b.png")]
    assert len({*drawn, made(*words).pixels}) == 3


def test_a_video_has_the_frames_and_the_rate_of_its_flags(made):
    words = ["--model-path", "wan21_t2v", *TINY_CALL, "--prompt", "a fox", "--call", "max_sequence_length=32"]
    result = made(*words, "--num-frames", 5, "--fps", 10)
    with av.open(result.paths[0]) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate, stream.width, stream.height) == (5, 10, 96, 64)


def test_a_lora_and_a_vae_change_the_image(made, tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(stored("flux_dev"), subfolder="vae")
    for parameter in vae.decoder.parameters():
        parameter.data.mul_(0.5)
    vae.save_pretrained(tmp_path / "vae")
    first, second = stored_lora(tmp_path), stored_lora(tmp_path, seed=1)
    words = [*FLUX, "--prompt", "a fox"]
    flags = [[], ["--vae-path", "vae"], ["--lora-path", first], ["--lora-path", f"{first}=0.3", "--lora-path", second]]
    assert len({made(*words, *each).pixels for each in flags}) == len(flags)


def test_the_speed_flags_reach_the_plan(made):
    assert "on a CPU building" in made().plan("compile")
    assert "turned off" in made("--no-compile").plan("compile")
    assert made("--attention-backend", "sdpa").plan("attention").startswith("sdpa")
    assert "quality='exact'" in made("--tier", "exact").report["plan"][0]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--compile", "--tier", "exact"], "compile='regional' is not allowed in quality='exact'"),
        (["--attention-backend", "magic"], "attention='magic' is not allowed"),
        (["--offload", "nowhere"], "offload='nowhere' is not allowed"),
        (["--tier", "best"], "quality='best' is not allowed"),
        (["--device", "tpu"], "device='tpu' is not allowed"),
        (["--num-gpus", 0], "--num-gpus 0 must be at least 1"),
        (["--tp-size", 0], "parallel.tensor=0 must be an integer of at least 1"),
        (["--num-gpus", 4, "--ring-degree", 2], "--num-gpus 4 is not the product of the parallel flags, 2"),
        (["--width", "abc"], "Invalid value for '--width'"),
        (["--widht", 64], "No such option: --widht"),
        (["--fps", 12], "--fps 12: the model makes images"),
        (["--image-path", "gone.png"], "image gone.png cannot be read: No such file"),
        (["--model-path", "gone/far/away"], "does not exist, and is no hub id"),
        (["--prompt", ""], "must be a text that is not empty"),
        (["--prompt-file", "gone.txt"], "prompt file gone.txt cannot be read: No such file"),
        (["--config", "gone.yaml"], "config file gone.yaml cannot be read"),
        (["--call", "strength"], "--call strength must be NAME=VALUE"),
        (["--save-output", "a.tiff"], "must be a folder or a file that ends in"),
        (["--save-output", "a.mp4"], "the model makes images; use a name that ends in .png"),
        (["--save-output", "a.png", "--prompt", "a", "--prompt", "b"], "is one file for 2 images; name a folder"),
        (["--no-save-output", "--save-output"], "--no-save-output contradicts"),
        (["--report", "."], ". is a folder; name a file in it"),
        (["--profile", "."], ". is a folder; name a file in it"),
        (["--report", "a.json", "--profile", "a.json"], "a.json is named by two flags"),
        (["--save-output", "a.png", "--report", "a.png"], "a.png is named by two flags"),
        (["--output-path", "a.png"], "--output-path a.png is no folder; for a file use --save-output a.png"),
        (["--output-path", "~nosuchuser/a"], "--output-path='~nosuchuser/a' cannot be a path: Could not determine"),
        (["--save-output", f"{'n' * 300}.png"], "cannot be a path: File name too long"),
        (["--report", "/proc/a.json"], "the folder of --report a.json, cannot be written to"),
        (["--output-path", "/proc/a"], "/proc/a cannot be made a folder"),
        (["--call", "a=2020-99-99"], "the value is not valid YAML: month must be in 1..12"),
        (["--guidance-scale", "9" * 400], "guidance_scale=inf must be a finite number"),
        (["--image-path", "http://[::1"], "image http://[::1 cannot be fetched: Invalid IPv6 URL"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_nothing_is_written(refused, tmp_path, flags, sentence):
    assert sentence in refused(*flags)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_image_for_a_text_only_model_and_a_damaged_one_are_refused(refused, tmp_path):
    picture().save(tmp_path / "a.png")
    assert "FluxPipeline makes images from text alone" in refused("--image-path", "a.png")
    (tmp_path / "damaged.png").write_bytes(png()[:200])
    assert "image damaged.png cannot be read as a picture" in refused("--image-path", "damaged.png")
    assert "needs an image to start from" in refused("--model-path", "wan21_i2v", *TINY_CALL, "--prompt", "a fox")
    assert "there is no prompt; give --prompt" in refused("--model-path", "flux_dev", "--device", "cpu")


def test_offload_and_device_reach_the_settings(generate, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "run_generate", lambda settings, *_, **__: seen.append(settings))
    generate("--offload", "layerwise", "--device", "cpu")
    assert (seen[0].acceleration.offload, seen[0].device) == (OffloadConfig("layerwise"), "cpu")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--guidance-scale", "1e30"], "made a picture of numbers that are not finite"),
        (["--call", "sigmas=[.nan,.nan]"], "call={'sigmas': [nan, nan]} must be made of finite numbers"),
        (["--call", "sigmas=[1,0.7,0.3]"], "num_inference_steps=2 contradicts sigmas"),
        (["--call", "num_inference_steps=0"], "call={'num_inference_steps': 0} must be"),
    ],
)
def test_what_cannot_become_a_picture_leaves_no_file(generate, tmp_path, flags, sentence):
    result = generate(*flags)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert sentence in result.err
    assert not list(tmp_path.rglob("*.png"))


def test_a_cut_prompt_is_noted_once_on_stderr_and_in_each_report(generate):
    words = [word for _ in range(2) for word in ("--prompt", "a red star on the left " * 20)]
    result = generate(*words)
    first, second = (row["notes"] for row in result.report["requests"])
    assert (result.code, result.err.splitlines()) == (0, [f"  note: {note}" for note in first])
    assert first == second
    assert [note.split(" reads ")[0] for note in first] == [f"prompt was cut: text_encoder{n}" for n in ("", "_2")]


def test_a_size_in_the_call_is_what_was_asked_for(made):
    result = made("--call", "width=64")
    assert (result.report["requests"][0]["notes"], Image.open(result.paths[0]).size) == ([], (64, 128))


def test_warmup_makes_an_output_that_is_not_reported(made, monkeypatch):
    calls = []
    warm_up = Acceleration.warm_up
    monkeypatch.setattr(Acceleration, "warm_up", lambda self, **call: (calls.append(call), warm_up(self, **call)))
    assert len(made("--warmup").report["requests"]) == len(calls) == 1
    assert len(made().report["requests"]) == len(calls) == 1


def test_a_prompt_file_gives_many_and_its_rows_win(made, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red star", "seed": 9, "width": 64}\n"a blue ring"\n')
    result = made("--prompt", "a pink heart", "--prompt-file", "prompts.jsonl")
    rows = [(row["prompt"], row["seed"]) for row in result.report["requests"]]
    assert rows == [("a pink heart", 1), ("a red star", 9), ("a blue ring", 3)]
    assert [Image.open(path).size for path in result.paths] == [(128, 128), (64, 128), (128, 128)]


@pytest.mark.parametrize(
    ("flags", "paths"),
    [
        (["--save-output"], ["outputs/a-fox-seed1.png"]),
        (["--save-output", "deep/fox.jpg"], ["deep/fox.jpg"]),
        (["--save-output", "folder"], ["folder/a-fox-seed1.png"]),
        (["--save-output=folder.d/"], ["folder.d/a-fox-seed1.png"]),
        (["--output-path", "there"], ["there/a-fox-seed1.png"]),
        (["--output-path", "there", "--save-output", "fox.png"], ["there/fox.png"]),
        (["--save-output", "--output-path", "there"], ["there/a-fox-seed1.png"]),
        (["--no-save-output"], []),
    ],
)
def test_outputs_go_where_the_flags_say(made, tmp_path, flags, paths):
    result = made("--prompt", "a fox", *flags)
    found = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(found) == sorted([*paths, "report.json"])
    assert [row["path"] for row in result.report["requests"]] == (paths or [None])


def test_a_home_is_found_in_the_paths_of_flags(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    made("--prompt", "a fox", "--output-path", "~/out", "--report", "~/r.json", "--profile", "~/p.json")
    assert sorted(os.listdir(tmp_path / "home")) == ["out", "p.json", "r.json"]
    assert os.listdir(tmp_path / "home" / "out") == ["a-fox-seed1.png"]


def test_where_the_report_fails_too_the_first_failure_is_told(generate, monkeypatch):
    count = iter(range(9))
    write = outputs.write_whole

    def full(path: Path, *rest: object, **settings: object) -> Path:
        if next(count) > 0:
            raise PipeboostError(f"{path.name} cannot be written: the disk is full")
        return write(path, *rest, **settings)

    monkeypatch.setattr(outputs, "write_whole", full)
    monkeypatch.setattr(generate_output, "write_whole", full)
    result = generate("--prompt", "a", "--prompt", "b")
    assert (result.code, result.err) == (
        2,
        "pipeboost: b-seed2.png cannot be written: the disk is full (1 of 2 were finished and are kept)\n",
    )


def test_several_ranks_of_which_each_would_do_all_of_it_are_refused(refused, monkeypatch):
    monkeypatch.setattr(command, "world_size", lambda: 2)
    line = refused("--num-gpus", 2)
    assert "--num-gpus 2: FluxPipeline would be computed whole on each of them" in line
    assert line.endswith("use --num-gpus 1\n")


def test_a_named_file_that_is_replaced_is_said_to_be(made, tmp_path):
    (tmp_path / "fox.png").write_bytes(b"old")
    assert "fox.png (replaced)" in made("--save-output", "fox.png").out
    assert "(replaced)" not in made("--save-output", "new.png").out


def test_a_profile_is_one_chrome_trace_of_all_calls(made, tmp_path):
    made("--prompt", "a", "--prompt", "b", "--profile", "deep/trace.json")
    events = json.loads((tmp_path / "deep" / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    assert sum(event["name"] == "step 1" for event in events) == 2
    first, second = ([event for event in events if event["pid"] == n and event["ph"] == "X"] for n in range(2))
    assert max(event["ts"] + event["dur"] for event in first) <= min(event["ts"] for event in second) + 1
    assert os.listdir("deep") == ["trace.json"]


def test_the_report_flag_writes_the_report(made, tmp_path):
    made("--report", "deep/out.json")
    whole = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert whole["model"] == str(WEIGHTS)
    assert "denoising" in whole["requests"][0]["report"]["stages"]


def test_the_memory_of_each_component_as_it_was_loaded_is_told_and_reported(made):
    result = made()
    assert result.report["components"]["transformer"] == {"bytes": 21203456, "device": "cpu"}
    line = result.out.splitlines()[0]
    assert line.startswith("loaded 28.7 MiB: ")
    assert "transformer 20.2 MiB on cpu" in line


def test_a_config_file_gives_flags_and_acceleration_and_the_command_line_wins(made, refused, tmp_path):
    text = (
        "prompt: a blue ring\nseed: 4\nwidth: 64\nnum_inference_steps: 3\nsave_output: ring.png\n"
        "call: {max_sequence_length: 32}\nacceleration: {quality: exact, compile: false}\n"
    )
    (tmp_path / "settings.yaml").write_text(text)
    result = made("--config", "settings.yaml", "--width", 96, steps=None, seed=None)
    (row,) = result.report["requests"]
    assert (row["prompt"], row["seed"], row["path"], len(row["report"]["steps"])) == ("a blue ring", 4, "ring.png", 3)
    assert Image.open("ring.png").size == (96, 128)
    assert "quality='exact'" in result.report["plan"][0]
    tier = made("--config", "settings.yaml", "--tier", "lossless").report["plan"][0]
    assert "quality='lossless'" in tier
    for line, sentence in (
        ("colour: red", "has no setting 'colour'"),
        ("width: wide", "Invalid value for '--width'"),
        ("acceleration: {colour: red}", "there is no setting 'colour'"),
        ("acceleration: fast", "must be a mapping of settings"),
        ("seed: 1\nseed: 2", "has 'seed' twice; leave one out"),
        ("prompt: {a: 1}", "prompt={'a': 1} is not a value of its flag"),
        ("output_path: [a, b]", "output_path=['a', 'b'] is not a value of its flag"),
        ("num_gpus: true", "num_gpus=True is not a value of its flag"),
        ("call: {latents: 2020-01-01}", "call={'latents': '2020-01-01'}: FluxPipeline takes torch.FloatTensor"),
        ("call: {x: 1}", "x=1: FluxPipeline, which makes images, has no such argument"),
    ):
        (tmp_path / "settings.yaml").write_text(f"{line}\n")
        assert sentence in refused("--config", "settings.yaml")


def test_a_config_file_may_say_save_output_true_and_begin_with_a_byte_order_mark(made, tmp_path):
    (tmp_path / "settings.yaml").write_bytes(b"\xef\xbb\xbfsave_output: true\n")
    assert made("--config", "settings.yaml").paths[0].parent == Path("outputs")
    (tmp_path / "settings.json").write_bytes(b'\xef\xbb\xbf{"prompt": "a fox"}')
    assert made("--config", "settings.json").paths[0].name == "a-fox-seed1.png"


def test_when_the_third_save_fails_the_first_two_are_kept(generate, monkeypatch):
    replace = os.replace

    def fill_the_disk(source: Path, target: Path) -> None:
        if target.name == "c-seed3.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(outputs.os, "replace", fill_the_disk)
    result = generate(*(word for name in "abcd" for word in ("--prompt", name)))
    assert (result.code, result.err.count("\n"), result.out.count(".png")) == (2, 1, 2)
    assert "c-seed3.png cannot be written: No space left on device (2 of 4 were finished and are kept)" in result.err
    assert sorted(os.listdir("outputs")) == ["a-seed1.png", "b-seed2.png"]
    assert [row["prompt"] for row in result.report["requests"]] == ["a", "b"]


def test_ctrl_c_keeps_what_is_finished_and_exits_with_130(generate, monkeypatch):
    run, count = Calls.run, iter(range(3))

    def interrupted(self, *args, **kwargs):
        if next(count) == 1:
            raise KeyboardInterrupt
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Calls, "run", interrupted)
    result = generate(*(word for name in "abc" for word in ("--prompt", name)))
    assert (result.code, result.err.count("\n")) == (130, 1)
    assert "stopped (1 of 3 were finished and are kept)" in result.err
    assert os.listdir("outputs") == ["a-seed1.png"]
    assert len(result.report["requests"]) == 1


def test_help_shows_the_flags_in_groups(generate, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    result = generate("--help")
    assert result.code == 0
    for title in ("Model", "What to make", "Output", "Speed", "Several GPUs"):
        assert f"─ {title} ─" in result.out
    for flag in ("--model-path", "--prompt", "--num-gpus", "--save-output", "--attention-backend", "--lora-path"):
        assert flag in result.out
