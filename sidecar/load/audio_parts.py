"""Pure: how long the recordings are that a body holds as base64, in parts of a chat: input_audio, audio_url.

Rules: each is found by its key and measured by its first bytes (and the last ones of an Ogg file); the rest is passed
over, not decoded. The number of recordings is that of the scan, so what merely looks like one adds none: the longest
ones count. Links, and what is not found, are left out.
"""

from __future__ import annotations

import binascii
import re
from itertools import islice
from typing import Final

from sidecar.load import audio_upload

MAX_LOOKED_AT: Final = 256  # of one body
_HEAD_CHARS: Final = 12 << 10
_TAIL_CHARS: Final = 84 << 10
_OGG: Final = b"OggS"
# A key, then the string itself or an object whose `data` or `url` it is, and the head of a data URL.
_RECORDING: Final = re.compile(
    rb'"(?:input_audio|audio_url|audio|audio_data)"\s*:\s*(?:\[\s*)?'
    rb'(?:\{(?:\s*"(?!data"|url")[^"\\]{1,32}"\s*:\s*(?:"[^"\\]{0,64}"|null)\s*,)?\s*"(?:data|url)"\s*:\s*)?'
    rb'"(?!http)(?:data:[^",]{0,100},)?(?=[A-Za-z0-9+/])'
)


def seconds_in(body: bytes, number: int) -> list[float]:
    """The seconds of at most `number` recordings in a body, longest first."""
    found = []
    for match in islice(_RECORDING.finditer(body), MAX_LOOKED_AT):
        end = body.find(b'"', match.end())
        if end > match.end():
            found.append(_seconds(body, match.end(), end))
    return sorted(found, reverse=True)[:number]


def _seconds(body: bytes, start: int, end: int) -> float:
    size = (end - start) * 3 // 4
    head = _decoded(body[start : min(end, start + _HEAD_CHARS)])
    if head.startswith(_OGG) and end - start > _HEAD_CHARS:
        tail = max(start, end - _TAIL_CHARS)
        head += _decoded(body[tail + (start - tail) % 4 : end])
    return audio_upload.seconds_of(memoryview(head), size)


def _decoded(text: bytes) -> bytes:
    """The bytes of a piece of base64; nothing if it is something else."""
    text = text.replace(b"\\/", b"/")  # as some encoders of JSON write it
    try:
        return binascii.a2b_base64(text[: len(text) // 4 * 4])
    except binascii.Error:
        return b""
