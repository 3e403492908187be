"""Events and commands as lines of JSON: `["Admitted", "17-1", ...]`, the fields of a record in their order.

Lines are bounded, checked against the records' field types, and decoded without pickle. Many are read by one call: at
a thousand requests a second, a call for each would be a share of what they cost.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import msgspec

from sidecar.events import Command, Event

# A metrics page of a large engine is 1-2 MiB.
MAX_LINE_BYTES: Final = 32 * 1024 * 1024

_ERRORS: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_encoder: Final = msgspec.json.Encoder()
_decoder: Final[msgspec.json.Decoder[Event | Command]] = msgspec.json.Decoder(Event | Command)


class WireError(ValueError):
    """A line that is not an event or command."""


def encode(record: Event | Command) -> bytes:
    """One record as one line, newline included. Raises UnicodeEncodeError for text with lone surrogates."""
    return _encoder.encode(record) + b"\n"


def decode(line: bytes) -> Event | Command:
    """The record of one line. Raises WireError."""
    try:
        record: Event | Command = _decoder.decode(line)
        return record
    except _ERRORS as e:
        raise WireError(f"not a record: {type(e).__name__}") from None


def decode_all(lines: bytes) -> list[Event | Command]:
    """The records of whole lines; an invalid line is skipped."""
    try:
        return _decoder.decode_lines(lines)
    except _ERRORS:
        records = []
        for line in lines.splitlines():
            with suppress(WireError):
                records.append(decode(line))
        return records
