"""What a generation gives back: an image or a video with its seed, its report, and a way to save it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from PIL import Image

from pipeboost.core.errors import ConfigurationError, quoted
from pipeboost.generate.writing import (
    IMAGE_FORMATS,
    VIDEO_FORMATS,
    output_name,
    output_path,
    write_image,
    write_video,
)

if TYPE_CHECKING:
    import numpy as np

    from pipeboost.stages import Report

DEFAULT_FOLDER = Path("outputs")
DEFAULT_FPS = 16


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
        return self._write(target, new=not is_file)

    def _write(self, path: Path, *, new: bool) -> Path:
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class GeneratedImage(Generated):
    """One image; `image` is the picture."""

    formats = tuple(IMAGE_FORMATS)
    image: Image.Image

    def _write(self, path: Path, *, new: bool) -> Path:
        return write_image(self.image, path, new=new)


@dataclass(frozen=True, eq=False, kw_only=True)
class GeneratedVideo(Generated):
    """One video; `frames` are uint8 `(frames, height, width, 3)`, to be shown `fps` a second."""

    formats = tuple(VIDEO_FORMATS)
    frames: np.ndarray
    fps: int = DEFAULT_FPS

    def _write(self, path: Path, *, new: bool) -> Path:
        return write_video(self.frames, path, fps=self.fps, new=new)


def check_fps(fps: object) -> None:
    """Refuse a frame rate that no video can have.

    Raises:
        ConfigurationError: it is not an integer from 1 to 240.
    """
    if not isinstance(fps, int) or isinstance(fps, bool) or not 1 <= fps <= 240:
        raise ConfigurationError(f"fps={quoted(fps)} must be an integer from 1 to 240")
