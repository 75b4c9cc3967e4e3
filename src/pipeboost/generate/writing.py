"""Files that are whole or not there: images through Pillow, videos as H.264 in mp4 through PyAV."""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from PIL import Image

from pipeboost.core.errors import ConfigurationError, MissingPackageError, PipeboostError

IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
VIDEO_FORMATS = {".mp4": "mp4"}


def write_image(image: Image.Image, path: Path) -> None:
    """Write a picture in the format that the file's name asks for.

    Raises:
        PipeboostError: the file cannot be written; nothing is left of it.
    """
    settings: dict[str, Any] = {"quality": 95} if path.suffix.lower() != ".png" else {}
    write_whole(path, lambda file: image.save(file, format=IMAGE_FORMATS[path.suffix.lower()], **settings))


def write_video(frames: Any, path: Path, *, fps: int) -> None:
    """Write frames, uint8 `(frames, height, width, 3)`, at a visually lossless rate.

    Raises:
        MissingPackageError: PyAV is not installed.
        PipeboostError: the file cannot be written; nothing is left of it.
    """
    require_pyav()
    # Encoded in memory, since PyAV hides what a write to a full disk raises.
    video = _encoded(frames, fps=fps)
    write_whole(path, lambda file: file.write(video))


def require_pyav() -> None:
    """Raise MissingPackageError where videos cannot be written."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("writing a video needs PyAV: pip install av") from error


def _encoded(frames: Any, *, fps: int) -> bytes:
    import av

    height, width = frames.shape[1:3]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "17"})
        stream.width, stream.height = width, height
        # Players expect colour at half the resolution, which needs even sides.
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write to a temporary file beside `path` and rename it, so that no half of a file is ever seen under its name.

    Raises:
        PipeboostError: the folder cannot be made, or the file cannot be written, as on a full disk.
    """
    temporary = None
    # A link stays one, and what is no file, such as /dev/null, is written to and not replaced.
    path = Path(os.path.realpath(path))
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(_bytes_of(write))
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.stem[:40]}-", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "w+b") as file:
            write(file)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise PipeboostError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _bytes_of(write: Callable[[IO[bytes]], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def _umask() -> int:
    """The process's mask, which can be read only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def output_file(
    path: str | os.PathLike[str] | None, *, prompt: str, seed: int, formats: Sequence[str], folder: Path
) -> Path:
    """Where an output goes: the named file, or a name of its own in the named folder, which replaces no other file.

    Args:
        path: a file, which is replaced if it exists; a folder; or None for `folder`.
        formats: allowed suffixes; the first one is that of a name we choose.

    Raises:
        ConfigurationError: the suffix is not allowed.
    """
    target = folder if path is None else Path(path).expanduser()
    if not names_folder(path, target):
        if target.suffix.lower() not in formats:
            raise ConfigurationError(f"{target} must end in one of {', '.join(formats)}")
        return target
    words = " ".join(re.findall(r"\w+", prompt.lower()))
    name = f"{textwrap.shorten(words, 48, placeholder='').replace(' ', '-') or 'output'}-seed{seed}"
    candidate, number = target / f"{name}{formats[0]}", 2
    while candidate.exists():
        candidate, number = target / f"{name}-{number}{formats[0]}", number + 1
    return candidate


def names_folder(given: str | os.PathLike[str] | None, target: Path) -> bool:
    """Whether a path stands for a folder: it is one, has no suffix, or ends in a separator."""
    separators = tuple(filter(None, (os.sep, os.altsep)))
    return given is None or target.is_dir() or not target.suffix or os.fspath(given).endswith(separators)
