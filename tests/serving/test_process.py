"""The HTTP process puts the real rooms together as its settings say."""

import socket

import pytest

from pipeboost.core.errors import ConfigurationError
from pipeboost.serving import errors, process
from pipeboost.serving.server import bound
from pipeboost.serving.settings import Settings, save

store = pytest.importorskip("pipeboost.serving.store")
supervisor = pytest.importorskip("pipeboost.serving.supervisor")


def test_every_setting_reaches_the_room_that_it_is_for(tmp_path):
    settings = Settings(
        data_dir=tmp_path,
        model_path="m",
        vae_path="v",
        device="cpu",
        acceleration={"quality": "fast"},
        ranks=2,
        lora_dir=tmp_path,
        lora_memory=1.5,
        warm_sizes=("64x32", "64x32x9"),
        step_timeout=7.0,
        start_timeout=8.0,
        policy="fifo",
        retention=9.0,
        disk_budget=0.5,
        upload=f"file://{tmp_path}/copies",
    )
    service = process.service_of(settings)
    worker = service.parts.worker
    assert (worker.settings.model_path, worker.settings.vae_path, worker.settings.device) == ("m", "v", "cpu")
    assert (worker.settings.acceleration, worker.settings.ranks) == ({"quality": "fast"}, 2)
    assert (worker.settings.lora_dir, worker.settings.lora_memory) == (str(tmp_path), 1.5)
    assert worker.settings.warm_sizes == ((64, 32), (64, 32, 9))
    assert (worker._step_timeout, worker._start_timeout) == (7.0, 8.0)
    assert service.parts.order._policy == "fifo"
    (retention,) = (cell.cell_contents for cell in service.parts.clean.__closure__)
    assert (retention._seconds, retention._budget) == (9.0, 2**29)
    service.parts.store.close()


def test_an_upload_that_names_no_store_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigurationError):
        process.service_of(Settings(data_dir=tmp_path, upload="s3://"[:5] + "/"))


def test_a_port_that_is_taken_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Settings(port=taken.getsockname()[1], data_dir=tmp_path / "data")
        with pytest.raises(ConfigurationError, match="cannot be had: Address already in use"):
            bound(settings)
        folder = tmp_path / "private"
        folder.mkdir()
        save(settings, folder / "settings.json")
        monkeypatch.setattr("sys.argv", ["serving", str(folder / "settings.json")])
        monkeypatch.setattr(process, "log_to_stderr", lambda: None)
        assert process.main() == 2
    assert capsys.readouterr().err.startswith("pipeboost: --host 127.0.0.1 --port")
    assert not folder.exists()


def test_the_rooms_raise_the_errors_that_the_runner_knows():
    for name in ("WorkerLost", "JobError", "JobCancelled"):
        assert issubclass(getattr(supervisor, name), getattr(errors, name)), name
    for name in ("IdempotencyError", "JobStateError"):
        assert issubclass(getattr(store, name), getattr(errors, name)), name
