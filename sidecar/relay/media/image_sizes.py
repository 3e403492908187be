"""Pure: the tokens of a request's images, by what their files' first bytes say of their size, before anybody decodes them.

Rules: an image whose header does not say it, or that the model's processor would refuse, is left to the caller's guess. A size is
taken as stored: a photo that is to be turned has the same number of tokens, or nearly.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from itertools import islice
from typing import Final

from sidecar.images import file_headers
from sidecar.kernels.grid import ProcessorSpec
from sidecar.relay.request_body import ImagePart

HEADS: Final = (
    4 << 10,
    128 << 10,
)  # base64 characters looked at: nearly all files say it at once; EXIF and ICC blocks come first in some
MAX_IMAGES_READ: Final = 64  # images looked at


def tokens_of(parts: Iterable[ImagePart], spec: ProcessorSpec) -> list[int]:
    """The tokens of those images that say their size."""
    found = (_tokens(part, spec) for part in islice(parts, MAX_IMAGES_READ))
    return [tokens for tokens in found if tokens]


def _tokens(part: ImagePart, spec: ProcessorSpec) -> int:
    for length in HEADS:
        try:
            header = file_headers.read(base64.b64decode(part.data[: min(length, len(part.data) & ~3)]))
        except binascii.Error:
            return 0
        if header is not None and header.width:
            try:
                return spec.geometry(header.height, header.width).tokens
            except ValueError:
                return 0
        if len(part.data) <= length:
            break
    return 0
