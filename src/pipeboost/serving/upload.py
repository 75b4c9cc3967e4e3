"""`put`: copies of results in an object store or a folder that others serve from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipeboost.core.errors import ConfigurationError, MissingPackageError, PipeboostError, quoted, shortened

SCHEMES = ("s3", "gs", "az", "file")
RETRIES = 5
RETRY_SECONDS = 60.0
"""How long one file is tried again for, while the store is down or slow."""
_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".mp4": "video/mp4",
}
_S3_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


class UploadError(PipeboostError):
    """Results could not be copied to where `--upload` says. The message names the place."""


def check_prefix(prefix: str) -> None:
    """Refuse a URL that nothing can be put below; whether the store answers shows with the first file.

    Raises:
        ConfigurationError: another scheme, no bucket, or credentials in the environment that cannot be read.
        MissingPackageError: obstore is not installed.
    """
    _store(prefix)


def put(prefix: str, files: Iterable[Path]) -> tuple[str, ...]:
    """Copy files below a URL and return the URL of each; those already there are replaced.

    Credentials, regions and endpoints come from the environment, under the names that the stores' own tools read.

    Args:
        prefix: such as `s3://bucket/folder`, `gs://…`, `az://…` or `file:///folder`.

    Raises:
        UploadError: the store refused a file, or was not reached after several trials.
    """
    import obstore

    store, urls = _store(prefix), []
    for file in files:
        url = f"{prefix.rstrip('/')}/{file.name}"
        known = {} if prefix.startswith("file:") else {"Content-Type": _TYPES.get(file.suffix.lower())}
        try:
            obstore.put(store, file.name, file, attributes={name: each for name, each in known.items() if each} or None)
        except (obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise UploadError(f"{url} cannot be written: {_first_line(error)}") from error
        urls.append(url)
    return tuple(urls)


def _store(prefix: str) -> Any:
    scheme = prefix.partition("://")[0]
    if scheme not in SCHEMES:
        allowed = ", ".join(f"{each}://" for each in SCHEMES)
        raise ConfigurationError(f"upload={quoted(prefix)} must begin with one of {allowed}")
    try:
        import obstore
        from obstore.store import from_url
    except ImportError as error:
        raise MissingPackageError("copying results to a store needs obstore: pip install obstore") from error
    settings: dict[str, Any] = {"mkdir": True}
    if scheme != "file":
        # An endpoint without TLS is used where the environment names one.
        plain = any(os.environ.get(name, "").startswith("http://") for name in _S3_ENDPOINTS)
        settings = {
            "client_options": {"allow_http": plain, "connect_timeout": "10s", "timeout": "300s"},
            "retry_config": {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_SECONDS)},
        }
    try:
        return from_url(prefix, **settings)
    except (obstore.exceptions.BaseError, OSError, ValueError) as error:
        raise ConfigurationError(f"upload={quoted(prefix)} cannot be used: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """Return what the store said, without the dump that follows it and the signatures that URLs end in."""
    return shortened(re.sub(r"\?\S+", "", str(error).partition("\n")[0]), 300)
