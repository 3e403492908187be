"""What must hold for any bytes at all: each function raises AssertionError where it does not.

`make fuzz` drives them with atheris; tests/test_fuzz.py does it with the corpus and with hypothesis.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from sidecar.images import file_headers
from sidecar.load import body_scan as scans
from sidecar.load import request_shape
from sidecar.load.api_routes import APIS, CHAT
from sidecar.load.found import Found
from sidecar.relay import request_body as bodies
from sidecar.relay import url_policy

from . import wires

MAX_DECODED_PIXELS = 1 << 20
IMAGE = "data:image/png;base64,AAAA"


def image_header(data: bytes) -> None:
    """Reading a header never fails, gives no negative size, and returns a plain file's size as its decoder does."""
    header = file_headers.read(data)
    if header is None:
        return
    assert header.height >= 0 and header.width >= 0
    assert not header.plain or header.format == "jpeg"
    if header.plain and 0 < header.height * header.width <= MAX_DECODED_PIXELS:
        import simplejpeg

        try:
            pixels: Any = simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            return
        assert pixels.shape[:2] == (header.height, header.width), (pixels.shape, header)


def request_body(data: bytes) -> None:
    """A body goes out as it came in, or means the same but for what was to change."""
    for with_links in (False, True):
        parsed = bodies.parse(data, links=with_links)
        assert bodies.rebuild(parsed, {}) == [data]
        for api in APIS:
            shape = request_shape.describe(parsed.scan, api, len(data))
            assert 1 <= shape.skew <= max(1, shape.prompts) and shape.repeated >= 1
            assert 1 <= shape.prompts <= max(1, len(data)) and shape.told_output >= 0
        if parsed.scan is None:
            assert not parsed.images and bodies.rebuild(parsed, {}, ask_usage=True) == [data]
            continue
        means = json.loads(data)
        if parsed.scan.options.get("stream") is True and request_shape.describe(parsed.scan, CHAT, 0).ask_usage:
            asked = json.loads(b"".join(bodies.rebuild(parsed, {}, ask_usage=True)))
            assert asked["stream_options"].pop("include_usage") is True
            options = means.get("stream_options") or {}
            options.pop("include_usage", None)
            assert asked["stream_options"] == options
            assert _text(asked, "stream_options") == _text(means, "stream_options")
        if parsed.images:
            replaced = dict.fromkeys(range(len(parsed.images)), ("image/png", b"AAAA"))
            changed = json.loads(b"".join(bodies.rebuild(parsed, replaced)))
            for part in parsed.images:
                assert _url(changed, part.where) == IMAGE
                _put(changed, part.where, _url(means, part.where))
            assert _text(changed) == _text(means)


def body_scan(data: bytes) -> None:
    """The compiled scanner reads what `json` reads, and finds the same in it."""
    found = scans.find(data)
    try:
        payload = json.loads(data.decode("utf-8-sig", "surrogatepass"))
    except ValueError:
        payload = None
    except RecursionError:
        return
    assert (found is not None) == isinstance(payload, dict)
    if len(data) <= scans.MAX_PYTHON_BYTES:
        assert found == (other := scans.find_in_python(data))
        assert _texts(found) == _texts(other)


def link(data: bytes) -> None:
    """What may be fetched is on the list, without a user name, by http or https."""
    among = url_policy.parse_domains("img.example.com,*.example.org")
    url = url_policy.allowed_url(data.decode(errors="replace"), among)
    if url is not None:
        assert url.scheme in ("http", "https") and url.user is None and url.port in (80, 443)
        host = (url.host or "").rstrip(".")
        assert host == "img.example.com" or host.endswith(".example.org")
    url_policy.is_public(data.decode("latin-1"))


def http_request(data: bytes) -> None:
    """Whatever a client sends: it gets whole answers, or a refusal and the end."""
    sent = asyncio.run(wires.answers_to(data))
    assert set(re.findall(rb"HTTP/1\.1 (\d+) [A-Z]", sent)) <= {b"200", b"100", b"400", b"431"}, sent


def http_answer(data: bytes) -> None:
    """Whatever an engine sends is one answer or none, and none of it is longer than what it sent."""
    found = asyncio.run(wires.answer_of(data))
    if found is not None:
        status, body = found
        assert 200 <= status <= 999 and len(body) <= len(data)


def _texts(found: Found | None) -> list[str]:
    if found is None:
        return []
    assert found.texts is not None, "a seed has few texts"
    places = found.texts.places
    return sorted(
        scans.prompt_text(found.texts.source, start, end, bool(printed))
        for start, end, printed in zip(places[::3], places[1::3], places[2::3], strict=True)
    )


def _text(value: dict[str, Any], without: str = "") -> str:
    return json.dumps({k: v for k, v in value.items() if k != without}, sort_keys=True)


def _part(payload: dict[str, Any], where: str) -> Any:
    name, i, j = where.replace("]", "").replace(".content", "").split("[")
    return payload[name][int(i)]["content"][int(j)]


def _url(payload: dict[str, Any], where: str) -> Any:
    image = _part(payload, where)["image_url"]
    return image["url"] if isinstance(image, dict) else image


def _put(payload: dict[str, Any], where: str, url: Any) -> None:
    part = _part(payload, where)
    if isinstance(part["image_url"], dict):
        part["image_url"]["url"] = url
    else:
        part["image_url"] = url


TARGETS = {
    "header": image_header,
    "body": request_body,
    "scan": body_scan,
    "link": link,
    "request": http_request,
    "answer": http_answer,
}
