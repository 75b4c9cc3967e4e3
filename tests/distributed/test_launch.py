"""`launch` starts ranks, and leaves none behind."""

import contextlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import pipeboost
from pipeboost import ConfigurationError, RankFailedError
from tests.distributed import launch_cases
from tests.parameters import exhaustive


@pytest.mark.usefixtures("quick_launch")  # as users do it: below, and in `test_generate_on_ranks`
def test_launch_runs_the_function_on_all_ranks_and_returns_what_the_first_returned():
    found = pipeboost.launch(launch_cases.greeting, "hello", num_gpus=2, mark="?")
    assert found["word"] == "hello?"
    assert found["total"].tolist() == [3.0]
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == ("0", "0", "2")


@pytest.mark.usefixtures("quick_launch")
def test_a_failing_call_raises_in_the_caller_with_the_first_rank_its_signal_and_stage():
    with pytest.raises(RankFailedError) as raised:
        pipeboost.launch(launch_cases.failing, "kill", 0, "middle", num_gpus=2)
    assert (raised.value.rank, raised.value.signal, raised.value.stage) == (0, "SIGKILL", "denoising")


@pytest.mark.usefixtures("quick_launch")
def test_a_rank_that_raises_outside_all_calls_ends_the_others_with_its_traceback():
    with pytest.raises(RankFailedError, match="ValueError: boom outside") as raised:
        pipeboost.launch(launch_cases.failing_outside, num_gpus=2)
    assert raised.value.rank == 1
    assert "launch_cases.py" in raised.value.traceback


@pytest.mark.usefixtures("quick_launch")
@pytest.mark.parametrize(("alone", "told"), [(1, " (rank 1)"), *exhaustive((0, ""), (-1, ""))])
def test_what_a_rank_of_the_command_refuses_ends_all_in_one_sentence(alone, told):
    with pytest.raises(RankFailedError) as raised:
        pipeboost.launch(launch_cases.refusing, alone, num_gpus=2)
    assert str(raised.value) == f"width=100 cannot be{told}"


@pytest.mark.usefixtures("quick_launch")
def test_forged_records_and_garbage_are_ignored_with_one_warning():
    assert pipeboost.launch(launch_cases.attacked, num_gpus=2) == {"returned": 2.0, "warnings": 1}


@pytest.mark.parametrize("how", [signal.SIGTERM, *exhaustive(signal.SIGKILL)])
def test_no_rank_and_no_file_outlives_the_process_that_launched(how, tmp_path):
    with _launching(tmp_path) as (parent, pids):
        os.kill(parent.pid, how)
        parent.join(60)
        assert parent.exitcode == -how
        _wait_until(lambda: not any(_lives(pid) for pid in pids))
    assert list((tmp_path / "temporary").iterdir()) == []


def test_ranks_are_reached_from_this_machine_alone_and_keep_what_they_have_done_at_ctrl_c(tmp_path):
    with _launching(tmp_path) as (parent, pids):
        assert {address for pid in (parent.pid, *pids) for address in _listens_at(pid)} == {"0100007F"}  # 127.0.0.1
        for pid in (parent.pid, *pids):  # as a terminal does; the launcher passes it on once more
            os.kill(pid, signal.SIGINT)
        parent.join(60)
        assert parent.exitcode not in (0, None)
        assert not any(_lives(pid) for pid in pids)
    assert [(tmp_path / f"kept {rank}").read_text() for rank in (0, 1)] == ["once"] * 2


@contextlib.contextmanager
def _launching(folder: Path):
    """A process that has launched two ranks, which stay, and theirs."""
    (folder / "temporary").mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preloaded"])
    parent = context.Process(target=launch_cases.launching, args=(str(folder),))
    parent.start()
    try:
        _wait_until(lambda: all((folder / str(rank)).exists() for rank in (0, 1)))
        yield parent, [int((folder / str(rank)).read_text()) for rank in (0, 1)]
    finally:
        parent.kill()


@pytest.mark.parametrize("num_gpus", [0, True, "2"])
def test_a_number_of_ranks_that_cannot_be_is_refused(num_gpus):
    with pytest.raises(ConfigurationError, match="num_gpus="):
        pipeboost.launch(launch_cases.greeting, "hello", num_gpus=num_gpus)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ConfigurationError, match=r"num_gpus=3 .* use at most 2$"):
        pipeboost.launch(launch_cases.greeting, "hello", num_gpus=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_more_ranks_than_cpus_are_refused_where_there_is_no_gpu():
    with pytest.raises(ConfigurationError, match=f"num_gpus=100000 .* use at most {os.cpu_count()}, which has no GPU"):
        pipeboost.launch(launch_cases.greeting, "hello", num_gpus=100000)


def test_what_cannot_be_sent_is_refused_before_a_process_starts():
    with pytest.raises(ConfigurationError, match="at the top of a module"):
        pipeboost.launch(lambda: None, num_gpus=2)


def test_a_rank_does_not_launch_ranks(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="starts the ranks itself"):
        pipeboost.launch(launch_cases.greeting, "hello", num_gpus=2)


def _wait_until(true, limit: float = 120.0) -> None:  # two processes import torch, on a machine that does much else
    until = time.monotonic() + limit
    while not true():
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.05)


def _listens_at(pid: int) -> list[str]:
    """The addresses, in hexadecimal digits, at which a process listens."""
    links = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            links.add(os.readlink(descriptor))
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return [line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in links]


def _lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False
