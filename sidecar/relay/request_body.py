"""Pure: request bodies. Which paths are engine work, and image payloads kept away from the JSON parser.

Rules: the base64 text of a data URL never goes through `json`: it is cut out by byte search, and the small rest is
parsed. A body in which nothing changes is sent byte for byte. A body that cannot be parsed is left to the engine.

Why the cut is safe: in valid JSON an unescaped `"` directly before `data:` opens a string, and the next unescaped `"`
ends it. A data URL with a backslash inside (`\\/`, as PHP writes it) is left to the JSON parser. A placeholder carries
a nonce that is drawn for this one body after it arrived, so no user's text can be mistaken for one. A data URL need
not be an image: a text of the payload is read through `ParsedBody.text`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sidecar.relay.url_policy import is_link

# Route name -> ends of POST paths. The last two segments of a path are looked up first, then the last one.
_PATHS: Final = {
    "chat": "chat/completions completions/batch",
    "completions": "completions completion infill",  # llama.cpp's
    "responses": "responses",
    "messages": "messages",
    "generate": "generate generate_stream invocations",  # TGI's, SageMaker's
    "embeddings": "embeddings embedding embed encode",  # llama.cpp's, SGLang's
    "rerank": "rerank reranking",  # llama.cpp's
    "score": "score generative_scoring",
    "pooling": "pooling",
    "classify": "classify",
    "audio": "audio/transcriptions audio/translations audio/speech",
}
ROUTES: Final = {path: route for route, paths in _PATHS.items() for path in paths.split()}

MAX_PARSED_BYTES: Final = 16 << 20  # JSON without images; json.loads holds the GIL for about 5 ms a MiB
# Members that configure vLLM's own image processing: the images are then left to the engine.
PROCESSING_OPTIONS: Final = ("mm_processor_kwargs", "media_io_kwargs")
_BASE64_MARK: Final = b";base64,"
_MAX_MEDIA_TYPE_BYTES: Final = 128  # between `"data:` and `;base64,`

Buffer = bytes | memoryview | bytearray


@dataclass(slots=True)
class ImagePart:
    """One image of a request. `data` is its base64 text, `part` the content part (in the payload) that holds it."""

    index: int  # into ParsedBody.originals
    where: str  # "messages[0].content[1]"
    media_type: str  # "image/jpeg"
    data: memoryview
    part: dict[str, Any]
    link: str = ""  # where its bytes must be fetched from; it has no `data` then
    named: bool = False  # `part` got its `uuid` from the sidecar


@dataclass(slots=True)
class ParsedBody:
    """A body without its data URLs. `payload` is None if the body is no JSON object or too long to parse."""

    body: bytes
    stem: str = ""  # of the placeholders that stand for the data URLs
    payload: dict[str, Any] | None = None
    originals: list[Buffer] = field(default_factory=list)  # the data URLs, without their quotes
    images: list[ImagePart] = field(default_factory=list)

    def text(self, found: str) -> str:
        """A text of the payload as the client sent it, with the data URLs that were cut out."""
        if not self.originals or self.stem not in found:
            return found
        placeholder = re.escape(self.stem) + r"(\d+)\."
        return re.sub(placeholder, lambda match: str(self.originals[int(match[1])], "utf-8", "replace"), found)

    def original(self, text: str) -> Buffer:
        """The original of a text of the payload: the data URL that was cut out, or the text itself."""
        is_cut = text.startswith(self.stem)
        return self.originals[int(text[len(self.stem) : -1])] if is_cut else text.encode(errors="replace")


def route_of(path: str) -> str | None:
    """The route name of a POST to `path` (no query), or None if it is not engine work."""
    head, _, last = path.rpartition("/")
    return ROUTES.get(head.rpartition("/")[2] + "/" + last) or ROUTES.get(last)


def extract_data_urls(body: bytes, nonce: str, *, links: bool = False) -> ParsedBody:
    """Cut the data URLs out of `body` and parse the rest. `nonce`: letters and digits drawn after the body came.

    `links`: images behind http(s) links count as images, too.
    """
    parsed = ParsedBody(body, f"data:,{nonce}-")
    pieces: list[Buffer] = []
    view = memoryview(body)
    at = 0
    for start, end in _find_data_urls(body):
        pieces += (view[at:start], f"{parsed.stem}{len(parsed.originals)}.".encode())
        parsed.originals.append(view[start:end])
        at = end
    rest = b"".join((*pieces, view[at:])) if pieces else body
    # too long; or UTF-16 or UTF-32, into which ASCII pieces do not fit
    if len(rest) > MAX_PARSED_BYTES or 0 in rest[:4] or rest.startswith((b"\xff\xfe", b"\xfe\xff")):
        return parsed
    parsed.payload = parse_object(rest)
    if parsed.payload is not None:
        parsed.images = list(_find_images(parsed, parsed.payload, links))
    return parsed


def rebuild(parsed: ParsedBody, replaced: Mapping[int, tuple[str, Buffer]], *, ask_usage: bool = False) -> list[Buffer]:
    """The body to send, in pieces.

    `replaced` maps ImagePart.index to (media type, base64 text), or ("", URL). `ask_usage` adds
    `stream_options.include_usage`. With neither: the original bytes. Changes in `payload` are sent only with a
    replacement.
    """
    if parsed.payload is None or not (replaced or ask_usage):
        return [parsed.body]
    if not replaced and "stream_options" not in parsed.payload:
        brace = parsed.body.index(b"{") + 1
        member = b'"stream_options":{"include_usage":true},'
        return [parsed.body[:brace] + member, memoryview(parsed.body)[brace:]]
    payload = parsed.payload
    if ask_usage:
        payload = {**payload, "stream_options": {**(payload.get("stream_options") or {}), "include_usage": True}}
    return list(_fill(parsed, json.dumps(payload, separators=(",", ":")).encode(), replaced))


def parse_object(text: bytes) -> dict[str, Any] | None:
    """A JSON object; None if it is something else."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _find_data_urls(body: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of every string that is a base64 data URL without escapes, quotes excluded."""
    mark = body.find(_BASE64_MARK)
    while mark >= 0:
        after = mark + len(_BASE64_MARK)
        quote = body.rfind(b'"', max(0, mark - _MAX_MEDIA_TYPE_BYTES), mark)
        if quote > 0 and body.startswith(b"data:", quote + 1) and body[quote - 1] != 0x5C:
            end = body.find(b'"', after)
            if end < 0:
                return
            if body.find(b"\\", quote, end) < 0:
                yield quote + 1, end
                after = end
        mark = body.find(_BASE64_MARK, after)


def _find_images(parsed: ParsedBody, payload: dict[str, Any], links: bool) -> Iterator[ImagePart]:
    """The base64 images, and with `links` those to fetch, in parts of `messages` (chat) and `input` (responses)."""
    if any(payload.get(name) for name in PROCESSING_OPTIONS):
        return
    stem = parsed.stem
    for where, part in _image_parts(payload):
        url = part.get("image_url")
        holder, key = (url, "url") if isinstance(url, dict) else (part, "image_url")
        text = holder.get(key)
        if not isinstance(text, str):
            continue
        is_fetched = links and is_link(text)
        if text.startswith(stem):
            index = int(text[len(stem) : -1])
        elif is_fetched or text.startswith("data:image/"):  # the latter had escapes, so it was not cut
            index = len(parsed.originals)
            parsed.originals.append(json.dumps(text)[1:-1].encode())
            holder[key] = f"{stem}{index}."
        else:
            continue
        if is_fetched:
            yield ImagePart(index, where, "", memoryview(b""), part, text)
            continue
        media_type, data = _split_data_url(parsed.originals[index], text)
        if media_type.startswith("image/"):
            yield ImagePart(index, where, media_type, data, part)


def _image_parts(payload: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in ("messages", "input"):
        messages = payload.get(name)
        for i, message in enumerate(messages if isinstance(messages, list) else ()):
            content = message.get("content") if isinstance(message, dict) else None
            for j, part in enumerate(content if isinstance(content, list) else ()):
                if isinstance(part, dict) and part.get("type") in ("image_url", "input_image"):
                    yield f"{name}[{i}].content[{j}]", part


def _split_data_url(original: Buffer, text: str) -> tuple[str, memoryview]:
    """(media type, the base64 text) of a data URL; "" if it is not base64. `text`: decoded, if it had escapes."""
    view = memoryview(text.encode(errors="replace") if isinstance(original, bytes) else original)
    head = bytes(view[: _MAX_MEDIA_TYPE_BYTES + len(_BASE64_MARK)])
    at = head.find(_BASE64_MARK)
    media_type = head[len("data:") : max(at, 0)].decode("latin-1").partition(";")[0].strip().lower()
    return media_type, view[at + len(_BASE64_MARK) :]


def _fill(parsed: ParsedBody, text: bytes, replaced: Mapping[int, tuple[str, Buffer]]) -> Iterator[Buffer]:
    """`text` with each placeholder replaced by its replacement, or else by its original."""
    pieces = re.split(rb"%b(\d+)\." % re.escape(parsed.stem).encode(), text)
    yield pieces[0]
    for number, after in zip(pieces[1::2], pieces[2::2], strict=True):
        index = int(number)
        if index in replaced:
            media_type, data = replaced[index]
            if media_type:
                yield f"data:{media_type};base64,".encode()
            yield data
        else:
            yield parsed.originals[index]
        yield after
