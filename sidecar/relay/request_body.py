"""Pure: request bodies: positions of their images, and changes as splices.

Rules: no body is serialised again. What is replaced or added is spliced in at its position, and every other byte goes
out as it came: repeated keys, forms of numbers, spaces. A body that is no JSON object, and one in UTF-16 or UTF-32, is
left to the engine. The position of a string decides what it is, so no text can be mistaken for an image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sidecar.images.video_headers import VideoHeader
from sidecar.load import audio_parts, body_scan, request_shape
from sidecar.load.body_scan import BodyScan, Buffer
from sidecar.load.found import FoundPart, Span
from sidecar.load.request_keys import PROCESSING_OPTIONS
from sidecar.relay import compression
from sidecar.relay.media import other_places, video_places

# Fields that name the coding of a body: HTTP's, SGLang's.
CODING_FIELDS: Final = (b"content-encoding", b"x-body-compressed")
_BASE64_MARK: Final = b";base64,"
_MAX_HEAD_BYTES: Final = 136  # of a data URL, up to its base64 text
_EMPTY_OBJECT: Final = re.compile(rb"\{[ \t\r\n]*\}")
_INCLUDE_USAGE: Final = b'"include_usage":true'
# Members of an image's part, and of its `image_url`, that say nothing of how it is to be processed.
_PLAIN_MEMBERS: Final = frozenset(("type", "image_url", "uuid", "detail", "cache_control"))
_PLAIN_URL_MEMBERS: Final = frozenset(("url", "detail", "format"))
_MAX_PART_BYTES: Final = 4096  # of a part, without its URL
_DECODER: Final = json.JSONDecoder()

Splice = tuple[Span, list[Buffer]]  # what is taken out, and what takes its place


@dataclass(slots=True)
class ImagePart:
    """One image of a request. `data` is its base64 text."""

    where: str  # "messages[0].content[1]"
    media_type: str  # "image/jpeg"
    data: memoryview
    link: str = ""  # where its bytes must be fetched from; it has no `data` then
    url: Span = (0, 0)  # of the body, without quotes
    start: int = 0  # the brace of its part
    is_named: bool = False  # the client gave it a `uuid`
    pass_reason: str = ""  # why it cannot be prepared, a code of images.pass_reasons
    name: str = ""  # the sidecar's `uuid` for it


@dataclass(slots=True)
class ParsedBody:
    """A body and what was found in it. `scan` is None if the body is no JSON object or was not read.

    `images` are the first ones in parts, and then those in places where none is prepared; `link_count` is that of all
    links.
    """

    body: bytes
    scan: BodyScan | None = None
    images: list[ImagePart] = field(default_factory=list)
    link_count: int = 0
    sounds: list[float] = field(default_factory=list)  # seconds of the recordings whose length is known
    videos: list[tuple[bool, VideoHeader]] = field(default_factory=list)  # whether a list of JPEGs, and its header


def parse(body: bytes, *, links: bool = False) -> ParsedBody:
    """Scan a body. `links`: images behind http(s) links count as images, too."""
    parsed = ParsedBody(body, body_scan.scan(body))
    if parsed.scan is None:
        return parsed
    if audios := request_shape.audios_of(parsed.scan.found):
        parsed.sounds = audio_parts.seconds_in(body, audios)
    has_options = any(parsed.scan.options.get(name) for name in PROCESSING_OPTIONS)
    found = parsed.scan.found
    parsed.link_count = found.link_parts if links else 0
    parsed.images = [_image(body, part, has_options) for part in found.parts if links or not part.is_link]
    parsed.images += [ImagePart("", "", text, pass_reason="place") for text in other_places.find_images(body, found)]
    parsed.videos = video_places.find_videos(body, found)
    return parsed


def scan_coded(body: bytes, coding: str, limit: int) -> tuple[BodyScan | None, int]:
    """The scan of a compressed body, which is forwarded unchanged, and its text's bytes; reads up to `limit`."""
    text, size = compression.unpack(body, coding, limit)
    return body_scan.scan(text) if text else None, size


def wide_coding(body: bytes) -> str:
    """The coding of a body in UTF-16 or UTF-32, which Python's engines read as UTF-8; "" if it is none of these."""
    coding = json.detect_encoding(body[:4])
    return "" if coding.startswith("utf-8") else coding


def scan_wide(body: bytes, coding: str) -> tuple[BodyScan | None, int]:
    """The scan of a body in another coding, which is forwarded unchanged, and its text's bytes."""
    try:
        text = body.decode(coding).encode(errors="surrogatepass")
    except UnicodeError:
        return None, len(body)
    return body_scan.scan(text), len(text)


def rebuild(parsed: ParsedBody, replaced: Mapping[int, tuple[str, Buffer]], *, ask_usage: bool = False) -> list[Buffer]:
    """The body to send, in pieces.

    `replaced` maps indexes of `images` to (media type, base64 text), or ("", URL); names of images go out with these.
    `ask_usage` adds `stream_options.include_usage`. With neither: the original bytes.
    """
    splices = [splice for index, new in replaced.items() for splice in _image_splices(parsed.images[index], new)]
    if ask_usage and parsed.scan is not None:
        splices.append(_usage_splice(parsed.body, parsed.scan))
    pieces: list[Buffer] = []
    view, at = memoryview(parsed.body), 0
    for (start, end), new in sorted(splices, key=lambda splice: splice[0]):
        pieces += (view[at:start], *new)
        at = end
    return [*pieces, view[at:]] if pieces else [parsed.body]


def parse_object(text: bytes) -> dict[str, Any] | None:
    """A JSON object; None if it is something else."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def listed_images(body: bytes) -> tuple[int, list[str | memoryview]] | None:
    """The number of strings in the list `images` of a body, and the first of them; None if there is no such list.

    A link comes as text, anything else as UTF-8.
    """
    found = body_scan.find(body)
    if found is None or found.sources is None:
        return None
    texts = (_text(body, part) for part in found.sources)
    pairs = zip(found.sources, texts, strict=True)
    return found.source_count, [str(text, "utf-8", "replace") if part.is_link else text for part, text in pairs]


def _image(body: bytes, part: FoundPart, has_options: bool) -> ImagePart:
    text = _text(body, part)
    place = part.url, part.start, part.is_named, "own_options" if has_options or _has_options(body, part) else ""
    if part.is_link:
        return ImagePart(part.where, "", memoryview(b""), str(text, "utf-8", "replace"), *place)
    head = bytes(text[:_MAX_HEAD_BYTES])
    at = head.find(_BASE64_MARK)
    media_type = head[len("data:") : at].decode("latin-1").partition(";")[0].strip().lower()
    data = text[at + len(_BASE64_MARK) :]
    return ImagePart(part.where, media_type, data, "", *place)


def _has_options(body: bytes, part: FoundPart) -> bool:
    """Whether a part may say how its image is to be processed; one that is too long to be read may."""
    start, end = part.url
    if start - part.start > _MAX_PART_BYTES:
        return True
    text = (body[part.start : start] + body[end : end + _MAX_PART_BYTES]).decode("utf-8", "replace")
    try:
        members, _ = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return True
    url = members.get("image_url")
    return bool(members.keys() - _PLAIN_MEMBERS or (isinstance(url, dict) and url.keys() - _PLAIN_URL_MEMBERS))


def _text(body: bytes, part: FoundPart) -> memoryview:
    """The URL of a part: a view into the body, unless it has escapes."""
    start, end = part.url
    return memoryview(body_scan.inside_of(body, start, end)) if part.escaped else memoryview(body)[start:end]


def _image_splices(image: ImagePart, new: tuple[str, Buffer]) -> Iterator[Splice]:
    media_type, data = new
    yield image.url, [f"data:{media_type};base64,".encode(), data] if media_type else [data]
    if image.name:  # a part has a type, so a member follows
        yield (image.start + 1, image.start + 1), [b'"uuid":"%b",' % image.name.encode()]


def _usage_splice(body: bytes, scan: BodyScan) -> Splice:
    """Ask for the usage of a stream that does not: in the last `stream_options`, or in new ones."""
    options, place = scan.options.get("stream_options"), scan.found.members.get("stream_options")
    if place is None:
        brace = body.index(b"{") + 1  # the object is not empty: it says `stream`
        return (brace, brace), [b'"stream_options":{%b},' % _INCLUDE_USAGE]
    start, end = place
    if options is None:
        return place, [b"{%b}" % _INCLUDE_USAGE]
    inner = body_scan.find(memoryview(body)[start:end])
    given = inner and inner.members.get("include_usage")
    if given:
        return (start + given[0], start + given[1]), [b"true"]
    return (start + 1, start + 1), [_INCLUDE_USAGE if _EMPTY_OBJECT.match(body, start) else _INCLUDE_USAGE + b","]
