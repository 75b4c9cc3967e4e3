"""Files that are whole or not there: images through Pillow, videos as H.264 in mp4 through PyAV."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import tempfile
import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import Any

from PIL import Image

from pipeboost.core.errors import ConfigurationError, MissingPackageError, PipeboostError, one_line
from pipeboost.core.user_files import user_path

IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
VIDEO_FORMATS = {".mp4": "mp4"}


def write_image(image: Image.Image, path: Path, *, new: bool = False) -> Path:
    """Write a picture in the format that the file's name asks for, as `write_whole` does.

    Raises:
        PipeboostError: it is too large for the format, or the file cannot be written.
    """
    settings: dict[str, Any] = {"quality": 95} if path.suffix.lower() != ".png" else {}
    kind = IMAGE_FORMATS[path.suffix.lower()]
    buffer = io.BytesIO()
    try:
        image.save(buffer, format=kind, **settings)
    except (OSError, ValueError) as error:
        raise PipeboostError(f"{path} cannot be written as {kind}: {one_line(error)}") from error
    return write_whole(path, buffer.getvalue(), new=new)


def write_video(frames: Any, path: Path, *, fps: int, new: bool = False) -> Path:
    """Write frames, uint8 `(frames, height, width, 3)`, at a visually lossless rate, as `write_whole` does.

    Raises:
        MissingPackageError: PyAV is not installed.
    """
    require_pyav()
    # Encoded in memory, since PyAV hides what a write to a full disk raises.
    return write_whole(path, _encoded(frames, fps=fps), new=new)


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


def write_whole(path: Path, content: bytes, *, new: bool = False) -> Path:
    """Write to a temporary file beside `path` and rename it, so that no half of a file is ever seen under its name.

    Args:
        new: replace no file, whoever writes there too: where the name is taken, the next free number is put after it.

    Returns:
        Where it is.

    Raises:
        PipeboostError: the folder cannot be made, or the file cannot be written, as on a full disk; nothing is left.
    """
    left: list[Path | str] = []
    try:
        # A link stays one, and what is no file, such as /dev/null, is written to and not replaced.
        target = path if new else Path(os.path.realpath(path))
        if not new and target.exists() and not target.is_file():
            target.write_bytes(content)
            return path
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.stem[:40]}-", suffix=".part", dir=target.parent)
        left.append(temporary)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o666 & ~_umask())
        if new:
            path = target = _reserved(path)
            left.append(path)
        os.replace(temporary, target)
        left.clear()
        return path
    except OSError as error:
        raise PipeboostError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        for each in left:
            with contextlib.suppress(OSError):
                os.unlink(each)


def _reserved(path: Path) -> Path:
    """The first free name, which from now on is an empty file of ours."""
    for number in itertools.count(1):
        each = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        with contextlib.suppress(FileExistsError):
            os.close(os.open(each, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return each
    raise AssertionError("there is always a free number")


def _umask() -> int:
    """The process's mask, which can be read only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def output_path(given: str | os.PathLike[str], formats: Collection[str], what: str = "path") -> tuple[Path, bool]:
    """What a path for outputs names, and whether that is a file; else it is a folder.

    A folder is one already, has no suffix, or ends in a separator.

    Args:
        formats: suffixes that a file may have.

    Raises:
        ConfigurationError: a file of another kind, or no path.
    """
    target = user_path(given, what)
    separators = tuple(filter(None, (os.sep, os.altsep)))
    if target.is_dir() or not target.suffix or os.fspath(given).endswith(separators):
        return target, False
    if target.suffix.lower() not in formats:
        raise ConfigurationError(f"{what} {target} must be a folder or a file that ends in {', '.join(formats)}")
    return target, True


def output_name(prompt: str, seed: int) -> str:
    """What an output is called that was given no name, without a suffix."""
    words = " ".join(re.findall(r"\w+", prompt.lower()))
    return f"{textwrap.shorten(words, 48, placeholder='').replace(' ', '-') or 'output'}-seed{seed}"
