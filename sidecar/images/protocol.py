"""The protocol between relays and image workers: one connection per job, in frames.

    worker -> relay   WorkerReady                          the job will be served; before that it may be retried
    relay -> worker   ImageJob + the image                 base64 text, or raw bytes; VideoJob + the video
    worker -> relay   ImageDone or ImageRefused + payload  then the connection closes; VideoDone of a video

A frame is two big-endian lengths (header, payload), a JSON header and the payload. With a job whose `file_bytes` are
not 0 comes an open file in shared memory (SCM_RIGHTS): the payload is written there, and none is sent back.

Rules: both lengths are bounded. No pickle. A connection that closes without a reply means that the worker was killed:
the image broke it or took too long. With one connection per job, the listening socket's backlog is one fair queue for
all relays and workers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import msgspec

PREFIX: Final = struct.Struct("!IQ")  # bytes of the header, bytes of the payload
MAX_HEADER_BYTES: Final = 64 * 1024
MAX_REPLY_BYTES: Final = 2 << 30  # see tensor_budget.MAX_TENSOR_BYTES

PIXELS: Final = "pixels"  # a resized lossless image, as base64 text
RAW: Final = "raw"  # the resized image's RGB bytes
INLINE: Final = (PIXELS, RAW)  # what replaces the image in a request
TENSORS: Final = "tensors"  # the processor's output
LAYOUT: Final = "layout"  # sizes only, no payload; decoded only if the header does not say them for certain
COSTS: Final = "costs"  # no image: the unit costs of cost_rule.py, measured by this worker, as the answer's stages

Data = bytes | bytearray | memoryview


class FrameError(ValueError):
    """Bytes that are not a valid frame, or a frame that exceeds a limit."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits of an image, checked on its header before anything is allocated."""

    max_bytes: int
    max_pixels: int
    max_side: int = 65_535


@dataclass(frozen=True, slots=True)
class ImageJob:
    """What to do with one image. `spec` is ProcessorSpec.to_json(); `want` is PIXELS, RAW, TENSORS, LAYOUT or COSTS."""

    want: str
    spec: str
    base64: bool
    limits: ImageLimits
    seconds: float  # deadline, from when the worker has received the whole image
    gpu: bool = False  # whether an available GPU may be used now
    file_bytes: int = 0  # size of the open file that comes with the job, for the payload; 0: the payload is sent back


@dataclass(frozen=True, slots=True)
class VideoJob:
    """What to do with one video. `spec` is VideoSpec.to_json(); `want` is TENSORS or LAYOUT.

    `jpegs`: the payload is a list of JPEGs as base64 texts, with commas between them. `fps`, `count`: which frames are
    taken, 0 as usual; as vLLM's loaders do, which know no count, or `by_processor`, as the processor does by itself.
    """

    want: str
    spec: str
    base64: bool
    limits: ImageLimits
    seconds: float
    jpegs: bool = False
    count: int = 0
    fps: float = 0.0
    by_processor: bool = False
    file_bytes: int = 0


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker has accepted the connection."""


@dataclass(frozen=True, slots=True)
class ImageDone:
    """An image was prepared or passed through. Sizes are what the model sees; `stages` are seconds in the worker."""

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
    original: tuple[int, int] = (0, 0)  # height and width as decoded
    reason: str = ""  # why it passed: a code of pass_reasons


@dataclass(frozen=True, slots=True)
class VideoDone:
    """A video was prepared. `indices`: which of its frames were taken; `fps` is the file's own.

    `timestamps` are those of Qwen3-VL's steps in seconds, `second_per_grid` is that of Qwen2.5-VL's; 0: it has none.
    """

    format: str
    height: int
    width: int
    grid: tuple[int, int, int]
    tokens: int
    content_hash: str
    stages: tuple[tuple[str, float], ...]
    bytes_in: int
    original: tuple[int, int]
    indices: tuple[int, ...]
    total_frames: int
    fps: float
    timestamps: tuple[float, ...] = ()
    second_per_grid: float = 0.0


@dataclass(frozen=True, slots=True)
class ImageRefused:
    """An image was refused. `reason` is an image reason code; `message` names the limit, never the content."""

    reason: str
    message: str
    format: str = "unknown"


Frame = ImageJob | VideoJob | WorkerReady | ImageDone | VideoDone | ImageRefused
_encoder: Final = msgspec.json.Encoder()
_envelope: Final = msgspec.json.Decoder(tuple[str, msgspec.Raw])
_DECODERS: Final[dict[str, msgspec.json.Decoder[Frame]]] = {
    kind.__name__: msgspec.json.Decoder(kind)
    for kind in (ImageJob, VideoJob, WorkerReady, ImageDone, VideoDone, ImageRefused)
}


def encode_head(record: Frame, payload: int = 0) -> bytes:
    """A frame without its payload; `payload` bytes must follow."""
    header = _encoder.encode((type(record).__name__, record))
    return PREFIX.pack(len(header), payload) + header


def decode_prefix(prefix: Data, max_payload: int) -> tuple[int, int]:
    """Lengths of a frame's header and payload. Raises FrameError if the prefix is incomplete or a length too large."""
    if len(prefix) != PREFIX.size:
        raise FrameError("truncated frame")
    header, payload = PREFIX.unpack(prefix)
    if header > MAX_HEADER_BYTES or payload > max_payload:
        raise FrameError("frame too large")
    return header, payload


def decode_header(header: bytes | bytearray) -> Frame:
    """The record of a frame's header. Raises FrameError."""
    try:
        name, fields = _envelope.decode(header)
        return _DECODERS[name].decode(fields)
    except (KeyError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise FrameError(f"not a frame: {type(e).__name__}") from None
