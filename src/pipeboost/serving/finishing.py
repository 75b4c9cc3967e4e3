"""From the arrays that the worker made to finished files in the format that was asked for."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from pipeboost.serving.jobs import Job, Paths, Result
from pipeboost.serving.parts import Media, Ran

VIDEO, THUMBNAIL, SPRITESHEET = "video.mp4", "thumbnail.webp", "spritesheet.jpeg"


def finished(job: Job, ran: Ran, media: Media, paths: Paths, fps: float) -> Result:
    """Encode what a job made, each file under its name only once it is whole, and delete the arrays.

    Args:
        fps: frames a second of a video where neither the request nor the model says so.
    """
    folder = paths.of(job.id)
    names: list[str] = []
    width = height = 0
    for number, path in enumerate(ran.arrays):
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        height, width = pixels.shape[-3:-1]
        if job.kind == "video":
            wanted = float(job.wire.get("fps") or ran.fps or fps)
            media.encode_video(pixels, wanted, folder / f"part.{VIDEO}")
            _place(folder, THUMBNAIL, media.thumbnail(pixels))
            _place(folder, SPRITESHEET, media.spritesheet(pixels))
            os.replace(folder / f"part.{VIDEO}", folder / VIDEO)
            names.append(VIDEO)
        else:
            format = str(job.wire.get("output_format", "png"))
            picture = pixels[0] if pixels.ndim == 4 else pixels
            name = f"image_{number}.{format}"
            _place(folder, name, media.encode_image(picture, format, job.wire.get("output_compression")))
            names.append(name)
    for path in ran.arrays:
        path.unlink(missing_ok=True)
    return Result(
        files=tuple(names),
        seeds=ran.seeds,
        plan=ran.plan,
        steps=ran.steps,
        seconds=ran.seconds,
        stages=dict(ran.stages),
        width=int(width),
        height=int(height),
        notes=ran.notes,
    )


def _place(folder: Path, name: str, content: bytes) -> None:
    part = folder / f"part.{name}"
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / name)
