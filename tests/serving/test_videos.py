"""OpenAI's own client against a server over HTTP: videos, which are jobs, and jobs of both kinds."""

import base64
import io
import json
import time

import httpx
import openai
import pytest
from PIL import Image

from tests.serving.standins import VIDEO, serving

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("data"), VIDEO, max_frames=100) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused-here", max_retries=0)


def png(width=32, height=32, mode="RGB", colour=(1, 2, 3)):
    buffer = io.BytesIO()
    Image.new(mode, (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def form(fields):
    """The fields of a multipart form that has no file."""
    return [(k, (None, str(each))) for k, v in fields.items() for each in (v if isinstance(v, list) else [v])]


def test_a_video_is_made_polled_listed_loaded_and_deleted(client, server):
    video = client.videos.create_and_poll(prompt="x", seconds="2", size="32x64", extra_body={"seed": 5, "fps": 4})
    assert (video.status, video.progress, video.seconds, video.size) == ("completed", 100, "2", "32x64")
    assert video.expires_at > video.completed_at >= video.created_at
    assert video.model_extra["pipeboost"]["seeds"] == [5]
    assert server.worker.ran[-1].call.num_frames == 2 * 4 + 1
    content = client.videos.download_content(video.id).content
    assert content.startswith(b"9 frames, 4.0 fps")
    for variant, format in (("thumbnail", "WEBP"), ("spritesheet", "JPEG")):
        picture = client.videos.download_content(video.id, variant=variant).content
        assert Image.open(io.BytesIO(picture)).format == format
    others = [client.videos.create(prompt=f"number {number}").id for number in range(4)]
    assert [each.id for each in client.videos.list(limit=2)] == [*others[::-1], video.id]
    assert [each.id for each in client.videos.list(limit=2, order="asc")][:2] == [video.id, others[0]]
    gone = client.videos.delete(video.id)
    assert (gone.id, gone.deleted, gone.object) == (video.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)
    assert video.id not in server.store.jobs


def test_a_failed_video_has_a_code_and_is_no_error_of_http(client):
    video = client.videos.create_and_poll(prompt="fail")
    assert (video.status, video.error.code) == ("failed", "out_of_memory")
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.download_content(video.id)
    assert refused.value.code == "out_of_memory"


def test_a_reference_comes_as_a_file_or_as_a_data_url_and_reaches_the_worker(client, server):
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    ways = [
        {"input_reference": ("../../name.png", png())},
        {"extra_body": {"input_reference": {"image_url": url}}},
        {"extra_body": {"reference_url": url}},
        {"extra_body": {"input_references": [{"image_url": url}]}},
    ]
    for way in ways:
        video = client.videos.create_and_poll(prompt="x", **way)
        job = server.worker.ran[-1]
        assert (video.status, job.call.images) == ("completed", ("input_0.png",))
        assert Image.open(server.store.paths.of(job.id) / "input_0.png").getpixel((0, 0)) == (1, 2, 3)


def test_a_remix_is_the_same_call_with_another_prompt(client, server):
    first = client.videos.create_and_poll(prompt="x", size="32x32", input_reference=png(), extra_body={"seed": 3})
    second = client.videos.remix(first.id, prompt="y")
    assert client.videos.poll(second.id).remixed_from_video_id == first.id
    one, two = server.store.jobs[first.id].call, server.store.jobs[second.id].call
    assert (two.prompt, two.seed, two.width, two.images) == ("y", one.seed, one.width, one.images)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"seconds": "long"}, "seconds", "must be a number above 0"),
        ({"seconds": "2", "num_frames": 5}, "seconds", "seconds=2 is 17 frames, which contradicts num_frames=5"),
        ({"num_frames": 6}, "num_frames", "one more than a multiple of 4; use 5 or 9"),
        ({"seconds": "60"}, "seconds", "use at most 100"),
        ({"input_reference": {"file_id": "file-1"}}, "input_reference[file_id]", "keeps no files"),
        ({"input_reference": {"image_url": "http://10.0.0.1/x.png"}}, "input_reference[image_url]", "is no data URL"),
        ({"reference_url": "data:image/png;base64,%%"}, "reference_url", "not of valid base64"),
        ({"reference_url": "data:image/png;base64,AAAA"}, "input_reference", "is no PNG, JPEG or WebP picture"),
        ({"n": 2}, "n", "there is no such field"),
        ({"loras[][name]": ["a", "b"], "loras[][scale]": "1"}, "loras", "must all have the same fields"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name_in_forms_too(server, fields, param, says):
    url = f"{server.url}/v1/videos"
    if isinstance(fields.get("input_reference"), dict):
        answer = httpx.post(url, json={"prompt": "x", **fields})
    else:
        answer = httpx.post(url, files=form({"prompt": "x", **fields}))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert says in answer.json()["error"]["message"]


def test_one_frame_of_a_video_model_is_an_image(client, server):
    made = client.images.generate(prompt="x", extra_body={"seed": 4})
    assert Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json))).getpixel((0, 0)) == (4, 4, 4)
    assert server.worker.ran[-1].call.num_frames == 1


def test_ranges_of_a_file_are_answered_as_browsers_ask(client, server):
    video = client.videos.create_and_poll(prompt="x")
    url = f"{server.url}/v1/videos/{video.id}/content"
    whole = httpx.get(url)
    assert (len(whole.content), whole.headers["accept-ranges"]) == (1000, "bytes")
    part = httpx.get(url, headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole.content[10:20])
    assert part.headers["content-range"] == "bytes 10-19/1000"
    assert httpx.get(url, headers={"range": "bytes=-5"}).content == whole.content[-5:]
    assert httpx.get(url, headers={"range": "bytes=2000-"}).status_code == 416


def test_deleting_a_running_video_ends_it_and_the_next_one_runs(client, server):
    video = client.videos.create(prompt="slow", extra_body={"num_inference_steps": 100})
    deadline = time.monotonic() + 10
    while client.videos.retrieve(video.id).status == "queued" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert client.videos.retrieve(video.id).status == "in_progress"
    start = time.monotonic()
    assert client.videos.delete(video.id).deleted
    assert time.monotonic() - start < 4
    assert video.id in server.worker.cancelled
    assert client.videos.create_and_poll(prompt="x").status == "completed"


def test_a_client_that_polls_is_told_when_to_ask_again(client):
    raw = client.videos.with_raw_response.create(prompt="slow")
    job = raw.parse().id
    assert (
        raw.headers["openai-poll-after-ms"]
        == client.videos.with_raw_response.retrieve(job).headers["openai-poll-after-ms"]
    )
    assert 200 <= int(raw.headers["openai-poll-after-ms"]) <= 5000
    client.videos.delete(job)


def test_a_cancelled_video_has_failed_in_a_state_that_clients_know(client, server):
    video = client.videos.create(prompt="slow")
    assert httpx.post(f"{server.url}/v1/jobs/{video.id}/cancel").json()["status"] == "cancelled"
    shown = client.videos.retrieve(video.id)
    assert (shown.status, shown.error.code) == ("failed", "cancelled")


def test_a_job_is_followed_step_by_step(client, server):
    server.worker.pause = 0.05
    video = client.videos.create(prompt="x", extra_body={"num_inference_steps": 5})
    with httpx.stream("GET", f"{server.url}/v1/jobs/{video.id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    server.worker.pause = 0.0
    assert [each["step"] for each in events[1:-1]][-1] == 5
    assert (events[-1]["status"], events[-1]["files"]) == ("completed", [f"/v1/jobs/{video.id}/files/0"])
