"""The border between a relay and the image workers: one connection is one job, in frames.

    worker -> relay   Ready                      the job will be served; until then it may be sent again elsewhere
    relay -> worker   Job + the image            base64 text, or raw bytes
    worker -> relay   Done or Refused + payload  then the connection ends

A frame is two big-endian lengths (header, payload), a JSON header and the payload. Rules: both lengths are bounded; no
pickle; a connection that ends without an answer means that the worker was killed: the image was at fault or too slow.
One connection per job, because the listening socket's backlog is then the one fair queue of all relays and workers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import msgspec

PREFIX: Final = struct.Struct("!IQ")  # bytes of the header, bytes of the payload
MAX_HEADER_BYTES: Final = 64 * 1024
MAX_REPLY_BYTES: Final = 2 << 30  # fp32 patches of the largest image that Qwen3-VL's own limit lets through are 0.8 GB

PIXELS: Final = "pixels"  # a resized lossless image, as base64 text
RAW: Final = "raw"  # the resized image's RGB bytes
INLINE: Final = (PIXELS, RAW)  # what takes the image's place in a request
TENSORS: Final = "tensors"  # the processor's output
LAYOUT: Final = "layout"  # no payload: sizes only, of an image that does decode


Data = bytes | bytearray | memoryview


class FrameError(ValueError):
    """Bytes that are no frame of ours, or one over the bound."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What an image may be, checked on its header before anything is allocated."""

    max_bytes: int
    max_pixels: int
    max_side: int = 65_535


@dataclass(frozen=True, slots=True)
class ImageJob:
    """What to do with one image. `spec` is ProcessorSpec.to_json(); `want` is PIXELS, RAW, TENSORS or LAYOUT."""

    want: str
    spec: str
    base64: bool
    limits: ImageLimits
    seconds: float  # deadline, counted from when the worker has the whole image
    gpu: bool = False  # whether a GPU that is there may be used now


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker has taken the connection."""


@dataclass(frozen=True, slots=True)
class ImageDone:
    """An image was prepared or passed. Sizes are those that the model sees; `stages` are seconds in the worker."""

    outcome: str  # "ok" or "passed"; a passed image has no payload
    format: str
    media_type: str
    height: int
    width: int
    grid: tuple[int, int, int]
    tokens: int
    content_hash: str
    stages: tuple[tuple[str, float], ...]
    bytes_in: int
    original: tuple[int, int] = (0, 0)  # height and width before anything was done to it


@dataclass(frozen=True, slots=True)
class ImageRefused:
    """An image was not accepted. `reason` is an image reason code, `message` says which limit, without its content."""

    reason: str
    message: str
    format: str = "unknown"


Frame = ImageJob | WorkerReady | ImageDone | ImageRefused
_encoder: Final = msgspec.json.Encoder()
_envelope: Final = msgspec.json.Decoder(tuple[str, msgspec.Raw])
_DECODERS: Final[dict[str, msgspec.json.Decoder[Frame]]] = {
    kind.__name__: msgspec.json.Decoder(kind) for kind in (ImageJob, WorkerReady, ImageDone, ImageRefused)
}


def encode_head(record: Frame, payload: int = 0) -> bytes:
    """The first bytes of a frame; `payload` more bytes must follow."""
    header = _encoder.encode((type(record).__name__, record))
    return PREFIX.pack(len(header), payload) + header


def decode_prefix(prefix: Data, max_payload: int) -> tuple[int, int]:
    """Header and payload bytes of a frame. Raises FrameError when one is over its bound, or there is no such prefix."""
    if len(prefix) != PREFIX.size:
        raise FrameError("a frame that is cut off")
    header, payload = PREFIX.unpack(prefix)
    if header > MAX_HEADER_BYTES or payload > max_payload:
        raise FrameError("a frame over the bound")
    return header, payload


def decode_header(header: bytes | bytearray) -> Frame:
    """The record of a frame's header. Raises FrameError."""
    try:
        name, fields = _envelope.decode(header)
        return _DECODERS[name].decode(fields)
    except (KeyError, msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise FrameError(f"not a frame: {type(e).__name__}") from None
