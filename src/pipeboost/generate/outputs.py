"""What a generation gives back: an image or a video with its seed, its report, and a way to save it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from pipeboost.core.errors import ConfigurationError
from pipeboost.generate.writing import IMAGE_FORMATS, VIDEO_FORMATS, output_file, write_image, write_video

if TYPE_CHECKING:
    import numpy as np

    from pipeboost.stages import Report

DEFAULT_FOLDER = Path("outputs")
DEFAULT_FPS = 16


@dataclass(frozen=True, eq=False, kw_only=True)
class Generated:
    """What an image and a video have in common.

    Attributes:
        prompt: what was asked for.
        seed: the seed that gives the same again.
        report: where the time of its call went.
        notes: what differs from what was asked.
    """

    prompt: str
    seed: int
    report: Report
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class GeneratedImage(Generated):
    """One image; `image` is the picture."""

    image: Image.Image

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write the picture and return where it is.

        Args:
            path: a `.png`, `.jpg` or `.webp` file, which is replaced if it exists; or a folder (default: `outputs`),
                in which it gets a name that is free.

        Raises:
            PipeboostError: it cannot be written; nothing is left of the file.
        """
        file = output_file(
            path, prompt=self.prompt, seed=self.seed, formats=tuple(IMAGE_FORMATS), folder=DEFAULT_FOLDER
        )
        write_image(self.image, file)
        return file


@dataclass(frozen=True, eq=False, kw_only=True)
class GeneratedVideo(Generated):
    """One video; `frames` are uint8 `(frames, height, width, 3)`, to be shown `fps` a second."""

    frames: np.ndarray
    fps: int = DEFAULT_FPS

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write the video and return where it is.

        Args:
            path: an `.mp4` file, which is replaced if it exists; or a folder (default: `outputs`), in which it gets a
                name that is free.

        Raises:
            MissingPackageError: PyAV is not installed.
            PipeboostError: it cannot be written; nothing is left of the file.
        """
        file = output_file(
            path, prompt=self.prompt, seed=self.seed, formats=tuple(VIDEO_FORMATS), folder=DEFAULT_FOLDER
        )
        write_video(self.frames, file, fps=self.fps)
        return file


def check_fps(fps: object) -> None:
    """Refuse a frame rate that no video can have.

    Raises:
        ConfigurationError: it is not an integer from 1 to 240.
    """
    if not isinstance(fps, int) or isinstance(fps, bool) or not 1 <= fps <= 240:
        raise ConfigurationError(f"fps={fps!r} must be an integer from 1 to 240")
