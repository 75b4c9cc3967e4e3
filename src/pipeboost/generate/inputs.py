"""Pictures that a request starts from: read from a path or an http(s) URL, turned upright, in RGB."""

from __future__ import annotations

import io
import os
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import Future, wait

from PIL import Image, ImageOps

from pipeboost.core.errors import ConfigurationError, one_line, quoted, shortened
from pipeboost.core.user_files import read_file

LARGEST_IMAGE = 64 * 2**20
SECONDS_TO_WAIT = 30.0
# Of Pillow's some forty formats, those that models are given; others run interpreters or decoders that nobody watches.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")


def load_image(source: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """A picture as Diffusers' own `load_image` gives it: turned as its EXIF data says, in RGB.

    Args:
        source: a path, an http(s) URL, or a picture.

    Raises:
        ConfigurationError: it is missing, does not come within 30 s or 64 MiB, or is no picture in one of `FORMATS`.
    """
    if not isinstance(source, (Image.Image, str, os.PathLike)):
        raise ConfigurationError(f"image_path={quoted(source)} must be a path, an http(s) URL or a picture")
    Image.init()
    known = [each for each in FORMATS if each in Image.OPEN]
    name, data = "given", b""
    if not isinstance(source, Image.Image):
        name = shortened(os.fsdecode(source))
        web = name.lower().startswith(("http://", "https://"))
        if "://" in name and not web:
            raise ConfigurationError(f"image {name} cannot be fetched; only http and https addresses can")
        data = _download(os.fspath(source)) if web else read_file(source, "image", most=LARGEST_IMAGE)
    try:
        return _rgb(source if isinstance(source, Image.Image) else Image.open(io.BytesIO(data), formats=known))
    except Image.DecompressionBombError as error:
        raise ConfigurationError(f"image {name} is too large: {one_line(error)}") from error
    except Exception as error:  # damaged data makes decoders raise anything
        raise ConfigurationError(
            f"image {name} cannot be read as a picture; it may be damaged, or not in one of {', '.join(known)}"
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        # Pillow would cut 16-bit values off at 255, which makes nearly all of them white.
        upright = upright.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    return upright.convert("RGB")


def _download(url: str) -> bytes:
    """What a server sends, whatever it does, within the time: a time-out of sockets only bounds each of their reads."""
    answer: Future[bytes] = Future()
    until = time.monotonic() + SECONDS_TO_WAIT

    def fetch() -> None:
        try:
            answer.set_result(_body(url, until))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=fetch, daemon=True, name="pipeboost-download").start()
    name = f"image {shortened(url)}"
    wait([answer], timeout=SECONDS_TO_WAIT)
    error = answer.exception() if answer.done() else TimeoutError()
    if error is None:
        if len(answer.result()) > LARGEST_IMAGE:
            raise ConfigurationError(f"{name} is larger than {LARGEST_IMAGE // 2**20} MiB; download it, give its path")
        return answer.result()
    if isinstance(error, TimeoutError):
        why = f"it did not come within {SECONDS_TO_WAIT:g} s"
    elif isinstance(error, urllib.error.HTTPError):
        why = f"the server answered {error.code}" + (f", {one_line(error)}" if error.code < 400 else "")
    else:
        why = shortened(str(getattr(error, "reason", None) or error)) or type(error).__name__
    raise ConfigurationError(f"{name} cannot be fetched: {why}") from error


def _body(url: str, until: float) -> bytes:
    web, data = urllib.request.build_opener(), bytearray()
    vars(web)["handle_open"].pop("ftp", None)  # to which a redirection may lead
    request = urllib.request.Request(url, headers={"User-Agent": "pipeboost"})
    with web.open(request, timeout=SECONDS_TO_WAIT) as response:
        while len(data) <= LARGEST_IMAGE and time.monotonic() < until and (part := response.read1(2**16)):
            data += part
    if time.monotonic() >= until:
        raise TimeoutError
    return bytes(data)
