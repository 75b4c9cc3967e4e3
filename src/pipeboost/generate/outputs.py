"""What a generation gives back: an image or a video with its seed and report, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import secrets
import textwrap
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from pipeboost.core.errors import ConfigurationError, MissingPackageError, PipeboostError, one_line, quoted
from pipeboost.core.user_files import user_path

if TYPE_CHECKING:
    from pipeboost.stages.report import Report


DEFAULT_FOLDER = Path("outputs")
DEFAULT_FPS = 16
_IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@dataclass(frozen=True, eq=False, kw_only=True)
class Generated:
    """What an image and a video have in common.

    Attributes:
        formats: suffixes of the files that it can be saved as; the first one is that of a name we choose.
        prompt: what was asked for.
        seed: the seed that gives the same again.
        report: where the time of its call went.
        notes: what differs from what was asked.
    """

    formats: ClassVar[tuple[str, ...]]
    prompt: str
    seed: int
    report: Report
    notes: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write it and return where it is.

        Args:
            path: a file that ends in one of `formats` and is replaced if it exists; or a folder (default: `outputs`),
                in which it gets a name that is free.

        Raises:
            MissingPackageError: a video, and PyAV is not installed.
            PipeboostError: it cannot be written; nothing is left of the file.
        """
        target, is_file = output_path(DEFAULT_FOLDER if path is None else path, self.formats)
        target = target if is_file else target / f"{output_name(self.prompt, self.seed)}{self.formats[0]}"
        return write_whole(target, self._encoded(target), new=not is_file)

    def _encoded(self, path: Path) -> bytes:
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class GeneratedImage(Generated):
    """One image; `image` is the picture."""

    formats = tuple(_IMAGE_FORMATS)
    image: Image.Image

    def _encoded(self, path: Path) -> bytes:
        kind, buffer = _IMAGE_FORMATS[path.suffix.lower()], io.BytesIO()
        settings: dict[str, Any] = {} if kind == "PNG" else {"quality": 95}
        try:
            self.image.save(buffer, format=kind, **settings)
        except (OSError, ValueError) as error:
            raise PipeboostError(f"{path} cannot be written as {kind}: {one_line(error)}") from error
        return buffer.getvalue()


@dataclass(frozen=True, eq=False, kw_only=True)
class GeneratedVideo(Generated):
    """One video; `frames` are uint8 `(frames, height, width, 3)`, to be shown `fps` a second."""

    formats = (".mp4",)
    frames: np.ndarray
    fps: int = DEFAULT_FPS

    def _encoded(self, path: Path) -> bytes:
        """Encode at a visually lossless rate, in memory, since PyAV hides what a write to a full disk raises."""
        av = require_pyav()
        height, width = self.frames.shape[1:3]
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=self.fps, options={"crf": "17"})
            stream.width, stream.height = width, height
            # Players expect colour at half the resolution, which needs even sides.
            stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
            for frame in self.frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        return buffer.getvalue()


def require_pyav() -> Any:
    """Return PyAV, or raise MissingPackageError: videos cannot be written without it."""
    try:
        import av
    except ImportError as error:
        raise MissingPackageError("writing a video needs PyAV: pip install av") from error
    return av


def check_fps(fps: object) -> None:
    """Refuse a frame rate that no video can have.

    Raises:
        ConfigurationError: it is not an integer from 1 to 240.
    """
    if not isinstance(fps, int) or isinstance(fps, bool) or not 1 <= fps <= 240:
        raise ConfigurationError(f"fps={quoted(fps)} must be an integer from 1 to 240")


def write_whole(path: Path, content: bytes, *, new: bool = False) -> Path:
    """Write to a temporary file in the folder of `path` and rename it, so that no half of a file is ever seen.

    Args:
        new: replace no file, whoever writes there too: where the name is taken, the next free number is put after it.

    Returns:
        Where it is.

    Raises:
        PipeboostError: the folder cannot be made, or the file cannot be written, as on a full disk; nothing is left.
    """
    # A link stays one, and what is no file, such as /dev/null, is written to and not replaced.
    target = path if new else Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.stem[:40]}-{secrets.token_hex(4)}.part")
    left = []
    try:
        if not new and target.exists() and not target.is_file():
            target.write_bytes(content)
            return path
        target.parent.mkdir(parents=True, exist_ok=True)
        left.append(temporary)
        with temporary.open("xb") as file:
            file.write(content)
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
                each.unlink()


def _reserved(path: Path) -> Path:
    """The first free name, which from now on is an empty file of ours."""
    for number in itertools.count(1):
        each = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        with contextlib.suppress(FileExistsError):
            each.touch(exist_ok=False)
            break
    return each


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
