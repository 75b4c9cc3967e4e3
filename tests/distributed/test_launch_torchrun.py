"""What torchrun starts: one agent or two, the examples, and how it ends when a rank fails."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from tests.pipelines.tiny import TINY

ROOT = Path(__file__).parents[2]


@pytest.mark.exhaustive
def test_two_agents_on_one_machine_make_the_same_image_as_one(tmp_path):
    one = ["--standalone", "--nproc-per-node", "2", "-m", "examples.torchrun_image", "--out", str(tmp_path / "one.png")]
    _all_end_well([_torchrun(*one)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    two = ["-m", "examples.torchrun_image", "--out", str(tmp_path / "two.png")]
    _all_end_well(
        [
            _torchrun("--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1", *meeting, *two)
            for node in (0, 1)
        ]
    )
    images = [Image.open(tmp_path / name).convert("RGB") for name in ("one.png", "two.png")]
    assert images[0].size == (128, 128)
    assert ImageChops.difference(*images).getbbox() is None


@pytest.mark.exhaustive
def test_the_example_of_a_video_runs(tmp_path):
    TINY["wan21_t2v"].build().save_pretrained(tmp_path / "model")
    size = ["--height", "32", "--width", "32", "--num-frames", "5", "--num-inference-steps", "2"]
    script = ["-m", "examples.torchrun_video", "--model-path", str(tmp_path / "model"), *size]
    _all_end_well([_torchrun("--standalone", "--nproc-per-node", "2", *script, "--out", str(tmp_path / "video.mp4"))])
    assert (tmp_path / "video.mp4").stat().st_size > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kind", "told"), [("raise", "ValueError: boom on rank 1"), ("kill", "SIGKILL in 'denoising'")]
)
def test_torchrun_ends_with_an_error_code_and_the_first_ranks_traceback(kind, told, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"from tests.distributed.launch_cases import failing\nfailing({kind!r}, 1, 'middle')\n")
    run = _torchrun(
        "--standalone", "--nproc-per-node", "2", "--redirects", "0:2", "--log-dir", str(tmp_path), str(script)
    )
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    first = "".join(path.read_text() for path in tmp_path.rglob("0/stderr.log"))
    assert "RankFailedError" in first, output
    assert told in first


def _torchrun(*arguments: str) -> subprocess.Popen:
    settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _all_end_well(runs: list[subprocess.Popen]) -> None:
    try:
        for run in runs:
            output, _ = run.communicate(timeout=180)
            assert run.returncode == 0, output
    finally:
        for run in runs:
            run.kill()
