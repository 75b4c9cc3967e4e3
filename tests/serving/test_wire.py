"""Messages between the server and its worker, and what the server's side may import."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from pipeboost.serving import wire
from pipeboost.serving.jobs import Call, Lora
from pipeboost.serving.wire import Advanced, Beat, Done, Ran, Start, WireError, WorkerSettings, pack, unpack

CALL = Call("ein Bär", 2**63 - 1, images=("a.png",), arguments={"sigmas": [1.0, 0.5]}, loras=(Lora("ink", 0.5),))
MESSAGES = [
    Start("j", "o", "image", CALL, Path("/data/j")),
    Beat(1, "loading", {"rss": 2**40}),
    Advanced("j", "denoising", 3, 28),
    Done("j", Ran((Path("/data/j/output-0.npy"),), (7,), "exact-0", 28, 1.5, {"decoding": 0.25}, 16.0, ("cut",))),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda each: type(each).__name__)
def test_a_message_comes_out_as_it_went_in_and_is_one_line(message):
    line = pack(message)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert unpack(line) == message


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[1]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"os": {}}',
        b'{"Beat": {"rank": 0, "doing": ""}}',
        b'{"Beat": {"rank": true, "doing": "", "memory": {}}}',
        b'{"Beat": {"rank": 0, "doing": "", "memory": {"rss": "much"}}}',
        b'{"Beat": {"rank": 0, "doing": "", "memory": {}, "more": 1}}',
        b'{"Start": {"job": "j", "owner": "o", "kind": "sound", "call": {"prompt": "", "seed": 1}, "folder": "/"}}',
    ],
)
def test_what_is_no_message_is_refused(line):
    with pytest.raises(WireError):
        unpack(line)


def test_a_line_has_a_largest_length(monkeypatch):
    monkeypatch.setattr(wire, "LONGEST_LINE", 200)
    with pytest.raises(WireError, match="longer than 200"):
        pack(Advanced("j" * 200, "", 0, 0))
    with pytest.raises(WireError, match="more than 200"):
        unpack(b" " * 201)


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(WireError):
        pack(Start("j", "o", "image", dataclasses.replace(CALL, guidance_scale=float("nan")), Path()))


def test_settings_come_out_as_they_went_in():
    settings = WorkerSettings(acceleration={"parallel": {"ulysses": 2}}, ranks=2, warm_sizes=((64, 64), (64, 64, 5)))
    assert wire.from_json(WorkerSettings, wire.to_json(settings)) == settings


def test_the_servers_side_imports_no_torch():
    code = "import pipeboost.serving.supervisor, sys; assert not {'torch', 'diffusers', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
