"""Pure: the videos of a body, found by their keys and how their data URLs begin, and measured to be priced.

`video_url`, `input_video` and `video` parts, SGLang's `video_data`, lists of JPEGs (`data:video/jpeg`).

Rules: a body is looked through only where its scan has counted videos, and no more are taken than that, so a text that
looks like one changes a price at most. Links are not followed: they are priced as videos of unknown length. A body is
searched for a few literals, piece by piece, as in other_places. What is read of all videos together is bounded.
"""

from __future__ import annotations

import re
from typing import Final

from sidecar.images import header_geometry, video_headers
from sidecar.images.video_headers import VideoHeader
from sidecar.load.found import MAX_PARTS, Found
from sidecar.relay.media import other_places

MAX_READS: Final = 4096  # of all videos of a body
_KEYS: Final = (b'"video_url"', b'"input_video"', b'"video"', b'"video_data"', b'"videos"', b'"data:video/')
# A data URL, alone or as the member of an object that stands first or after one short member.
_URL: Final = re.compile(
    rb'(?:"[a-z_]{5,11}"\s*:\s*(?:\[\s*)?'
    rb'(?:\{(?:\s*"(?!data"|url")[^"\\]{1,32}"\s*:\s*(?:"[^"\\]{0,64}"|null)\s*,)?\s*"(?:data|url|video)"\s*:\s*)?)?'
    rb'"data:([^",]{0,100}),',
    re.IGNORECASE,
)
JPEG_LIST: Final = b"video/jpeg"


def find_videos(body: bytes, found: Found) -> list[tuple[bool, VideoHeader]]:
    """Whether it is a list of JPEGs, and its header, of at most as many videos as `found` counts."""
    number = found.videos + sum(
        found.items[name].number or 1 for name in ("video_data", "videos") if name in found.items
    )
    videos: dict[int, tuple[bool, VideoHeader]] = {}
    reads = MAX_READS
    for at in other_places.places(body, _KEYS) if number else ():
        if len(videos) == min(number, MAX_PARTS):
            break
        match = _URL.match(body, at)
        if match is None or match.end() in videos:
            continue
        end = body.find(b'"', match.end())
        text = memoryview(body)[match.end() : max(match.end(), end)]
        if body.find(b"\\", match.end(), end) >= 0:  # as some encoders of JSON write slashes
            text = memoryview(bytes(text).replace(b"\\/", b"/"))
        kind = match[1].replace(b"\\/", b"/").partition(b";")[0].strip().lower()
        if kind == JPEG_LIST:
            videos[match.end()] = True, _of_list(text)
        else:
            share = min(reads, max(64, MAX_READS // number))
            videos[match.end()] = False, video_headers.read(text, is_base64=True, reads=share) or video_headers.UNKNOWN
            reads -= share
    return list(videos.values())


def _of_list(text: memoryview) -> VideoHeader:
    """The number of JPEGs in a list, and the size of the first."""
    whole = bytes(text)
    end = whole.find(b",")
    first = header_geometry.read_size(text[: end if end >= 0 else len(text)], is_base64=True)
    height, width = (first.height, first.width) if first else (0, 0)
    return VideoHeader(1 + whole.count(b","), 0.0, height, width)
