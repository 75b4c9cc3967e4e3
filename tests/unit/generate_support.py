"""What the tests of `generate` share: tiny pipelines on disk, a picture server, and the command line in process."""

import contextlib
import http.server
import io
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from PIL import Image

from pipeboost import accelerate_pipeline
from pipeboost.cli import main
from pipeboost.generate import load_model, session
from tests.pipelines.tiny import HEIGHT, TINY, WIDTH, lora_state_dict, picture

SIZE = {"height": HEIGHT, "width": WIDTH}
_folder = TemporaryDirectory(prefix="tiny-pipelines-")


@cache
def stored(name: str) -> str:
    """The folder of a tiny pipeline, written by `save_pretrained`."""
    path = Path(_folder.name) / name
    TINY[name].build().save_pretrained(path)
    return str(path)


@contextlib.contextmanager
def loaded(name: str, **settings):
    """A tiny pipeline, loaded from its folder."""
    with load_model(stored(name), device="cpu", **settings) as model:
        yield model


@contextlib.contextmanager
def built(name: str):
    """A tiny pipeline that cannot be written to a folder, as if it had been loaded from one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "load_pipeline", lambda *_: accelerate_pipeline(TINY[name].build()))
        with load_model(stored("flux_dev"), device="cpu") as model:
            yield model


def stored_lora(folder: Path, *, seed: int = 0) -> Path:
    """A LoRA of random weights for the tiny FLUX."""
    from safetensors.torch import save_file

    path = folder / f"style{seed}.safetensors"
    save_file(lora_state_dict(TINY["flux_dev"].build().transformer, rank=2, seed=seed), path)
    return path


def png(image: Image.Image | None = None) -> bytes:
    """A picture's bytes."""
    buffer = io.BytesIO()
    (image or picture()).save(buffer, "PNG")
    return buffer.getvalue()


@contextlib.contextmanager
def served(answers: dict[str, tuple[int, bytes | Callable[[], Iterator[bytes]]]]) -> Iterator[str]:
    """A web server on this machine, path → status and body, in parts or at once; its address.

    The body of a redirection is the address that it leads to.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.get(self.path, (404, b""))
            self.send_response(status)
            if status == 302:
                self.send_header("Location", body.decode())
            self.end_headers()
            with contextlib.suppress(OSError):
                for part in body() if callable(body) else [body]:
                    self.wfile.write(part)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Inside, a write beyond `size` bytes fails in the kernel, as one on a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run_main(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run `pipeboost WORDS` in this process; the exit code."""
    monkeypatch.setattr(sys, "argv", ["pipeboost", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code
