"""Pictures that clients send, checked before they are decoded, and written anew as PNG before the worker sees them."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import re
import warnings
from collections.abc import Sequence

from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from pipeboost.core.errors import shortened
from pipeboost.serving.api.errors import bad
from pipeboost.serving.api.fetch import fetched
from pipeboost.serving.settings import Settings

_FORMATS = ("PNG", "JPEG", "WEBP")
_DATA = re.compile(r"data:image/[\w.+-]+(;[\w=.+-]+)*;base64,", re.IGNORECASE)
MOST = 16
"""Pictures of one request, as OpenAI has it."""


def from_text(text: str, param: str, settings: Settings) -> bytes:
    """Return the picture in a data URL, or at a URL where those are fetched.

    Raises:
        ApiError: it is none, or not to be had.
    """
    match = _DATA.match(text)
    if not match and settings.allow_image_urls and text[:4].lower() == "http":
        return fetched(text, param, int(settings.max_body * 2**20))
    if not match:
        raise bad(param, f"{param} {shortened(repr(text), 60)} is no data URL; send the picture itself, as a file or "
                  "as data:image/png;base64,…", "invalid_image")  # fmt: skip
    try:
        return base64.b64decode(text[match.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise bad(param, f"{param} is a data URL, but not of valid base64", "invalid_image") from None


async def from_texts(given: Sequence[tuple[str, str]], settings: Settings) -> list[bytes]:
    """Return the pictures of texts, each with the name of its field; several at once where they are fetched."""
    return await asyncio.gather(*(asyncio.to_thread(from_text, text, param, settings) for param, text in given))


def prepared(contents: Sequence[bytes], mask: bytes | None, param: str, most_pixels: int) -> dict[str, bytes]:
    """Return pictures as PNG files by their names: `input_0.png`, …, and `mask.png`, white where to paint.

    Raises:
        ApiError: one is no picture, too large, or the mask is of another size than the first one.
    """
    files = {}
    first = (0, 0)
    for number, content in enumerate(contents):
        picture = _opened(content, param, most_pixels)
        first = first if number else picture.size
        files[f"input_{number}.png"] = _png(_decoded(picture, param).convert("RGB"))
    if mask is not None:
        opened = _opened(mask, "mask", most_pixels)
        if "A" not in opened.getbands() and "transparency" not in opened.info:
            raise bad("mask", "mask has no transparent pixels, which would say where to edit; send a PNG with alpha")
        decoded = _decoded(opened, "mask")
        if decoded.size != first:
            sizes = f"{decoded.width}x{decoded.height} pixels, but the picture {first[0]}x{first[1]}"
            raise bad("mask", f"mask has {sizes}; make them equal")
        alpha = decoded.convert("RGBA").getchannel("A")
        files["mask.png"] = _png(ImageChops.invert(alpha))
    return files


def _opened(content: bytes, param: str, most_pixels: int) -> Image.Image:
    """Read the header of a picture; no pixel is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise bad(param, f"{param} has more than {most_pixels} pixels; send a smaller one", "image_too_large") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise bad(param, f"{param} is no PNG, JPEG or WebP picture", "invalid_image") from None
    if picture.width * picture.height > most_pixels:
        size = f"{picture.width}x{picture.height}"
        raise bad(param, f"{param} is {size}, more than {most_pixels} pixels; send a smaller one", "image_too_large")
    return picture


def _decoded(picture: Image.Image, param: str) -> Image.Image:
    try:
        picture.load()
        return ImageOps.exif_transpose(picture)
    except Exception as error:  # decoders raise whatever a damaged file makes them
        raise bad(param, f"{param} is damaged and cannot be decoded", "invalid_image") from error


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
