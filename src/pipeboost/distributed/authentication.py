"""Signatures: a message from another rank is used only where it has one by a secret that the ranks share."""

from __future__ import annotations

import hashlib
import hmac
import os

from pipeboost.core.errors import PipeboostError

VARIABLE = "RANK_SECRET"
"""In the environment of every rank: drawn anew by `launch`; under torchrun the user may set it."""
LENGTH = hashlib.sha256().digest_size
"""Bytes of a signature."""


class ForgeryError(PipeboostError):
    """A message is not signed by one of the ranks."""


def shared_secret() -> bytes:
    """Return the secret of all ranks; empty where nobody has set one, and signatures show damage alone."""
    return os.environ.get(VARIABLE, "").encode()


def sign(content: bytes, about: str, secret: bytes) -> bytes:
    """Return the content after its signature, which holds for messages about the same thing only."""
    return hmac.digest(secret, about.encode() + b"\0" + content, "sha256") + content


def verify(message: bytes, about: str, secret: bytes) -> bytes:
    """Return the content that was signed.

    Raises:
        ForgeryError: it was not, or not with this secret, or about something else.
    """
    content = message[LENGTH:]
    if not hmac.compare_digest(message, sign(content, about, secret)):
        raise ForgeryError(f"a message about {about!r} is not signed by a rank of this world; {VARIABLE} must be equal")
    return content
