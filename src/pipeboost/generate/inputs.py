"""Pictures that a request starts from: read from a path or an http(s) URL, turned upright, in RGB."""

from __future__ import annotations

import io
import os
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from PIL import Image, ImageOps

from pipeboost.core.errors import ConfigurationError

LARGEST_DOWNLOAD = 64 * 2**20
SECONDS_TO_WAIT = 30.0


def load_image(source: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """A picture as Diffusers' own `load_image` gives it: turned as its EXIF data says, in RGB.

    Args:
        source: a path, an http(s) URL, or a picture.

    Raises:
        ConfigurationError: it is missing, does not come within 30 s or 64 MiB, or is no picture.
    """
    if isinstance(source, Image.Image):
        return _rgb(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigurationError(f"image_path={source!r} must be a path, an http(s) URL or a picture")
    name = os.fspath(source)
    data = _download(name) if name.lower().startswith(("http://", "https://")) else _read(name)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _rgb(image)
    except Image.DecompressionBombError as error:
        raise ConfigurationError(f"image {name} is too large: {error}") from error
    # Pillow's decoders raise any of these on damaged data.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise ConfigurationError(f"image {name} cannot be read as a picture; it may be damaged") from error


def _rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        # Pillow would cut 16-bit values off at 255, which makes nearly all of them white.
        upright = upright.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    return upright.convert("RGB")


def _read(name: str) -> bytes:
    try:
        return Path(name).expanduser().read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"image {name} cannot be read: {reason}") from error


def _download(url: str) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "pipeboost"})
        with urllib.request.urlopen(request, timeout=SECONDS_TO_WAIT) as response:
            data: bytes = response.read(LARGEST_DOWNLOAD + 1)
    except urllib.error.HTTPError as error:
        raise ConfigurationError(f"image {url} cannot be fetched: the server answered {error.code}") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConfigurationError(f"image {url} cannot be fetched: {' '.join(str(reason).split())}") from error
    if len(data) > LARGEST_DOWNLOAD:
        raise ConfigurationError(
            f"image {url} is larger than {LARGEST_DOWNLOAD // 2**20} MiB; download it and give its path"
        )
    return data
