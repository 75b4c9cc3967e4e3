"""Streams of images: pictures on the way, signs of life, errors, and clients that go away."""

import base64
import contextlib
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from PIL import Image

from tests.serving.standins import serving
from tests.serving.test_videos import png


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("data"), heartbeat=0.05) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused-here", max_retries=0)


def until(holds, seconds=10.0):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    assert holds()


@pytest.mark.parametrize("kind", ["image_generation", "image_edit"])
def test_pictures_of_steps_come_before_the_image(client, kind):
    call = {"prompt": "x", "stream": True, "partial_images": 2, "size": "32x48", "extra_body": {"seed": 9}}
    made = client.images.edit(image=png(), **call) if kind == "image_edit" else client.images.generate(**call)
    events = list(made)
    assert [event.type for event in events] == [f"{kind}.partial_image"] * 2 + [f"{kind}.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    shown = [Image.open(io.BytesIO(base64.b64decode(event.b64_json))) for event in events]
    assert [image.size for image in shown] == [(32, 48)] * 3
    assert [image.getpixel((0, 0))[0] for image in shown] == [1, 2, 9]
    assert (events[-1].usage.total_tokens, events[-1].size, events[-1].output_format) == (0, "32x48", "png")
    assert events[-1].model_extra["pipeboost"]["seed"] == 9


def test_an_error_on_the_way_raises_in_the_client(client):
    with pytest.raises(openai.APIError) as failed:
        list(client.images.generate(prompt="fail", stream=True))
    assert failed.value.code == "out_of_memory"


def test_a_silent_stream_says_that_it_lives(server):
    server.worker.pause = 0.1
    with httpx.stream("POST", f"{server.url}/v1/images/generations", json={"prompt": "x", "stream": True}) as answer:
        lines = list(answer.iter_lines())
    server.worker.pause = 0.0
    assert lines.count(": still here") >= 3
    assert json.loads(lines[-2].removeprefix("data: "))["type"] == "image_generation.completed"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_job_and_the_next_one_runs(client, server, stream):
    before = len(server.worker.ran)
    ask = {"prompt": "slow", "stream": stream, "num_inference_steps": 100}
    url = f"{server.url}/v1/images/generations"
    with contextlib.suppress(httpx.ReadTimeout), httpx.stream("POST", url, json=ask, timeout=0.5) as answer:
        for _ in answer.iter_lines():
            if len(server.worker.ran) > before:
                break
    job = server.worker.ran[-1].id
    until(lambda: server.store.jobs[job].state == "cancelled")
    assert client.images.generate(prompt="x").data


def test_a_client_with_an_idempotency_key_finds_its_image_when_it_comes_again(server):
    ask = {"json": {"prompt": "x"}, "headers": {"idempotency-key": "one"}}
    url = f"{server.url}/v1/images/generations"
    server.worker.pause = 0.3
    with pytest.raises(httpx.TimeoutException):
        httpx.post(url, timeout=0.2, **ask)
    server.worker.pause = 0.0
    job = server.worker.ran[-1].id
    assert httpx.post(url, **ask).json()["pipeboost"]["id"] == job
    assert httpx.post(url, json={"prompt": "y"}, headers=ask["headers"]).status_code == 422
    assert server.store.jobs[job].attempt == 1


def test_a_retry_of_the_clients_library_gets_the_same_job_and_an_equal_request_another(client, server):
    def send(**headers):
        made = client.images.generate(prompt="again", extra_headers=headers)
        return made.model_extra["pipeboost"]["id"]

    first = send()
    assert send(**{"x-stainless-retry-count": "1"}) == first
    assert send() != first
    with pytest.raises(openai.APIError):
        client.images.generate(prompt="fail")
    ran = len(server.worker.ran)
    with pytest.raises(openai.APIError):
        client.images.generate(prompt="fail", extra_headers={"x-stainless-retry-count": "1"})
    assert len(server.worker.ran) == ran + 1


def test_two_that_wait_for_one_job_both_get_it(server):
    server.worker.pause = 0.05
    ask = {"json": {"prompt": "both"}, "headers": {"idempotency-key": "two"}}
    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(httpx.post, f"{server.url}/v1/images/generations", **ask) for _ in range(2)]
        ids = {future.result().json()["pipeboost"]["id"] for future in futures}
    server.worker.pause = 0.0
    assert len(ids) == 1
