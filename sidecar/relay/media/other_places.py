"""Pure: images in places where none is prepared, found by how their base64 text begins, to be priced.

Anthropic's blocks, outputs of tools, SGLang's `image_data`, Ollama's `images`.

Rules: a body is looked through only where its scan has counted more images than it has placed, and no more are taken
than are missing, so that a text that looks like an image changes a price at most. A size is read from each header.
Nothing found here is replaced. A body is searched piece by piece for a few literals, as this holds the interpreter's
lock: a pattern that begins with a quote takes 20 ms of a megabyte of short strings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

from sidecar.images import header_geometry
from sidecar.load.found import MAX_PARTS, Found

# The beginning of a string: a data URL, or the text of a JPEG, PNG, WebP or GIF.
_IMAGE: Final = re.compile(
    rb'"(?:data:image/[\w.+-]{1,64}(?:;[\w.=-]{1,64})?;base64,|(?=/9j/|iVBORw0KGgo|UklGR|R0lGOD))', re.IGNORECASE
)
# How these begin, in the cases that are written.
_IMAGE_MARKS: Final = (
    *(b'"data:image/', b'"Data:image/', b'"Data:Image/', b'"DATA:IMAGE/'),
    *(b'"/9j/', b'"iVBORw0KGgo', b'"UklGR', b'"R0lGOD'),
)
PIECE_BYTES: Final = 1 << 18  # that are searched at a time
MAX_CANDIDATES: Final = 4 * MAX_PARTS  # that are looked at; a text may begin like an image
_LISTS: Final = ("images", "image_data")  # members of a body that hold images


def find_images(body: bytes, found: Found) -> list[memoryview]:
    """The base64 texts of images that `found` counts and has no place of."""
    held = sum(found.items[name].number or 1 for name in _LISTS if name in found.items)
    missing = min(found.images + held - found.image_parts - found.link_parts, MAX_PARTS)
    if missing <= 0:
        return []
    placed = {part.url[0] - 1 for part in found.parts}
    texts: list[memoryview] = []
    for at in islice(places(body, _IMAGE_MARKS), MAX_CANDIDATES):
        match = _IMAGE.match(body, at)
        if match is None or at in placed:
            continue
        text = memoryview(body)[match.end() : max(match.end(), body.find(b'"', match.end()))]
        if header_geometry.read_size(text, is_base64=True) is not None:
            texts.append(text)
            if len(texts) == missing:
                break
    return texts


def places(body: bytes, marks: Sequence[bytes]) -> Iterator[int]:
    """Where one of the marks begins, in order; of each mark the first MAX_CANDIDATES of a piece."""
    longest = max(map(len, marks))
    for start in range(0, len(body), PIECE_BYTES):
        end = start + PIECE_BYTES + longest - 1  # one may begin at the end of a piece
        found: set[int] = set()
        for mark in marks:
            at = body.find(mark, start, end)
            for _ in range(MAX_CANDIDATES):
                if at < 0 or at >= start + PIECE_BYTES:
                    break
                found.add(at)
                at = body.find(mark, at + 1, end)
        yield from sorted(found)
