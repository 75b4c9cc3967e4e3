"""Whatever a client sends, it is answered by a status below 500 in the envelope, and nothing is left over."""

import asyncio
import json
import random

import httpx
import pytest

from pipeboost.serving.api.app import create_app
from pipeboost.serving.api.fields import EditFields, ImageFields, VideoFields
from tests.serving.standins import CARD, VIDEO, service_of
from tests.serving.test_videos import png

VALUES = [
    None, True, False, 0, -1, 1.5, 10**400, 1e308, "", " ", "x", "1", "true", "null", "\0", "é", "\u2028", "x" * 5000,
    [], [[]], [None], {}, {"a": {}}, {"name": "x"}, {"image_url": "data:image/png;base64,"}, "data:,", "64x64", "0x0",
    "nan", "99999x99999", "1e5", "../../etc/passwd", "http://127.0.0.1/", "-1", "٣",
]  # fmt: skip
NAMES = [
    "a[", "a]", "[]", "[", "a[][b]", "a[b][]", "__proto__", "prompt[]", "prompt[x]", "image[]", "image[0]", "é", "",
    " ", "extra_body", "extra_body[seed]", "lora[name]", "loras[][name]", "loras[0]",
    "input_reference[image_url]",
]  # fmt: skip
FILES = [b"", b"x", png(), png()[:50], b"\x89PNG\r\n\x1a\n" + b"\0" * 100, b"GIF89a" + b"\0" * 20, png(1, 1)]
RAW = [
    b"", b"null", b"{", b"[]", b'{"prompt":"x","prompt":"y"}', b"\xff", b'{"prompt": NaN}', b"{}" * 9,
    b'{"\\ud800":1}', b'{"prompt":"\\ud800"}', b"[" * 5000, b'{"seed":' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}",
]  # fmt: skip


def request_of(chance: random.Random, url: str, fields: list[str]) -> dict:
    """A request with a few faults."""
    kind = chance.random()
    if kind < 0.1:
        types = ["application/json", "text/plain", "multipart/form-data", "multipart/form-data; boundary=x", "x"]
        return {"content": chance.choice(RAW), "headers": {"content-type": chance.choice(types)}}
    sent = {"prompt": "x"}
    for _ in range(chance.randrange(1, 4)):
        sent[chance.choice(fields + NAMES)] = chance.choice(VALUES)
    if kind < 0.55:
        return {"content": json.dumps(sent).encode(), "headers": {"content-type": "application/json"}}
    parts = [(name, (None, value if isinstance(value, str) else json.dumps(value))) for name, value in sent.items()]
    for _ in range(chance.randrange(3)):
        names = ["image", "image[]", "mask", "input_reference", "input_references[]", "x"]
        parts.append((chance.choice(names), ("../a\r\nb.png", chance.choice(FILES))))
    return {"files": parts}


@pytest.mark.parametrize("card", [CARD, VIDEO], ids=["images", "videos"])
def test_malformed_requests_are_answered_below_500(tmp_path, card):
    chance = random.Random(card.kind)
    targets = {"/v1/images/generations": ImageFields, "/v1/images/edits": EditFields, "/v1/videos": VideoFields}

    async def send() -> set[int]:
        service = service_of(tmp_path, card, max_pixels=64 * 64, max_images=2)
        app = create_app(service, service.settings)
        await service.start()
        statuses = set()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            for _ in range(250):
                url, fields = chance.choice(list(targets.items()))
                ask = request_of(chance, url, list(fields.model_fields))
                answer = await client.post(url, **ask)
                statuses.add(answer.status_code)
                assert answer.status_code < 500, (url, ask, answer.text)
                if answer.status_code >= 400:
                    error = answer.json()["error"]
                    assert error["message"], ask
                    assert str(tmp_path) not in answer.text
                    assert len(error["message"]) < 1500, error["message"]
        await service.drain(5)
        assert not service.feed._followers
        return statuses

    assert asyncio.run(send()) >= {200, 400}


def test_the_description_of_the_interface_is_whole(tmp_path):
    async def get() -> dict:
        service = service_of(tmp_path)
        transport = httpx.ASGITransport(create_app(service, service.settings))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return (await client.get("/openapi.json")).json()

    found = asyncio.run(get())
    wanted = "generations", "edits", "videos", "content", "models", "loras", "health", "ready", "metrics", "events"
    assert set(wanted) <= {path.rpartition("/")[2] for path in found["paths"]}
    schema = found["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"].keys() == ImageFields.model_fields.keys()
    references = {word for word in json.dumps(found).split('"') if word.startswith("#/")}
    for reference in references:
        at = found
        for part in reference[2:].split("/"):
            at = at[part]
