"""Pictures at URLs, where the server may fetch them: only from the public internet, whatever names say."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from urllib.parse import SplitResult, urljoin, urlsplit

from pipeboost.core.errors import shortened
from pipeboost.serving.api.errors import ApiError, bad

_REDIRECTS = 3
_SECONDS = 20.0
_PORTS = {"http": http.client.HTTP_PORT, "https": http.client.HTTPS_PORT}
_BLOCK = 2**16
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: Address) -> bool:
    """Whether an address is anybody's on the internet: not this machine's, its network's, or a cloud's own."""
    inner = address
    if isinstance(address, ipaddress.IPv6Address):
        teredo = address.teredo[1] if address.teredo else None
        nat64 = ipaddress.IPv4Address(address.packed[-4:]) if address.packed[:12] == _NAT64 else None
        inner = address.ipv4_mapped or address.sixtofour or teredo or nat64 or address
    return all(each.is_global and not each.is_multicast for each in (address, inner))


_NAT64 = ipaddress.IPv6Address("64:ff9b::").packed[:12]


def fetched(url: str, param: str, most: int, *, allowed: Callable[[Address], bool] = is_public) -> bytes:
    """Return what is at a URL.

    Each host is looked up once, all of its addresses are checked, and one of those is connected to: no second lookup
    can give another one. Redirects are followed by the same rules. Takes no proxy from the environment.

    Args:
        most: bytes.

    Raises:
        ApiError: it may not be fetched, or cannot be.
    """
    end = time.monotonic() + _SECONDS
    for _ in range(_REDIRECTS + 1):
        parts = _checked(url, param)
        address = _resolved(parts, param, allowed)
        try:
            found = _get(parts, address, end, most)
        except (OSError, http.client.HTTPException, ValueError):
            raise _fault(param, url, "cannot be fetched") from None
        if isinstance(found, bytes):
            return found
        if isinstance(found, int):
            raise _fault(param, url, f"is larger than {most} bytes" if found == 200 else f"was answered by {found}")
        url = urljoin(url, found)
    raise _fault(param, url, f"is redirected more than {_REDIRECTS} times")


def _fault(param: str, url: str, why: str) -> ApiError:
    return bad(param, f"{param} {shortened(repr(url), 100)} {why}", "invalid_image_url")


def _checked(url: str, param: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _fault(param, url, "is no URL") from None
    plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in _PORTS or not parts.hostname or "@" in parts.netloc or not plain or port == 0:
        raise _fault(param, url, "must be http:// or https://, a host and a path")
    return parts


def _resolved(parts: SplitResult, param: str, allowed: Callable[[Address], bool]) -> str:
    port = parts.port or _PORTS[parts.scheme]
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        addresses = [str(each[4][0]).partition("%")[0] for each in found]
    except (OSError, UnicodeError):
        raise _fault(param, parts.geturl(), "has a host that is not known") from None
    if not addresses or not all(allowed(ipaddress.ip_address(each)) for each in addresses):
        raise _fault(param, parts.geturl(), "is not on the public internet, and others are not fetched")
    return addresses[0]


def _get(parts: SplitResult, address: str, end: float, most: int) -> bytes | str | int:
    """Return the content of a URL, where else it is, or the status that keeps it from being fetched."""
    port, host = parts.port or _PORTS[parts.scheme], str(parts.hostname)
    connection = http.client.HTTPConnection(host, port)
    plain = socket.create_connection((address, port), timeout=_left(end))
    sockets = [plain]

    def expire() -> None:
        with contextlib.suppress(OSError):  # it is closed already
            sockets[-1].shutdown(socket.SHUT_RDWR)

    # A timeout of the socket begins anew with each byte.
    timer = threading.Timer(_left(end), expire)
    timer.daemon = True
    timer.start()
    try:
        if parts.scheme == "https":
            sockets.append(ssl.create_default_context().wrap_socket(plain, server_hostname=host))
        connection.sock = sockets[-1]
        path = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
        named = host if ":" not in host else f"[{host}]"
        shown = named if port == _PORTS[parts.scheme] else f"{named}:{port}"
        connection.putrequest("GET", path, skip_host=True)
        connection.putheader("Host", shown)
        connection.putheader("Accept", "image/*")
        connection.putheader("Connection", "close")
        connection.endheaders()
        answer = connection.getresponse()
        where = answer.getheader("Location")
        if answer.status in (301, 302, 303, 307, 308) and where:
            return where
        if answer.status != 200:
            return answer.status
        content = bytearray()
        while block := answer.read(_BLOCK):
            content += block
            if len(content) > most:
                return answer.status
        _left(end)
        return bytes(content)
    finally:
        timer.cancel()
        connection.close()
        plain.close()


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
