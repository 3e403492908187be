"""Sans-I/O: what an answer says of itself (id, model, why it ended), read while it passes, for sampled traces only.

Rules: id and model are those of the first event that has them, within the first MAX_HEAD_BYTES; an event of the
responses and messages APIs has them one level down. A finish reason is a short word after its key, wherever it stands:
inside a text of the answer the quotes of a key would be escaped. What is kept is bounded; content never is.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from sidecar.events import AnswerDetails

MAX_HEAD_BYTES: Final = 16 << 10
MAX_NAME_CHARS: Final = 128
MAX_REASONS: Final = 16
# Between two chunks: longer than a key, its value and the space between.
_OVERLAP_BYTES: Final = 96
# OpenAI's, Anthropic's and Ollama's; SGLang's own is an object: {"type": "stop"}.
_REASON: Final = re.compile(
    rb'"(?:finish_reason|stop_reason|done_reason)"\s*:\s*(?:\{\s*"type"\s*:\s*)?"([A-Za-z_]{1,32})"'
)
# A chunk of whole lines without one of these has no reason that matches: most say `"finish_reason":null`.
_HINTS: Final = (b'_reason":"', b'_reason": "', b'_reason":{', b'_reason": {')
_HOLDERS: Final = ("response", "message", "meta_info")
_FIELD: Final = b"data:"


class AnswerReader:
    """One answer: a stream by its chunks, or a body at once."""

    __slots__ = ("_head", "_id", "_model", "_reasons", "_tail")

    def __init__(self) -> None:
        self._head: bytearray | None = bytearray()  # None once it has been read
        self._id = self._model = ""
        self._reasons: list[str] = []
        self._tail = b""

    def feed(self, chunk: bytes) -> None:
        """A piece of a stream."""
        if self._head is not None:
            self._head += chunk[: MAX_HEAD_BYTES - len(self._head)]
            self._read_head()
        if not self._tail and chunk.endswith(b"\n") and not any(hint in chunk for hint in _HINTS):
            return
        text = self._tail + chunk
        end = 0
        for match in _REASON.finditer(text):
            end = match.end()
            if len(self._reasons) < MAX_REASONS:
                self._reasons.append(match[1].decode())
        self._tail = b"" if text.endswith(b"\n") else text[max(end, len(text) - _OVERLAP_BYTES) :]

    def body(self, body: bytes) -> None:
        """A whole answer of one JSON text."""
        self._take(body)
        self._head = None
        self.feed(body)

    def details(self) -> AnswerDetails:
        """What is known by now."""
        return AnswerDetails(self._id, self._model, tuple(self._reasons))

    def _read_head(self) -> None:
        """Read the events that are complete by now."""
        assert self._head is not None
        lines = bytes(self._head).split(b"\n")
        for line in lines[:-1]:
            self._take(line.removeprefix(_FIELD))
        if (self._id and self._model) or len(self._head) >= MAX_HEAD_BYTES:
            self._head = None
        else:
            self._head = bytearray(lines[-1])

    def _take(self, text: bytes) -> None:
        """Take id and model from a JSON text that has them."""
        if b"{" not in text:
            return
        try:
            found = msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError):
            return
        if isinstance(found, list):
            found = found[0] if found else None
        if not isinstance(found, dict):
            return
        holders = [found, *(found[name] for name in _HOLDERS if isinstance(found.get(name), dict))]
        self._id = self._id or _name(holders, "id")
        self._model = self._model or _name(holders, "model")


def _name(holders: list[dict[str, Any]], key: str) -> str:
    """A short printable text under a key; "" without any."""
    for holder in holders:
        value = holder.get(key)
        if isinstance(value, str) and 0 < len(value) <= MAX_NAME_CHARS and value.isprintable():
            return value
    return ""
