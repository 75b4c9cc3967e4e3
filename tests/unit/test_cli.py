"""The command line: what it prints, and that each mistake is one line on stderr and exit code 2."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeboost.cli import bench, demo, doctor, generate, main, plan
from pipeboost.cli.demo import picture_grid
from pipeboost.cli.plan import plan_of, wrapped
from pipeboost.core.errors import RankFailedError, UnsupportedError
from pipeboost.core.hardware import Hardware, detect_hardware
from pipeboost.demo_model import prompts
from pipeboost.kernels.table import KERNELS
from tests.pipelines.tiny import TINY

WEIGHTS = Path(__file__).parents[2] / "examples" / "demo_model" / "weights"
GPUS = Hardware("cuda", "NVIDIA H100 80GB HBM3", (9, 0), 80 * 2**30, 2, True, True)


@pytest.fixture
def pipeboost(monkeypatch, capsys):
    """Runs a command line; returns its exit code, stdout and stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["pipeboost", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(pipeboost):
    """Runs a command line that must fail in one line; returns that line."""

    def run(*words):
        code, out, err = pipeboost(*words)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        return err

    return run


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder with a tiny pipeline, its transformer in bfloat16; not to be written to."""
    folder = tmp_path_factory.mktemp("stored")
    pipe = TINY["flux_dev"].build()
    pipe.transformer.to(torch.bfloat16)
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["plan", "flux.1-dev", "--quality", "perfect"], "quality='perfect' is not allowed; use one of 'exact'"),
        (["plan", "flux.1-dev", "--device", "tpu"], "device='tpu' is not allowed; use one of 'auto', 'cpu', 'cuda'"),
        (["plan", "flux.1-dev", "--num-gpus", 0], "--num-gpus 0 must be at least 1"),
        (["plan", "flux.1-dev", "--tp-size", 5, "--device", "cpu"], "tensor=5 does not divide the heads"),
        (["plan", ""], "model='' is empty; leave it out or name a path"),
        (["plan", "nothing"], "'nothing' is no folder, no hub id, and not one of flux.1-dev"),
        (["verify", "--output", "/dev/null/x"], "--output /dev/null/x cannot be made a folder"),
        (["verify", "--quality", "perfect"], "quality='perfect' is not allowed"),
        (["demo", "--steps", "0"], "--steps 0 must be at least 1"),
        (["demo", "--device", "tpu"], "device='tpu' is not allowed"),
        (["bench", "nope"], "model='nope' is not allowed; use one of 'flux.1-dev'"),
        (["bench", "list", "nope"], "`pipeboost bench list` takes no other name"),
        (["bench", "flux.1-dev", "--tier", "turbo"], "tier='turbo' is not allowed"),
        (["bench", "flux.1-dev", "--device", "tpu"], "device='tpu' is not allowed"),
        (["bench", "flux.1-dev", "--repeats", "1"], "repeats=1 is too few"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(refused, words, sentence):
    assert sentence in refused(*words)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ("{", "model_index.json is not valid JSON"),
        ("[]", "must hold a mapping of components"),
        ("{}", "has no _class_name"),
    ],
)
def test_a_broken_index_is_refused_by_plan(refused, tmp_path, index, sentence):
    (tmp_path / "model_index.json").write_text(index)
    assert sentence in refused("plan", tmp_path, "--device", "cpu")


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", "no weights", "cannot be read as safetensors"),
        ("transformer/config.json", "{", "config.json is not valid JSON"),
        ("transformer/config.json", '{"quantization_config": {"quant_method": "x"}}', "is stored quantised"),
        ("model_index.json", '{"_class_name": "NoPipeline"}', "a NoPipeline, unknown to this Diffusers"),
        ("model_index.json", '{"_class_name": "FluxPipeline"}', "cannot be loaded"),
    ],
)
def test_a_damaged_pipeline_is_refused_by_plan(refused, stored, tmp_path, file, content, sentence):
    folder = shutil.copytree(stored, tmp_path / "pipe")
    (folder / file).write_text(content)
    assert sentence in refused("plan", folder, "--device", "cpu")


def test_plan_takes_the_dtype_that_is_stored_and_reads_no_weights(stored, tmp_path):
    made = plan_of(str(stored), hardware=detect_hardware("cpu"))
    assert made.model.dtype == torch.bfloat16
    assert made.family.name == "flux"
    bare = shutil.copytree(stored, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assumed = plan_of(str(bare), hardware=detect_hardware("cpu"))
    assert "weights of all components in bfloat16, as no file tells," in str(assumed)
    assert assumed.decisions == made.decisions


def test_plan_of_a_hub_id_fetches_everything_but_weights(stored, monkeypatch):
    def fetch(model, *, allow_patterns, ignore_patterns):
        assert (model, "*.safetensors" in ignore_patterns) == ("someone/model", True)
        return str(stored)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    plans = [plan_of(m, hardware=detect_hardware("cpu")) for m in ("someone/model", str(stored))]
    assert str(plans[0]) == str(plans[1])


def test_without_a_tier_plan_takes_the_files_or_the_environments(pipeboost, stored, tmp_path, monkeypatch):
    monkeypatch.setenv("PIPEBOOST_QUALITY", "exact")
    assert "quality='exact'" in pipeboost("plan", stored, "--device", "cpu")[1]
    settings = tmp_path / "settings.yaml"
    settings.write_text("quality: balanced\n")
    assert "quality='balanced'" in pipeboost("plan", stored, "--device", "cpu", "--config", settings)[1]
    words = ["plan", stored, "--device", "cpu", "--config", settings, "--tier", "fast"]
    assert "quality='fast'" in pipeboost(*words)[1]


@pytest.mark.skipif(not (WEIGHTS / "model_index.json").exists(), reason="the demo model is not in this checkout")
def test_plan_knows_the_shipped_model(pipeboost):
    code, out, _ = pipeboost("plan", WEIGHTS, "--device", "cpu")
    assert code == 0
    assert "FluxPipeline" in out


@pytest.mark.parametrize(("mask", "code", "verdict"), [([0], 1, "FAILED"), ([0, 1, 2, 3], 0, "passed")])
def test_verify_prints_the_verdict_writes_what_it_found_and_says_by_its_exit_code(
    pipeboost, stored, tmp_path, mask, code, verdict
):
    config, output = tmp_path / "settings.yaml", tmp_path / "found"
    cache = f"cache: {{extrapolate: output, step_mask: {mask}, steps: 4}}"
    config.write_text(f"num_inference_steps: 4\nacceleration: {{quality: fast, {cache}}}\n")
    words = ["verify", "--model-path", stored, "--config", config, "--height", 64, "--width", 96, "--prompt", "a fox"]
    found, out, err = pipeboost(*words, "--output", output, "--per-block", "--device", "cpu")
    assert (found, out.partition(":")[0]) == (code, verdict), err
    assert "blocks on stock's inputs: 0 of" in out
    written = json.loads((output / "verification.json").read_text())
    assert written["passed"] == (code == 0)
    assert written["rival"][0] == len(mask)
    assert Image.open(output / "contact_sheet.png").size[0] >= 400


def test_tune_writes_a_schedule_that_generate_takes_without_matplotlib_too(
    pipeboost, refused, stored, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    prompts, output = tmp_path / "prompts.txt", tmp_path / "tuned"
    prompts.write_text("a cat\na dog\na tree\n")
    size = ["--steps", 3, "--width", 64, "--height", 64]
    words = ["tune", stored, "--prompts", prompts, *size, "--budget", "psnr>=5", "--output", output]
    assert "tune got 3 prompts, of which 1 are held out" in refused(*words, "--device", "cpu")
    prompts.write_text("a cat\na dog\na tree\na boat\na star\na fox\n")
    code, out, _ = pipeboost(*words, "--device", "cpu")
    assert code == 0
    assert "budget psnr>=5 for 95% of prompts: kept on 2 prompts" in out
    assert "but no shares.png: plots need matplotlib: pip install matplotlib" in " ".join(out.split())
    config = ["--config", output / "generate.yaml", "--device", "cpu", "--output-path", tmp_path / "made"]
    code, _, err = pipeboost("generate", "--model-path", stored, "--prompt", "a cat", *config)
    assert code == 0, err


def test_a_plan_on_a_terminal_fits_its_width_and_loses_no_word():
    text = str(plan_of("flux.1-dev", quality="fast", hardware=detect_hardware("cpu")))
    lines = wrapped(text, 80).splitlines()
    assert max(map(len, lines)) <= 80 < max(map(len, text.splitlines()))
    assert " ".join(lines).split() == text.split()


def test_plan_weighs_a_ranks_own_share(tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text("parallel: {tensor: 4}\noffload: off\n")
    whole = plan_of("flux.1-dev", hardware=detect_hardware("cpu"))
    shared = plan_of("flux.1-dev", hardware=detect_hardware("cpu"), config=config, ranks=4)
    assert whole.model.weights / 4 < shared.model.weights < 0.26 * whole.model.weights  # biases of rows stay whole
    assert "this rank's share" in str(shared)


@pytest.mark.parametrize(
    ("model", "ranks", "line"),
    [
        ("flux.1-dev", 4, "parallel  ulysses=4: 24 heads divide by 4"),
        ("wan2.1-1.3b", 8, "parallel  cfg=2, ulysses=4: each rank computes a guidance branch"),
        ("qwen-image", 2, "parallel  cfg=2"),
        ("flux.1-dev", 1, "parallel  off: one process"),
    ],
)
def test_plan_tells_the_layout_of_several_gpus_without_any(model, ranks, line):
    assert line in str(plan_of(model, hardware=detect_hardware("cpu"), ranks=ranks))


def test_plan_takes_the_flags_of_generate(pipeboost):
    flags = ["--tier", "exact", "--num-gpus", 4, "--ring-degree", 4, "--offload", "stage", "--no-compile"]
    code, out, _ = pipeboost("plan", "flux.1-dev", "--device", "cpu", *flags[2:])
    assert code == 0
    assert "ring=4" in out
    assert "compile   off: turned off" in out
    assert "ring=4 changes rounding" in pipeboost("plan", "flux.1-dev", "--device", "cpu", *flags)[2]


def test_doctor_prints_every_attention_kernel_and_whether_it_runs_in_80_columns(pipeboost, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(doctor, "detect_hardware", lambda: detect_hardware("cpu"))
    code, out, _ = pipeboost("doctor")
    assert code == 0
    rows = {cells[1].strip(): cells[2].strip() for cells in (line.split("│") for line in out.splitlines()) if cells[1:]}
    assert [name for name in KERNELS if name not in rows] == []
    assert rows["sdpa"] == "yes"
    assert rows["flash3"].startswith("needs")
    assert max(map(len, out.splitlines())) <= 80
    assert all(line[-1] in "│┃" for line in out.splitlines() if "│" in line or "┃" in line)


def test_doctor_says_how_several_devices_are_linked_and_names_packages_that_exist(pipeboost, monkeypatch):
    monkeypatch.setattr(doctor, "detect_hardware", lambda: GPUS)
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    out = pipeboost("doctor")[1]
    assert "2 devices; each reaches the others' memory directly" in out
    assert "pip install peft" in out
    assert "pipeboost[" not in out


@pytest.mark.parametrize("command", [["demo", "--steps", "1"], ["bench", "wan2.1-1.3b"]])
def test_an_output_that_is_a_file_is_refused_before_any_work(refused, tmp_path, monkeypatch, command):
    monkeypatch.setattr(demo, "_load", lambda hardware: pytest.fail("loaded"))
    monkeypatch.setattr(bench, "measure_sizes", lambda *args, **kwargs: pytest.fail("measured"))
    monkeypatch.setattr(bench, "parameter_count", lambda size: 0)
    file = tmp_path / "taken"
    file.write_text("")
    assert f"--output {file} cannot be made a folder" in refused(*command, "--device", "cpu", "--output", file)


def test_bench_refuses_what_is_too_large_before_building_anything(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "detect_hardware", lambda device: Hardware("cpu", "a CPU", None, 2**33, 1, False, True))
    monkeypatch.setattr(bench, "measure_sizes", lambda *args, **kwargs: pytest.fail("measured"))
    line = refused("bench", "wan2.1-1.3b", "flux.1-dev", "--output", tmp_path / "results")
    assert "flux.1-dev has 44 GiB of weights in fp32, more than a CPU (8 GiB) holds" in line
    assert not (tmp_path / "results").exists()


def test_the_demo_without_its_weights_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "WEIGHTS", tmp_path / "weights")
    line = refused("demo", "--device", "cpu", "--output", tmp_path)
    assert f"the demo model's weights are not in {tmp_path / 'weights'}" in line


@pytest.mark.parametrize(
    ("missing", "told"), [("skimage.color", True), ("scipy", True), ("pipeboost.demo_model.render", False)]
)
def test_only_a_missing_reader_is_called_one(missing, told, tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setattr(prompts, "WEIGHTS", tmp_path)
    for module in ("score", "reading"):
        monkeypatch.delitem(sys.modules, f"pipeboost.demo_model.{module}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError) as caught:
        demo._load(detect_hardware("cpu"))
    assert ("pip install scikit-image scipy" in str(caught.value)) is told


def test_the_picture_has_a_cell_for_each_image():
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    grid = picture_grid([("stock", "1.00 s", images), ("fast", "0.50 s", images[::-1])], ["a", "b"])
    colours = {colour for _, colour in grid.getcolors(grid.width * grid.height)}
    assert {(255, 0, 0), (0, 0, 255)} <= colours
    assert grid.getpixel((160, 76)) == grid.getpixel((160 + 40, 76 + 40)) == (255, 0, 0)


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_another_kind_of_device_is_refused(device):
    with pytest.raises(UnsupportedError, match=f"cpu and cuda devices, not on '{device}'"):
        detect_hardware(device)


@pytest.mark.parametrize("start", [("-m", "pipeboost"), ("-c", "from pipeboost.cli import main; main()")], ids=str)
def test_ctrl_c_while_the_libraries_are_loaded_is_one_line_and_130(start, tmp_path):
    (tmp_path / "torch.py").write_text(
        f"import pathlib, time\npathlib.Path({str(tmp_path / 'began')!r}).touch()\ntry:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    raise ImportError('made of it')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    words = [sys.executable, *start, "doctor"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "began").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "pipeboost: stopped\n")


@pytest.mark.parametrize(
    ("command", "module", "function"),
    [
        (["doctor"], doctor, "detect_hardware"),
        (["demo"], demo, "detect_hardware"),
        (["bench", "list"], bench, "full_sizes"),
        (["plan", "x"], plan, "detect_hardware"),
        (["generate"], generate, "generate_on_ranks"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_fault_of_ours_is_one_line_exit_code_3_and_a_file_with_the_traceback(
    pipeboost, monkeypatch, tmp_path, command, module, function
):
    def broken(*_, **__):
        raise KeyError("a key\nof ours")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, function, broken)
    code, _, err = pipeboost(*command)
    assert (code, err.count("\n")) == (3, 1)
    assert err.startswith("pipeboost: KeyError: 'a key\\nof ours' (please report it; the traceback is in ")
    (trace,) = tmp_path.glob("pipeboost-*.txt")
    assert str(trace) in err
    assert "in broken" in trace.read_text()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RankFailedError("width=100 is wrong", rank=0), 2, "pipeboost: width=100 is wrong"),
        (RankFailedError("rank 1 failed", rank=1, traceback="Traceback: x"), 3, "pipeboost: rank 1 failed (please"),
        (RankFailedError("rank 1 was killed by SIGKILL", rank=1, signal="SIGKILL"), 3, "pipeboost: rank 1 was killed"),
    ],
    ids=["refused", "raised", "killed"],
)
def test_what_a_rank_raised_is_one_line(pipeboost, monkeypatch, error, code, line):
    def failed(*_, **__):
        raise error

    monkeypatch.setattr(doctor, "detect_hardware", failed)
    left, _, err = pipeboost("doctor")
    assert (left, err.count("\n")) == (code, 1)
    assert err.startswith(line)


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE"])
def test_a_rank_that_is_no_number_is_refused(refused, monkeypatch, variable):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(variable, "one")
    assert f"the environment variable {variable}='one' must be a number" in refused("generate")


def test_a_full_disk_under_stdout_is_one_line():
    words = f"{sys.executable} -m pipeboost bench list > /dev/full"
    ended = subprocess.run(words, shell=True, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (2, "pipeboost: the output cannot be written: No space left on device\n")


WRONG_WORDS = [["plan"], ["demo", "--stepz", "1"], ["bench", "x", "--repeats", "many"], ["generatee"], ["--version"]]


@pytest.mark.parametrize("words", WRONG_WORDS, ids=str)
def test_a_wrong_flag_or_command_is_one_line(refused, words):
    assert refused(*words).startswith("pipeboost: ")


def test_without_a_command_the_help_is_shown(pipeboost):
    code, out, err = pipeboost()
    assert (code, err) == (2, "")
    assert "generate" in out


def test_sizes_that_a_model_does_not_take_are_not_warmed(refused):
    assert "FluxPipeline takes no num_frames" in refused("warm", "--device", "cpu", "--sizes", "64x64x9")
