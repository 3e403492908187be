"""Pure: the tokens of a request's images, from the sizes in their headers, before anything is decoded.

Rules: an image whose header states no size, or that the model's processor would refuse, is left to the caller's
estimate. Sizes are taken as stored: a photo that is to be rotated has the same number of tokens, or nearly.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final

from sidecar.images import header_geometry
from sidecar.kernels.grid import ProcessorSpec
from sidecar.relay.request_body import ImagePart

MAX_IMAGES_READ: Final = 64


def tokens_of(parts: Iterable[ImagePart], spec: ProcessorSpec) -> list[int]:
    """The tokens of the images whose headers state their size."""
    found = (_tokens(part, spec) for part in islice(parts, MAX_IMAGES_READ))
    return [tokens for tokens in found if tokens]


def _tokens(part: ImagePart, spec: ProcessorSpec) -> int:
    header = header_geometry.read_size(part.data, is_base64=True)
    if header is None:
        return 0
    try:
        return spec.geometry(header.height, header.width).tokens
    except ValueError:
        return 0
