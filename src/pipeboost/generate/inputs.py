"""Pictures that a request starts from: read from a path or an http(s) URL, turned upright, in RGB."""

from __future__ import annotations

import io
import os
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path

from PIL import Image, ImageOps

from pipeboost.errors import ConfigurationError

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
        return ImageOps.exif_transpose(source).convert("RGB")
    name = os.fspath(source)
    data = _download(name) if urllib.parse.urlsplit(name).scheme in ("http", "https") else _read(name)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError as error:
        raise ConfigurationError(f"image {name} is too large: {error}") from error
    # Pillow's decoders raise any of these on damaged data.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise ConfigurationError(f"image {name} cannot be read as a picture; it may be damaged") from error


def _read(name: str) -> bytes:
    path = Path(name).expanduser()
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"image {name} cannot be read: {error.strerror or error}") from error


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "pipeboost"})
    try:
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
