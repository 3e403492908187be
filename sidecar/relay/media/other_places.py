"""Pure: images and frames in places where none is prepared, found by how their base64 text begins, to be priced.

Anthropic's blocks, outputs of tools, SGLang's `image_data`, Ollama's `images`, lists of frames (`data:video/jpeg`).

Rules: a body is looked through only where its scan has counted more images than it has placed, and no more are taken
than are missing, so that a text that looks like an image changes a price at most. A size is read from each header.
Nothing found here is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from typing import Final

from msgspec import structs

from sidecar.images import header_geometry
from sidecar.load.found import MAX_PARTS, Found
from sidecar.load.request_shape import RequestShape

# The beginning of a string: a data URL, or the text of a JPEG, PNG, WebP or GIF.
_IMAGE: Final = re.compile(
    rb'"(?:data:image/[\w.+-]{1,64}(?:;[\w.=-]{1,64})?;base64,|(?=/9j/|iVBORw0KGgo|UklGR|R0lGOD))', re.IGNORECASE
)
_FRAMES: Final = re.compile(rb'"data:video/jpeg;base64,', re.IGNORECASE)
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
    for match in islice(_IMAGE.finditer(body), MAX_CANDIDATES):
        if match.start() in placed:
            continue
        text = memoryview(body)[match.end() : max(match.end(), body.find(b'"', match.end()))]
        if header_geometry.read_size(text, is_base64=True) is not None:
            texts.append(text)
            if len(texts) == missing:
                break
    return texts


def count_frames(body: bytes, found: Found) -> list[int]:
    """The frames of each video that is a list of JPEGs."""
    counts: list[int] = []
    if found.videos:
        for match in _FRAMES.finditer(body):
            counts.append(1 + body.count(b",", match.end(), body.find(b'"', match.end())))
            if len(counts) >= min(found.videos, MAX_PARTS):
                break
    return counts


def with_frames(shape: RequestShape, counts: Sequence[int]) -> RequestShape:
    """A shape whose videos of counted frames have no more than these."""
    if not counts or not shape.videos:
        return shape
    sampled = shape.video_frames // shape.videos  # by the engine, of each
    fewer = sum(sampled - min(count, sampled) for count in counts)
    return structs.replace(shape, video_frames=shape.video_frames - fewer)
