"""Pictures at URLs: fetched only where that is allowed, and from the public internet alone."""

import contextlib
import http.server
import ipaddress
import socket
import threading
import time

import httpx
import pytest

from pipeboost.serving.api import fetch
from pipeboost.serving.api.errors import ApiError
from pipeboost.serving.api.fetch import fetched, is_public
from tests.serving.standins import serving
from tests.serving.test_videos import png

ASKED: list[tuple[str, str]] = []


class Site(http.server.BaseHTTPRequestHandler):
    asked = ASKED

    def do_GET(self):
        self.asked.append((self.path, self.headers["Host"]))
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path == "/loop":
            self.send_response(301)
            self.send_header("Location", "/loop")
            self.end_headers()
        elif self.path in ("/slow", "/drip"):
            if self.path == "/drip":
                self.send_response(200)
                self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b"H")
                    time.sleep(0.05)
        elif self.path == "/missing":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(b"x" * 100_000 if self.path == "/long" else png())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("address", "public"),
    [("1.1.1.1", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False),
     ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False),
     ("224.0.0.1", False),
     ("255.255.255.255", False), ("::1", False), ("fe80::1", False), ("fc00::1", False), ("::ffff:127.0.0.1", False),
     ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False), ("::", False), ("ff02::1", False)],
)  # fmt: skip
def test_only_addresses_of_the_internet_are_public(address, public):
    assert is_public(ipaddress.ip_address(address)) is public


def test_what_is_at_a_url_is_fetched_through_redirects(site):
    anywhere = lambda address: True  # noqa: E731
    assert fetched(f"{site}/picture.png?a=b#c", "image", 10_000, allowed=anywhere) == png()
    assert Site.asked[-1] == ("/picture.png?a=b", site.removeprefix("http://"))
    assert fetched(f"{site}/to//picture.png", "image", 10_000, allowed=anywhere) == png()
    for path, says in (
        ("/long", "is larger than 10000 bytes"),
        ("/missing", "was answered by 404"),
        ("/loop", "3 times"),
    ):
        with pytest.raises(ApiError, match=says):
            fetched(site + path, "image", 10_000, allowed=anywhere)


def test_a_redirect_to_where_nothing_may_be_fetched_is_refused(site):
    port = int(site.rpartition(":")[2])
    asked = len(Site.asked)

    def only_one(address):
        return address == ipaddress.ip_address("127.0.0.1")

    with pytest.raises(ApiError, match="not on the public internet"):
        fetched(f"{site}/to/http://127.0.0.2:{port}/picture.png", "image", 10_000, allowed=only_one)
    assert len(Site.asked) == asked + 1


def test_a_host_is_looked_up_once_and_all_of_its_addresses_count(site, monkeypatch):
    port, answers = int(site.rpartition(":")[2]), []

    def lookup(host, port, **_):
        answers.append(host)
        address = "127.0.0.1" if len(answers) == 1 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    real = socket.getaddrinfo
    monkeypatch.setattr(
        fetch.socket, "getaddrinfo", lambda host, *a, **k: (lookup if host == "name" else real)(host, *a, **k)
    )
    assert fetched(f"http://name:{port}/x", "image", 10_000, allowed=lambda _: True) == png()
    assert answers == ["name"]
    assert Site.asked[-1] == ("/x", f"name:{port}")
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in ("1.1.1.1", "127.0.0.1")]
    monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(ApiError, match="not on the public internet"):
        fetched(f"http://name:{port}/x", "image", 10_000)


@pytest.mark.parametrize("url", ["ftp://a.example/x", "http://", "http://a:b@a.example/", "http://a.example:x/",
                                 "http:/x", "http://a.example/\n", "httpx://a", "http://127.1/", "http://0x7f.1/", "http://[::1]/",
                                 "http://localhost/x"])  # fmt: skip
def test_other_urls_are_refused(url):
    with pytest.raises(ApiError) as refused:
        fetched(url, "image", 10_000)
    assert (refused.value.status, refused.value.param) == (400, "image")


def test_urls_are_off_unless_they_are_allowed(tmp_path, site, monkeypatch):
    ask = {"prompt": "x", "image": f"{site}/picture.png"}
    monkeypatch.setattr(fetched, "__kwdefaults__", {"allowed": lambda _: True})
    with serving(tmp_path) as server:
        answer = httpx.post(f"{server.url}/v1/images/edits", json=ask)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_image")
    with serving(tmp_path / "b", allow_image_urls=True) as server:
        assert httpx.post(f"{server.url}/v1/images/edits", json=ask).status_code == 200
        assert server.worker.ran[-1].call.images == ("input_0.png",)


@pytest.mark.parametrize("path", ["/slow", "/drip"])
def test_a_site_that_sends_a_byte_now_and_then_is_left(site, monkeypatch, path):
    monkeypatch.setattr(fetch, "_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(ApiError, match="cannot be fetched"):
        fetched(site + path, "image", 10_000, allowed=lambda _: True)
    assert time.monotonic() - start < 2
