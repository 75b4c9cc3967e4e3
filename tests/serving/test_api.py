"""OpenAI's own client against a server over HTTP: images, their errors, and who may ask."""

import base64
import io
import json

import httpx
import openai
import pytest
from PIL import Image

from tests.serving.standins import serving

KEY = "a-key-of-some-length"


def client_of(server, key="unused-here", **settings):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, **settings)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("data")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_an_image_has_the_size_the_seed_and_the_format_that_were_asked_for(client):
    raw = client.images.with_raw_response.generate(
        prompt="x", n=2, size="32x48", output_format="webp", extra_body={"seed": 7, "num_inference_steps": 3}
    )
    made = raw.parse()
    images = [picture(each.b64_json) for each in made.data]
    assert [(image.size, image.format) for image in images] == [((32, 48), "WEBP")] * 2
    assert [image.convert("RGB").getpixel((0, 0))[0] for image in images] == [7, 8]
    assert (made.size, made.output_format, made.background) == ("32x48", "webp", "opaque")
    told = made.model_extra["pipeboost"]
    assert (told["seeds"], told["plan"], told["steps"], told["notes"]) == ([7, 8], "plan0", 3, ["a note"])
    assert raw.headers["x-pipeboost-seed"] == "7"
    assert raw.headers["x-request-id"].startswith("req_")


def test_without_anything_but_a_prompt_the_model_decides_and_the_seed_is_told(client, server):
    made = client.images.generate(prompt="x", model="pipeboost-demo", quality="auto", user="me", style="vivid")
    assert picture(made.data[0].b64_json).size == (64, 32)
    assert server.worker.ran[-1].call.seed == made.model_extra["pipeboost"]["seed"]
    assert server.worker.ran[-1].call.width is None


def test_compression_changes_the_file(client):
    files = [
        client.images.generate(prompt="x", output_format="jpeg", output_compression=c, extra_body={"seed": 1})
        for c in (100, 100, 1)
    ]
    first, again, coarse = (made.data[0].b64_json for made in files)
    assert first == again != coarse


def test_a_url_is_that_of_the_finished_file(client, server):
    url = client.images.generate(prompt="x", response_format="url", extra_body={"seed": 9}).data[0].url
    answer = httpx.get(url)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert Image.open(io.BytesIO(answer.content)).getpixel((0, 0))[0] == 9


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"frame_count": 3}, "frame_count", "frame_count=3: there is no such field"),
        ({"n": 11}, "n", "n=11: it must be less than or equal to 10"),
        ({"n": "1"}, "n", "n='1': it must be a valid integer"),
        ({"size": "big"}, "size", "must be auto or WIDTHxHEIGHT"),
        ({"size": "33x32"}, "size", "width=33 is not a multiple of 16, as SquarePipeline needs; use 32 or 48"),
        ({"size": "32x32", "width": 64}, "size", "contradicts width=64"),
        ({"size": "8192x8192"}, "size", "use 4096x4096 or less"),
        ({"output_format": "gif"}, "output_format", "it must be 'png', 'jpeg' or 'webp'"),
        ({"output_compression": 50}, "output_compression", "is for jpeg and webp"),
        ({"background": "transparent"}, "background", "it must be 'auto' or 'opaque'"),
        ({"moderation": "low"}, "moderation", "it must be 'auto'"),
        ({"partial_images": 2}, "partial_images", "needs stream=true"),
        ({"stream": True, "n": 2}, "n", "cannot be streamed"),
        ({"quality": "ultra"}, "quality", "it must be 'auto'"),
        ({"quality": "lossless"}, "quality", "is above 'fast'"),
        ({"flow_shift": 3.0}, "flow_shift", "SquarePipeline has no such argument"),
        ({"num_inference_steps": 201}, "num_inference_steps", "use at most 200"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**63 - 1, "n": 2}, "seed", "leaves no room"),
        ({"lora": "../x"}, "lora", "is no adapter of this server; this server has none"),
        ({"prompt": "  "}, "prompt", "prompt is empty"),
        ({"prompt": "x" * 10_001}, "prompt", "more than 10000"),
        ({"prompt": None}, "prompt", "prompt is missing"),
        ({"extra_body": {"seed": 1}, "seed": 2}, "seed", "contradicts extra_body[seed]"),
        ({"guidance_scale": 1e400}, None, "not valid JSON"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(server, fields, param, says):
    answer = httpx.post(f"{server.url}/v1/images/generations", content=json.dumps({"prompt": "x", **fields}))
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert says in error["message"]


def test_errors_raise_the_classes_of_the_client(client, server):
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="x", size="17x16")
    assert (refused.value.param, refused.value.code) == ("size", "invalid_value")
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(prompt="x", model="gpt-image-2")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.InternalServerError) as failed:
        client.images.generate(prompt="fail")
    assert failed.value.code == "out_of_memory"
    assert failed.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert [model.id for model in client.models.list()] == ["pipeboost-demo"]


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/images/generations", b"{", 400),
        ("POST", "/v1/images/generations", b"[]", 400),
        ("POST", "/v1/images/generations", b'{"prompt": "\\ud800"}', 400),
        ("POST", "/v1/images/generations", b'{"prompt": "x", "\\ud800": 1}', 400),
        ("POST", "/v1/images/generations", b"[" * 100_000, 400),
        ("GET", "/v1/images/generations", b"", 405),
        ("GET", "/nowhere", b"", 404),
        ("GET", "/v1/videos?limit=x", b"", 400),
        ("GET", "/v1/videos?after=video_x", b"", 400),
        ("GET", "/v1/jobs/..%2f..%2fetc", b"", 404),
    ],
)
def test_every_fault_is_the_envelope(server, method, path, content, status):
    answer = httpx.request(method, server.url + path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_a_fault_of_our_own_shows_nothing_of_the_inside(server, caplog):
    with caplog.at_level("INFO", "pipeboost.serving"):
        answer = httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "bug"})
    assert answer.status_code == 500
    assert str(server.store.paths.data) not in answer.text
    assert "the server failed to run this" in answer.text


def test_a_key_is_needed_where_there_is_one_and_jobs_are_its_own(tmp_path):
    with serving(tmp_path, api_key=(KEY, "another-key-here")) as server:
        with pytest.raises(openai.AuthenticationError) as refused:
            client_of(server, "wrong-key-at-all").images.generate(prompt="x")
        assert refused.value.code == "invalid_api_key"
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
        job = client_of(server, KEY).images.generate(prompt="x").model_extra["pipeboost"]["id"]
        other = {"authorization": "Bearer another-key-here"}
        for path in (f"/v1/jobs/{job}", f"/v1/jobs/{job}/files/0", f"/v1/jobs/{job}/events"):
            assert httpx.get(server.url + path, headers={"authorization": f"bearer {KEY}"}).status_code == 200
            assert httpx.get(server.url + path, headers=other).status_code == 404
        assert httpx.delete(f"{server.url}/v1/jobs/{job}", headers=other).status_code == 404
        assert httpx.get(f"{server.url}/v1/jobs", headers=other).json()["data"] == []
        assert KEY not in str(server.store.jobs)


def test_a_page_of_the_web_cannot_reach_a_server_on_loopback(server):
    ask = f"{server.url}/v1/jobs"
    assert httpx.get(ask, headers={"host": "evil.example"}).status_code == 403
    assert httpx.get(ask, headers={"origin": "https://evil.example"}).status_code == 403
    assert httpx.get(ask, headers={"origin": "null"}).status_code == 403
    assert httpx.get(ask, headers={"origin": server.url}).status_code == 200
    assert "access-control-allow-origin" not in httpx.get(ask, headers={"origin": server.url}).headers


def test_a_site_that_is_named_may_ask(tmp_path):
    site = "https://app.example"
    with serving(tmp_path, cors_origin=(site,)) as server:
        answer = httpx.get(f"{server.url}/v1/jobs", headers={"origin": site})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, site)
        ask = {"origin": site, "access-control-request-method": "POST"}
        assert httpx.options(f"{server.url}/v1/videos", headers=ask).status_code == 200


def test_a_body_is_not_read_beyond_its_limit(tmp_path):
    with serving(tmp_path, max_body=0.001) as server:
        ask = f"{server.url}/v1/images/generations"
        assert httpx.post(ask, content=b"x" * 2000).status_code == 413
        assert httpx.post(ask, content=iter([b"x" * 600] * 4)).status_code == 413
        assert httpx.post(ask, json={"prompt": "x"}).status_code == 200
