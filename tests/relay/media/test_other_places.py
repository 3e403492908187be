"""Images and frames in places where none is prepared: they go on as they came, and are priced by what they are."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
from PIL import Image

from sidecar.events import ImagePrepared
from sidecar.images.service import ImageService
from sidecar.kernels import families
from sidecar.load import body_scan
from sidecar.load.cost_model import Coefficients
from sidecar.load.estimator import Estimator
from sidecar.relay.media.other_places import PIECE_BYTES, find_images
from sidecar.relay.pricing.charge import Pricing
from sidecar.relay.request_body import parse
from sidecar.settings import Settings
from sidecar.tools.synthetic_photos import photo

from ...images.published import settings as published
from ..work import echo, once

SPEC = families.from_config(published("Qwen2VLImageProcessor"))
JPEG = base64.b64encode(photo(1280, 720, 3)).decode()


def png(width: int, height: int) -> str:
    out = io.BytesIO()
    Image.new("L", (width, height)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


PNG = png(700, 900)
TEXT = {"type": "text", "text": "what is this? /9j/ iVBORw0KGgo"}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Anthropic's blocks": (
        "/v1/messages",
        {
            "max_tokens": 9,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        TEXT,
                        {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": JPEG}},
                        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}},
                    ],
                }
            ],
        },
    ),
    "a tool's output": (
        "/v1/responses",
        {
            "input": [
                {"role": "user", "content": "look"},
                {
                    "type": "function_call_output",
                    "call_id": "c",
                    "output": [
                        {"type": "input_image", "image_url": f"data:image/jpeg;base64,{JPEG}"},
                        {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"},
                    ],
                },
            ]
        },
    ),
    "SGLang's image_data": (
        "/generate",
        {"text": "x", "image_data": [f"data:image/jpeg;base64,{JPEG}", PNG], "sampling_params": {"max_new_tokens": 9}},
    ),
    "Ollama's images": (
        "/api/chat",
        {"messages": [{"role": "user", "content": "/9j/ what?", "images": [JPEG, PNG]}], "stream": False},
    ),
}


@pytest.mark.parametrize("name", BODIES)
async def test_an_image_anywhere_is_priced_by_its_header(rig: Any, serve: Any, name: str) -> None:
    """The engine gets the body as it came; each image counts the tokens of its size, and why it passed."""
    assert SPEC is not None
    images = ImageService("/nowhere", Settings(), SPEC)
    r = await rig(await serve(echo), images=images, pricing=Pricing(Estimator(Coefficients()), spec=SPEC))
    path, fields = BODIES[name]
    body = json.dumps({"model": "m"} | fields).encode()
    async with r.client.post(r.url + path, data=body) as got:
        assert (got.status, await got.read()) == (200, body)
    tokens = [SPEC.geometry(720, 1280).tokens, SPEC.geometry(900, 700).tokens]
    expected = once(r.emitted)[0].expected
    assert (expected.images, expected.image_tokens) == (2, sum(tokens))
    passed = r.emitted.of(ImagePrepared)
    assert [(e.format, e.outcome, e.reason) for e in passed] == [
        ("jpeg", "passed", "place"),
        ("png", "passed", "place"),
    ]


async def test_images_of_both_kinds_of_places_are_told_apart(rig: Any, serve: Any) -> None:
    """One in a part and one in a tool's output: none is counted twice."""
    fields = json.loads(json.dumps(BODIES["a tool's output"][1]))
    fields["input"][0]["content"] = [{"type": "input_image", "image_url": f"data:image/jpeg;base64,{JPEG}"}]
    parsed = parse(json.dumps(fields).encode())
    assert [(image.where, image.pass_reason) for image in parsed.images] == [
        ("input[0].content[0]", ""),
        ("", "place"),
        ("", "place"),
    ]
    assert [bytes(image.data).decode() for image in parsed.images] == [JPEG, JPEG, PNG]


@pytest.mark.parametrize("before", range(0, 40, 3))
def test_an_image_on_the_border_of_two_pieces_is_found(before: int) -> None:
    """A long body is searched piece by piece; wherever one ends, no image is missed, and none counts twice."""
    head = b'{"messages":[{"role":"user","content":"'
    text = b"a" * (PIECE_BYTES - len(head) - len(b'","images":["') - before)
    body = head + text + b'","images":["%b","%b"]}]}' % (PNG.encode(), JPEG.encode())
    found = body_scan.find(body)
    assert found is not None
    assert [bytes(image) for image in find_images(body, found)] == [PNG.encode(), JPEG.encode()]


def test_a_text_is_no_image() -> None:
    """What only looks like one is not looked for: the scan counts no image."""
    for text in (JPEG, f"data:image/png;base64,{PNG}"):
        body = {"messages": [{"role": "user", "content": text}], "prompt": text}
        assert parse(json.dumps(body).encode()).images == []
