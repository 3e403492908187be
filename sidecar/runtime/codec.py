"""Events and commands as lines of JSON: `["Admitted", {...}]`.

A line is bounded, checked against the record's field types, and decoded without pickle.
"""

from __future__ import annotations

import typing

import msgspec

from sidecar.events import Command, Event

# A metrics page of a large engine is 1-2 MiB.
MAX_LINE_BYTES = 32 * 1024 * 1024

_encoder = msgspec.json.Encoder()
_envelope = msgspec.json.Decoder(tuple[str, msgspec.Raw])
_DECODERS: dict[str, msgspec.json.Decoder[Event | Command]] = {
    cls.__name__: msgspec.json.Decoder(cls) for cls in (*typing.get_args(Event), *typing.get_args(Command))
}


class WireError(ValueError):
    """A line that is not an event or command."""


def encode(record: Event | Command) -> bytes:
    """One record as one line, newline included. Raises UnicodeEncodeError for text with lone surrogates."""
    return _encoder.encode((type(record).__name__, record)) + b"\n"


def decode(line: bytes) -> Event | Command:
    """The record of one line. Raises WireError."""
    try:
        name, fields = _envelope.decode(line)
        return _DECODERS[name].decode(fields)
    except (KeyError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise WireError(f"not a record: {type(e).__name__}") from None
