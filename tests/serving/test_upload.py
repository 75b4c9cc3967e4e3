"""Results reach object stores, through their failures, or say in one sentence why they do not."""

import http.server
import threading
from urllib.parse import urlsplit

import pytest

from pipeboost.core.errors import ConfigurationError
from pipeboost.serving import upload
from pipeboost.serving.upload import UploadError, check_prefix, put

obstore = pytest.importorskip("obstore")


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "0.png").write_bytes(b"an image")
    (folder / "1.mp4").write_bytes(bytes(6 * 2**20))  # more than one part of a multipart upload
    return [folder / "0.png", folder / "1.mp4"]


@pytest.fixture
def credentials(monkeypatch):
    """Credentials and an endpoint, as the environment gives them."""

    def set_endpoint(url):
        for name, value in {
            "AWS_ACCESS_KEY_ID": "testing-key",
            "AWS_SECRET_ACCESS_KEY": "testing-secret",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": url,
        }.items():
            monkeypatch.setenv(name, value)

    return set_endpoint


def test_a_folder_is_made_and_holds_the_files(tmp_path, files):
    prefix = f"file://{tmp_path}/kept/img_1"
    check_prefix(prefix)
    assert put(prefix, files) == (f"{prefix}/0.png", f"{prefix}/1.mp4")
    files[0].write_bytes(b"another")
    assert put(f"{prefix}/", files[:1]) == (f"{prefix}/0.png",)
    kept = tmp_path / "kept" / "img_1"
    assert (kept / "0.png").read_bytes() == b"another"
    assert (kept / "1.mp4").read_bytes() == files[1].read_bytes()
    assert sorted(path.name for path in kept.iterdir()) == ["0.png", "1.mp4"]


@pytest.mark.parametrize("prefix", ["/tmp/x", "ftp://host/x", "http://host/x", "s3://", "", "file"])
def test_other_places_are_refused(prefix):
    with pytest.raises(ConfigurationError, match="upload=") as caught:
        check_prefix(prefix)
    assert "\n" not in str(caught.value)


class _Stubborn(http.server.BaseHTTPRequestHandler):
    """Takes objects after it was asked more than `refusals` times."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked += 1
        status = 200 if self.server.asked > self.server.refusals else self.server.status
        if status == 200:
            self.server.taken[urlsplit(self.path).path] = (body, self.headers["Content-Type"])
        self.send_response(status)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def stubborn(credentials):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Stubborn)
    server.asked, server.refusals, server.status, server.taken = 0, 0, 503, {}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    credentials(f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_store_that_is_down_for_a_moment_is_asked_again(stubborn, files):
    stubborn.refusals = 2
    assert put("s3://bucket/results/img_1", files[:1]) == ("s3://bucket/results/img_1/0.png",)
    assert stubborn.taken == {"/bucket/results/img_1/0.png": (b"an image", "image/png")}
    assert stubborn.asked == 3


def test_a_store_that_stays_down_or_refuses_is_one_sentence_without_credentials(stubborn, files, monkeypatch):
    monkeypatch.setattr(upload, "RETRIES", 1)
    for status in (503, 403):
        stubborn.refusals, stubborn.status, stubborn.asked = 99, status, 0
        with pytest.raises(UploadError, match=r"s3://bucket/0\.png cannot be written: .") as caught:
            put("s3://bucket", files[:1])
        assert "\n" not in str(caught.value)
        assert "testing" not in str(caught.value)
        assert stubborn.asked == (2 if status == 503 else 1)


def test_a_url_that_an_error_names_is_shown_without_its_signature(files, monkeypatch):
    def refuse(*arguments, **settings):
        raise OSError("Error performing PUT https://a.blob/c/0.png?sv=1&sig=abcd in 2 ms\n\nDebug source: sig=abcd")

    monkeypatch.setattr(obstore, "put", refuse)
    with pytest.raises(UploadError, match=r"PUT https://a\.blob/c/0\.png in 2 ms$"):
        put(f"file://{files[0].parent}/kept", files[:1])


def test_a_real_s3_server_holds_what_was_put_there(credentials, files):
    server = pytest.importorskip("moto.server", reason="needs moto: pip install 'moto[server]'")
    import boto3

    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    try:
        url = "http://{}:{}".format(*running.get_host_and_port())
        credentials(url)
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        client.create_bucket(Bucket="results")
        assert put("s3://results/a/img_1", files) == ("s3://results/a/img_1/0.png", "s3://results/a/img_1/1.mp4")
        for file, kind in zip(files, ("image/png", "video/mp4"), strict=True):
            found = client.get_object(Bucket="results", Key=f"a/img_1/{file.name}")
            assert found["Body"].read() == file.read_bytes()
            assert found["ContentType"] == kind
        with pytest.raises(UploadError, match=r"s3://missing/0\.png cannot be written"):
            put("s3://missing", files[:1])
    finally:
        running.stop()
