"""What a generation gives back: an image or a video with its seed, its report, and a way to save it."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from pipeboost.core.errors import ConfigurationError, MissingPackageError, PipeboostError, one_line, quoted
from pipeboost.generate.writing import output_name, output_path, write_whole

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
        if not is_file:
            target /= f"{output_name(self.prompt, self.seed)}{self.formats[0]}"
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
