"""Pictures and videos as files: from the worker's pixels to what clients show."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeboost.core.errors import ConfigurationError, MissingPackageError, PipeboostError, not_one_of, one_line, quoted
from pipeboost.serving.files import write_whole

FORMATS = ("png", "jpeg", "webp")
DEFAULT_QUALITY = 95
PNG_LEVEL = 4
"""A third of the time of zlib's usual 6, for files that are a twentieth larger."""
THUMBNAIL_SIDE = 512
SHEET_COLUMNS = 5
SHEET_CELL = 256
_BT709, _LIMITED_RANGE = 1, 1


def encode_image(pixels: np.ndarray, format: str, compression: int | None = None) -> bytes:
    """Return an image as a file's bytes.

    Args:
        pixels: uint8 `(height, width, channels)`: grey, RGB or RGBA. JPEG has no transparency and gets a white ground.
        compression: quality of JPEG and WebP, from 0 to 100; None for 95. PNG loses nothing: None or 100.

    Raises:
        ConfigurationError: a format or compression that there is not.
        PipeboostError: the format has no room for so large an image.
    """
    if format not in FORMATS:
        raise not_one_of("output_format", format, FORMATS)
    whole = isinstance(compression, int) and not isinstance(compression, bool)
    if compression is not None and not (whole and 0 <= compression <= 100):
        raise ConfigurationError(f"output_compression={quoted(compression)} must be an integer from 0 to 100")
    if format == "png" and compression not in (None, 100):
        raise ConfigurationError(
            f"output_compression={compression} is for jpeg and webp; leave it out, or set output_format"
        )
    image, buffer = _image(pixels), io.BytesIO()
    if format == "jpeg" and image.mode == "RGBA":
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image).convert("RGB")
    quality = DEFAULT_QUALITY if compression is None else compression
    settings: dict[str, Any] = {"compress_level": PNG_LEVEL} if format == "png" else {"quality": quality}
    try:
        image.save(buffer, format=format.upper(), **settings)
    except (OSError, ValueError) as error:
        raise PipeboostError(
            f"an image of {image.width}x{image.height} cannot be written as {format}: {one_line(error)}"
        ) from error
    return buffer.getvalue()


def encode_video(frames: np.ndarray, fps: float, path: Path) -> None:
    """Write a video that browsers play while they load it: H.264 in yuv420p, its index before its pictures.

    It is encoded at a visually lossless rate, in memory, since PyAV hides what a write to a full disk raises.

    Args:
        frames: uint8 `(frames, height, width, 3)`. Odd sides get one row or column more, like the last one.
        path: whole when it returns; an earlier file is replaced.

    Raises:
        MissingPackageError: PyAV is not installed.
        StorageError: the file cannot be written; nothing is left of it.
    """
    av = _pyav()
    height, width = (side + side % 2 for side in frames.shape[1:3])
    buffer = io.BytesIO()
    with av.open(
        buffer, "w", format="mp4", options={"movflags": "faststart"}, io_open=lambda *_: _SecondReader(buffer)
    ) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "17"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        codec = stream.codec_context
        codec.color_range, codec.colorspace, codec.color_primaries, codec.color_trc = _LIMITED_RANGE, *[_BT709] * 3
        for frame in frames:
            padding = ((0, height - frame.shape[0]), (0, width - frame.shape[1]), (0, 0))
            even = np.pad(frame, padding, mode="edge") if padding[0][1] or padding[1][1] else frame
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    write_whole(path, buffer.getvalue())


def thumbnail(frames: np.ndarray) -> bytes:
    """Return the frame in the middle of a video, small, as WebP.

    Args:
        frames: uint8 `(frames, height, width, 3)`.
    """
    image = _image(frames[len(frames) // 2])
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return encode_image(np.asarray(image), "webp", 80)


def spritesheet(frames: np.ndarray) -> bytes:
    """Return evenly spread frames of a video, row by row in one JPEG: at most 25 of at most 256 pixels a side.

    Args:
        frames: uint8 `(frames, height, width, 3)`.
    """
    chosen = np.unique(np.linspace(0, len(frames) - 1, SHEET_COLUMNS**2).round().astype(int))
    cells = [_image(frames[each]) for each in chosen]
    for cell in cells:
        cell.thumbnail((SHEET_CELL, SHEET_CELL))
    width, height = cells[0].size
    columns = min(SHEET_COLUMNS, len(cells))
    sheet = Image.new("RGB", (columns * width, -(-len(cells) // columns) * height))
    for number, cell in enumerate(cells):
        sheet.paste(cell, (number % columns * width, number // columns * height))
    return encode_image(np.asarray(sheet), "jpeg", 85)


def _image(pixels: np.ndarray) -> Image.Image:
    assert pixels.dtype == np.uint8, pixels.dtype
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingPackageError("writing a video needs PyAV: pip install av") from error
    return av


class _SecondReader:
    """Reads, at a place of its own, what is being written to a buffer: so the index is moved to the front."""

    def __init__(self, buffer: io.BytesIO) -> None:
        self._buffer = buffer
        self._place = 0

    def read(self, size: int) -> bytes:
        with self._buffer.getbuffer() as view:
            data = bytes(view[self._place : self._place + size])
        self._place += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._buffer.getbuffer().nbytes}[whence]
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def close(self) -> None:
        pass
