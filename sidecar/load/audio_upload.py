"""Pure: an upload of audio (a transcription) or a picture: how long it is, and the options of its form.

Rules: a length comes from the file's own header where it has one: exact for WAV, FLAC, Ogg, MP4 and WebM, and for MP3
with a count of its frames. Of anything else, it is the size over a usual bit rate. What is read here is bounded, and
nothing is decoded; the engine's answer corrects it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from typing import Final

from sidecar.load.api_routes import Api
from sidecar.load.request_shape import MAX_MODEL_NAME_CHARS, RequestShape, picture_share

Bytes = memoryview

USUAL_BYTES_PER_S: Final = 8000.0  # 64 kbit/s: speech as MP3, AAC or Opus has 24 to 128
# Eight channels of 192,000 samples of 32 bits, and a day: headers outside these bounds are wrong.
MAX_BYTES_PER_S: Final = 8 * 192_000 * 4
MAX_SECONDS: Final = 86_400.0
MAX_PARTS: Final = 64  # of a form
_MAX_HEAD_BYTES: Final = 4096  # of a part
_MAX_VALUE_BYTES: Final = 64 << 10  # of a field that is read
_BOUNDARY: Final = re.compile(r'boundary=(?:"([^"]{1,200})"|([^;\s]{1,200}))', re.IGNORECASE)
_NAME: Final = re.compile(rb'\bname="([^"]*)"|\bname=([^;\s]+)', re.IGNORECASE)
_FILE_NAME: Final = re.compile(rb"\bfilename\*?=", re.IGNORECASE)
_TRUE: Final = (b"true", b"1", b"on", b"yes")


def is_upload(api: Api, content_type: str) -> bool:
    """Whether a body is a form with a file that is priced, or the file itself."""
    return api.output_of == "second" or (api.output_of == "picture" and content_type.lower().startswith("multipart/"))


def describe_upload(body: bytes, content_type: str, api: Api) -> RequestShape:
    """The shape of a form with a sound or a picture, or of a body that is one."""
    fields: dict[bytes, bytes] = {}
    sound = memoryview(body)
    boundary = _BOUNDARY.search(content_type)
    if content_type.lower().startswith("multipart/") and boundary is not None:
        found = memoryview(b"")
        for name, value, is_file in _parts(body, (boundary[1] or boundary[2]).encode("latin-1", "replace")):
            if is_file and len(value) > len(found):
                found = value
            elif not is_file:
                fields[name] = bytes(value[:_MAX_VALUE_BYTES])
        sound = found or sound  # other form encodings must not bypass pricing
    seconds = seconds_of(sound) if api.output_of == "second" else 0.0
    size, steps = fields.get(b"size", b"").decode("latin-1"), _number(fields.get(b"num_inference_steps", b""))
    share = picture_share(size, steps) if api.output_of == "picture" else 1.0
    limit, choices = _number(fields.get(b"max_completion_tokens", b"")), _number(fields.get(b"n", b"")) or 1
    return RequestShape(
        model=fields.get(b"model", b"")[:MAX_MODEL_NAME_CHARS].decode(errors="replace"),
        stream=fields.get(b"stream", b"").strip().lower() in _TRUE,
        generative=api.generates,
        max_output=limit,
        choices=choices,
        text_bytes=len(fields.get(b"prompt", b"")),
        images=int(api.output_of == "picture"),
        audio_seconds=seconds,
        told_output=max(1, round(api.output_per * (seconds or choices * share))),
    )


def _number(text: bytes) -> int | None:
    return int(text) if text.isdigit() and len(text) < 10 else None


def seconds_of(sound: Bytes, size: int | None = None) -> float:
    """The length of a sound file. `size`: its bytes, if `sound` is only the first ones (of Ogg: and the last)."""
    size = len(sound) if size is None else size
    told = next((read(sound, size) for mark, at, read in _READERS if bytes(sound[at : at + len(mark)]) == mark), None)
    if told is None or not size / MAX_BYTES_PER_S <= told <= MAX_SECONDS:
        return size / USUAL_BYTES_PER_S
    return told


def _parts(body: bytes, boundary: bytes) -> Iterator[tuple[bytes, Bytes, bool]]:
    """Name, value, and whether it is a file, of each part of a form."""
    mark, view = b"--" + boundary, memoryview(body)
    at = body.find(mark)
    for _ in range(MAX_PARTS):
        if at < 0:
            return
        start = at + len(mark)
        end = body.find(b"\r\n" + mark, start)
        head_end = body.find(b"\r\n\r\n", start, start + _MAX_HEAD_BYTES)
        if head_end >= 0:
            head = body[start:head_end]
            name = _NAME.search(head)
            stop = len(body) if end < 0 else end
            yield (name[1] or name[2] or b"") if name else b"", view[head_end + 4 : stop], bool(_FILE_NAME.search(head))
        at = end + 2 if end >= 0 else -1


# --- formats: seconds, or None if the header does not state them ---


def _wav(sound: Bytes, total: int) -> float | None:
    at, rate = 12, 0.0
    for _ in range(32):  # chunks
        if at + 8 > len(sound):
            return None
        name, size = bytes(sound[at : at + 4]), int.from_bytes(sound[at + 4 : at + 8], "little")
        if name == b"fmt " and at + 24 <= len(sound):
            kind, channels, hertz, bytes_per_s, _, bits = struct.unpack_from("<HHIIHH", sound, at + 8)
            rate = channels * hertz * bits / 8 if kind in (1, 3, 0xFFFE) else bytes_per_s
        elif name == b"data":  # a streaming writer leaves its size open
            return min(size, total - at - 8) / rate if rate else None
        at += 8 + size + size % 2
    return None


def _flac(sound: Bytes, _: int) -> float | None:
    if len(sound) < 26:
        return None
    packed = int.from_bytes(sound[18:26], "big")  # of STREAMINFO, which comes first
    hertz, samples = packed >> 44, packed & ((1 << 36) - 1)
    return samples / hertz if hertz else None


def _ogg(sound: Bytes, _: int) -> float | None:
    head, tail = bytes(sound[:256]), bytes(sound[-65536:])
    last = tail.rfind(b"OggS")
    if last < 0 or last + 14 > len(tail):
        return None
    samples = int.from_bytes(tail[last + 6 : last + 14], "little")
    if b"OpusHead" in head:
        return samples / 48000
    vorbis = head.find(b"\x01vorbis")
    hertz = int.from_bytes(head[vorbis + 12 : vorbis + 16], "little") if vorbis >= 0 else 0
    return samples / hertz if hertz else None


def _mp4(sound: Bytes, _: int) -> float | None:
    """From the first movie header among the boxes at the top."""
    at = 0
    for _ in range(256):
        if at + 16 > len(sound):
            return None
        size, name = int.from_bytes(sound[at : at + 4], "big"), bytes(sound[at + 4 : at + 8])
        if size == 1:
            size = int.from_bytes(sound[at + 8 : at + 16], "big")
        if name == b"moov":
            moov = bytes(sound[at : at + 512])
            header = moov.find(b"mvhd")
            if header < 0:
                return None
            wide = moov[header + 4 : header + 5] == b"\x01"
            form, skip = (">IQ", 24) if wide else (">II", 16)
            if header + skip + struct.calcsize(form) > len(moov):
                return None
            scale, duration = struct.unpack_from(form, moov, header + skip)
            return duration / scale if scale else None
        if size < 8:
            return None
        at += size
    return None


def _webm(sound: Bytes, _: int) -> float | None:
    head = bytes(sound[:4096])
    at, scale = head.find(b"\x44\x89"), head.find(b"\x2a\xd7\xb1\x83")
    if at < 0 or at + 11 > len(head):
        return None
    form = {0x84: ">f", 0x88: ">d"}.get(head[at + 2])
    ns = int.from_bytes(head[scale + 4 : scale + 7], "big") if scale >= 0 else 1_000_000
    return float(struct.unpack_from(form, head, at + 3)[0]) * ns / 1e9 if form else None


# kbit/s of layer III by index, of MPEG 1 and of MPEG 2; samples per second of MPEG 1
_MP3_RATES: Final = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0),
)
_MP3_HERTZ: Final = (44100, 48000, 32000, 0)


def _mp3(sound: Bytes, total: int) -> float | None:
    """By its frames where it counts them, else by the bit rate of the first one."""
    start = 0
    if bytes(sound[:3]) == b"ID3" and len(sound) > 10:
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(sound[6:10], (21, 14, 7, 0), strict=True))
    if start + 4 > len(sound) or sound[start] != 0xFF or sound[start + 1] & 0xE0 != 0xE0:
        return None
    version, index = sound[start + 1] >> 3 & 3, sound[start + 2]
    is_first = version == 3
    hertz = _MP3_HERTZ[index >> 2 & 3] // {3: 1, 2: 2, 0: 4}.get(version, 1)
    rate = _MP3_RATES[not is_first][index >> 4]
    if not hertz or not rate:
        return None
    frame = bytes(sound[start : start + 200])
    tag = next((at for name in (b"Xing", b"Info") if (at := frame.find(name)) >= 0), -1)
    if tag >= 0 and tag + 12 <= len(frame) and frame[tag + 7] & 1:
        return int.from_bytes(frame[tag + 8 : tag + 12], "big") * (1152 if is_first else 576) / hertz
    return (total - start) * 8 / (rate * 1000)


_READERS: Final[tuple[tuple[bytes, int, Callable[[Bytes, int], float | None]], ...]] = (
    (b"WAVE", 8, _wav),
    (b"fLaC", 0, _flac),
    (b"OggS", 0, _ogg),
    (b"ftyp", 4, _mp4),
    (b"\x1a\x45\xdf\xa3", 0, _webm),
    (b"ID3", 0, _mp3),
    (b"\xff", 0, _mp3),
)
