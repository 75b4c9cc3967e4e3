"""OpenAI's own client against a server over HTTP: pictures to edit, masks, adapters, and what a form may be."""

import base64
import io

import httpx
import openai
import pytest
from PIL import Image

from pipeboost.serving.api.errors import ApiError
from pipeboost.serving.api.forms import nested
from tests.serving.standins import serving
from tests.serving.test_videos import png


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("ink", "oil"):
        (folder / f"{name}.safetensors").write_bytes(b"")
    with serving(folder, lora_dir=folder, max_pixels=64 * 64) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused-here", max_retries=0)


def test_one_picture_with_a_mask_reaches_the_worker_white_where_to_paint(client, server):
    mask = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 16, 32))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    made = client.images.edit(prompt="x", image=png(), mask=buffer.getvalue(), size="32x32", n=2)
    assert len(made.data) == 2
    job = server.worker.ran[-1]
    assert (job.call.images, job.call.mask) == (("input_0.png",), "mask.png")
    kept = Image.open(server.store.paths.of(job.id) / "mask.png")
    assert (kept.mode, kept.getpixel((0, 0)), kept.getpixel((31, 0))) == ("L", 255, 0)


def test_several_pictures_reach_the_worker_in_order(client, server):
    client.images.edit(prompt="x", image=[png(colour=(number, 0, 0)) for number in range(3)])
    job = server.worker.ran[-1]
    folder = server.store.paths.of(job.id)
    assert [Image.open(folder / name).getpixel((0, 0))[0] for name in job.call.images] == [0, 1, 2]


def test_a_picture_is_turned_as_its_camera_says(client, server):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (32, 16)).save(buffer, "JPEG", exif=exif)
    client.images.edit(prompt="x", image=buffer.getvalue())
    job = server.worker.ran[-1]
    assert Image.open(server.store.paths.of(job.id) / "input_0.png").size == (16, 32)


@pytest.mark.parametrize(
    ("files", "param", "says"),
    [
        ({"image": b"no picture"}, "image", "is no PNG, JPEG or WebP picture"),
        ({"image": png()[:60]}, "image", "image is damaged"),
        ({"image": png(128, 64)}, "image", "is 128x64, more than 4096 pixels"),
        ({"image": png(), "mask": png()}, "mask", "no transparent pixels"),
        (
            {"image": png(), "mask": png(16, 32, "RGBA", (0, 0, 0, 0))},
            "mask",
            "has 16x32 pixels, but the picture 32x32",
        ),
        ({"picture": png()}, "picture", "only image, mask may be"),
        ({}, "image", "image is missing"),
    ],
)
def test_pictures_that_cannot_be_used_are_refused(server, files, param, says):
    answer = httpx.post(f"{server.url}/v1/images/edits", files={"prompt": (None, "x"), **files})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert says in answer.json()["error"]["message"]


def test_adapters_come_in_every_way_that_clients_write_them(client, server):
    ways = {
        "ink": [("ink", 1.0)],
        '{"name": "ink", "scale": 0.5}': [("ink", 0.5)],
        '[{"path": "oil.safetensors"}, "ink"]': [("oil", 1.0), ("ink", 1.0)],
    }
    for lora, found in ways.items():
        client.images.generate(prompt="x", extra_body={"lora": lora})
        assert [(each.name, each.scale) for each in server.worker.ran[-1].call.loras] == found
    both = {"loras": [{"name": "ink", "scale": 0.25}, {"name": "oil", "scale": -1}]}
    for send in (client.images.generate, lambda **call: client.images.edit(image=png(), **call)):
        send(prompt="x", extra_body=both)
        assert [(each.name, each.scale) for each in server.worker.ran[-1].call.loras] == [("ink", 0.25), ("oil", -1)]
    client.images.edit(prompt="x", image=png(), extra_body={"lora": {"path": "ink", "scale": 2}})
    assert [(each.name, each.scale) for each in server.worker.ran[-1].call.loras] == [("ink", 2)]
    listed = httpx.get(f"{server.url}/v1/loras").json()["data"]
    assert [each["id"] for each in listed] == ["ink", "oil"]


@pytest.mark.parametrize("lora", ["../ink", "/etc/passwd", "ink.bin", {"name": "ink", "path": "oil"}, {"name": 1}, [[]],
                                  {"name": "ink", "scale": "nan"}, ["ink", "ink"]])  # fmt: skip
def test_an_adapter_that_is_not_there_is_refused(client, lora):
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="x", extra_body={"lora": lora})
    assert refused.value.param.startswith("lora")


def test_fields_of_a_form_have_the_types_of_json(client, server):
    client.images.edit(
        prompt="x",
        image=png(),
        n=1,
        extra_body={"extra_body": {"seed": 3, "true_cfg_scale": 2.5}, "num_inference_steps": 2, "negative_prompt": "y"},
    )
    call = server.worker.ran[-1].call
    assert (call.seed, call.num_inference_steps, call.negative_prompt) == (3, 2, "y")
    assert call.arguments == {"true_cfg_scale": 2.5}


def test_brackets_are_lists_and_objects():
    assert nested([("a", "1"), ("b[c]", "2"), ("b[d][e]", "3")]) == {"a": "1", "b": {"c": "2", "d": {"e": "3"}}}
    assert nested([("a[]", "1"), ("a[]", "2")]) == {"a": ["1", "2"]}
    assert nested([("a[][x]", "1"), ("a[][y]", "2"), ("a[][x]", "3"), ("a[][y]", "4")]) == {
        "a": [{"x": "1", "y": "2"}, {"x": "3", "y": "4"}]
    }
    assert nested([("a[1][x]", "1"), ("a[0][x]", "2")]) == {"a": [{"x": "2"}, {"x": "1"}]}


@pytest.mark.parametrize("items", [[("a", "1"), ("a", "2")], [("a", "1"), ("a[b]", "2")], [("a[]", "1"), ("a[b]", "2")],
                                   [("a[][x]", "1"), ("a[]", "2")], [("[a]", "1")], [("a[" * 9 + "]" * 9, "1")],
                                   [("a" + "[b]" * 9, "1")], [("", "1")]])  # fmt: skip
def test_names_that_contradict_each_other_are_refused(items):
    with pytest.raises(ApiError) as refused:
        nested(items)
    assert refused.value.status == 400


def test_a_picture_in_json_is_a_data_url(server):
    url = "data:image/png;base64," + base64.b64encode(png(colour=(9, 9, 9))).decode()
    answer = httpx.post(f"{server.url}/v1/images/edits", json={"prompt": "x", "image": [url, url]})
    assert answer.status_code == 200
    assert len(server.worker.ran[-1].call.images) == 2
