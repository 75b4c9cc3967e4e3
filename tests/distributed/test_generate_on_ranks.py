"""`pipeboost generate` with several ranks, on the demo model."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.unit.generate_support import run_main, stored


def test_generate_on_two_ranks_saves_once_what_one_rank_makes(monkeypatch, tmp_path, capfd):
    common = ("generate", "--prompt", "a red star on the right", "--seed", 1, "--num-inference-steps", 2)
    report = tmp_path / "report.json"
    assert run_main(monkeypatch, *common, "--save-output", tmp_path / "one.png") == 0
    words = ("--ulysses-degree", 2, "--save-output", tmp_path / "two.png", "--report", report)
    assert run_main(monkeypatch, *common, *words) == 0
    one, two = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("one", "two"))
    assert np.abs(one - two).max() <= 1
    assert capfd.readouterr().out.count("two.png") == 1
    assert any("ulysses=2" in line for line in json.loads(report.read_text())["plan"])


@pytest.mark.usefixtures("quick_launch")
def test_what_all_ranks_refuse_is_told_in_one_line(monkeypatch, capfd):
    assert run_main(monkeypatch, "generate", "--num-gpus", 2, "--ring-degree", 2, "--width", 100) == 2
    told = capfd.readouterr().err.strip().splitlines()[-1]
    assert "width=100 is not a multiple of 16" in told


@pytest.mark.usefixtures("quick_launch")
def test_ranks_that_share_nothing_are_refused_in_one_line(monkeypatch, capfd, tmp_path):
    words = ("--model-path", stored("pixart_sigma"), "--prompt", "a", "--save-output", tmp_path / "a.png")
    assert run_main(monkeypatch, "generate", "--num-gpus", 2, *words) == 2
    told = capfd.readouterr().err.strip().splitlines()[-1]
    assert "--num-gpus 2: PixArtSigmaPipeline would be computed whole on each of them" in told
    assert told.endswith("use --num-gpus 1")
    assert not (tmp_path / "a.png").exists()
