"""How many frames a video file has, how fast and how large they are, from its container's headers.

Rules: pure; nothing is decoded. Bytes are read where the container says that something lies, so a file of any length
costs a few reads, also where its index stands at its end. The number of reads and the bytes of each are bounded, no
allocation depends on a length that the file gives, and nothing is raised: what cannot be read is 0. Numbers are those
that FFmpeg reports, and with it the engines: an MP4's edit list hides frames, a WebM's frames follow from its length.

Formats: MP4, MOV and 3GP (also in fragments), Matroska and WebM, AVI.
"""

from __future__ import annotations

import binascii
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, NamedTuple

MAX_READS: Final = 2048  # of one file; each takes about 3 µs
MAX_READ_BYTES: Final = 32 << 10
MAX_FRAMES: Final = 1 << 22  # 38 hours at 30 a second
MAX_FPS: Final = 1000.0
MAX_SIDE: Final = 1 << 15
_TIMED_ENTRIES: Final = 1024  # of a table of frame durations


class VideoHeader(NamedTuple):
    """What a container says of its video; 0 where it does not."""

    frames: int = 0
    fps: float = 0.0
    height: int = 0
    width: int = 0


UNKNOWN: Final = VideoHeader()


class OutOfReads(Exception):
    """A file has more parts than are looked at."""


@dataclass(slots=True)
class VideoFile:
    """A file whose bytes are read by their place: from its base64 text, or from its bytes."""

    data: memoryview
    is_base64: bool
    size: int = 0
    left: int = MAX_READS

    def __post_init__(self) -> None:
        padding = len(self.data[-2:].tobytes().partition(b"=")[1:][0]) if self.is_base64 and self.data else 0
        self.size = len(self.data) * 3 // 4 - padding if self.is_base64 else len(self.data)

    def read(self, at: int, size: int) -> bytes:
        """The bytes from `at` on, fewer at the file's end. Raises OutOfReads, and binascii.Error for no base64."""
        if self.left <= 0:
            raise OutOfReads
        self.left -= 1
        size = min(size, MAX_READ_BYTES)
        if not 0 <= at < self.size or size <= 0:
            return b""
        if not self.is_base64:
            return bytes(self.data[at : at + size])
        text = self.data[at // 3 * 4 : -(-(at + size) // 3) * 4]
        return binascii.a2b_base64(text)[at % 3 : at % 3 + size]


def read(
    data: bytes | bytearray | memoryview, *, is_base64: bool = False, reads: int = MAX_READS
) -> VideoHeader | None:
    """The header of a video, or of its base64 text; None if its container is not known.

    At most `reads` pieces of it are read.
    """
    file = VideoFile(memoryview(data), is_base64, left=min(reads, MAX_READS))
    try:
        head = file.read(0, 16)
        reader = next((reader for mark, at, _, reader in CONTAINERS if head[at : at + len(mark)] == mark), None)
        return None if reader is None else _checked(reader(file))
    except (OutOfReads, binascii.Error, struct.error, ValueError, OverflowError, ZeroDivisionError):
        return UNKNOWN


def format_of(data: bytes) -> str:
    """The name of a video's container; "unknown" for another."""
    return next((name for mark, at, name, _ in CONTAINERS if data[at : at + len(mark)] == mark), "unknown")


def _checked(found: VideoHeader) -> VideoHeader:
    """Numbers within bounds; 0 for those that are not."""
    frames, fps, height, width = found
    return VideoHeader(
        frames if 0 < frames <= MAX_FRAMES else 0,
        fps if 0 < fps <= MAX_FPS else 0.0,
        *((height, width) if 0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE else (0, 0)),
    )


# --- MP4: boxes of a length, a name and content ---

Box = tuple[bytes, int, int]  # name, start and end of the content


def _boxes(file: VideoFile, start: int, end: int) -> Iterator[Box]:
    """The boxes of a part of the file, up to the first that is damaged."""
    at = start
    while at + 8 <= end:
        head = file.read(at, 16)
        if len(head) < 8:
            return
        size, name = struct.unpack_from("!I4s", head)
        begin = at + 8
        if size == 1:
            (size,) = struct.unpack_from("!Q", head, 8)
            begin += 8
        stop = at + size if size else end
        if stop < begin:
            return
        yield name, begin, min(stop, end)
        at = stop


def _box(file: VideoFile, where: tuple[int, int] | None, *names: bytes) -> tuple[int, int] | None:
    """The content of a box in boxes, by their names."""
    for name in names:
        if where is None:
            return None
        where = next(((begin, end) for found, begin, end in _boxes(file, *where) if found == name), None)
    return where


def _numbers(file: VideoFile, where: tuple[int, int] | None, form: str, skip: int = 0) -> tuple[int, ...] | None:
    if where is None:
        return None
    content = file.read(where[0] + skip, min(struct.calcsize(form), where[1] - where[0] - skip))
    return struct.unpack(form, content) if len(content) == struct.calcsize(form) else None


def _times(file: VideoFile, where: tuple[int, int] | None) -> tuple[int, int]:
    """Time scale and duration of a box that begins like `mvhd` or `mdhd`."""
    version = _numbers(file, where, "!B")
    found = _numbers(file, where, "!IQ", 20) if version == (1,) else _numbers(file, where, "!II", 12)
    return (found[0], found[1]) if found else (0, 0)


class _Track(NamedTuple):
    id: int
    frames: int
    scale: int
    duration: int
    visible: int  # of the whole file's time scale; 0: all
    height: int
    width: int


def _mp4(file: VideoFile) -> VideoHeader:
    movie: tuple[int, int] | None = None
    fragments: list[tuple[int, int]] = []
    for name, begin, end in _boxes(file, 0, file.size):
        if name == b"moov" and movie is None:
            movie = begin, end
        elif name == b"moof":
            fragments.append((begin, end))
    if movie is None:
        return UNKNOWN
    track = next(filter(None, (_track(file, (b, e)) for name, b, e in _boxes(file, *movie) if name == b"trak")), None)
    if track is None:
        return UNKNOWN
    if not track.frames:
        frames, fps = _fragments(file, movie, fragments, track)
        return VideoHeader(frames, fps, track.height, track.width)
    fps = track.frames * track.scale / track.duration if track.duration else 0.0
    scale, _ = _times(file, _box(file, movie, b"mvhd"))
    frames = round(track.visible / scale * fps) if track.visible and scale else track.frames
    # as vLLM: what a list of edits hides counts if it is more than one frame
    return VideoHeader(frames if 0 < frames < track.frames - 1 else track.frames, fps, track.height, track.width)


def _track(file: VideoFile, where: tuple[int, int]) -> _Track | None:
    """The track if it is a video; with 0 frames if they are in fragments."""
    media = _box(file, where, b"mdia")
    if _numbers(file, _box(file, media, b"hdlr"), "!I", 8) != (int.from_bytes(b"vide", "big"),):
        return None
    header = _box(file, where, b"tkhd")
    version = _numbers(file, header, "!B")
    id = _numbers(file, header, "!I", 20 if version == (1,) else 12) or (0,)
    table = _box(file, media, b"minf", b"stbl")
    size = _numbers(file, _box(file, table, b"stsd"), "!HH", 40) or (0, 0)
    sizes = _box(file, table, b"stsz") or _box(file, table, b"stz2")
    frames = _numbers(file, sizes, "!I", 8) or (0,)
    scale, duration = _times(file, _box(file, media, b"mdhd"))
    duration = _durations(file, _box(file, table, b"stts")) or duration
    return _Track(
        id[0], frames[0], scale, duration, _visible(file, _box(file, where, b"edts", b"elst")), size[1], size[0]
    )


def _durations(file: VideoFile, where: tuple[int, int] | None) -> int:
    """The sum of all frames' durations; 0 if there are too many entries."""
    count = (_numbers(file, where, "!I", 4) or (0,))[0]
    if where is None or not 0 < count <= _TIMED_ENTRIES:
        return 0
    content = file.read(where[0] + 8, 8 * count)
    return sum(number * length for number, length in struct.iter_unpack("!II", content[: len(content) // 8 * 8]))


def _visible(file: VideoFile, where: tuple[int, int] | None) -> int:
    """How long the edits of a track are; 0 if it has none, or too many."""
    version = (_numbers(file, where, "!B") or (0,))[0]
    count = (_numbers(file, where, "!I", 4) or (0,))[0]
    form = struct.Struct("!QqI" if version == 1 else "!IiI")
    if where is None or not 0 < count <= _TIMED_ENTRIES:
        return 0
    content = file.read(where[0] + 8, form.size * count)
    whole = content[: len(content) // form.size * form.size]
    return sum(length for length, begin, _ in form.iter_unpack(whole) if begin >= 0)


DEFAULT_DURATION, DURATIONS = 0x8, 0x100  # flags of `tfhd`, `trun`


def _fragments(
    file: VideoFile, movie: tuple[int, int], fragments: list[tuple[int, int]], track: _Track
) -> tuple[int, float]:
    """Frames and frames per second of a file in fragments."""
    frames, usual = 0, 0
    for name, begin, end in _boxes(file, *(_box(file, movie, b"mvex") or (0, 0))):
        if name == b"trex" and (found := _numbers(file, (begin, end), "!III", 4)) and found[0] == track.id:
            usual = found[2]
    for fragment in fragments:
        for name, begin, end in _boxes(file, *fragment):
            header = _box(file, (begin, end), b"tfhd") if name == b"traf" else None
            flags = _numbers(file, header, "!II")
            if header is None or flags is None or flags[1] != track.id:
                continue
            if flags[0] & DEFAULT_DURATION:
                # optional members before it: base offset, description
                skip = 8 + (8 if flags[0] & 1 else 0) + (4 if flags[0] & 2 else 0)
                usual = (_numbers(file, header, "!I", skip) or (usual,))[0]
            for run, first, last in _boxes(file, begin, end):
                if run != b"trun" or not (found := _numbers(file, (first, last), "!II")):
                    continue
                frames += found[1]
                if found[0] & DURATIONS:
                    skip = 8 + (4 if found[0] & 1 else 0) + (4 if found[0] & 4 else 0)
                    usual = (_numbers(file, (first, last), "!I", skip) or (usual,))[0] or usual
    return frames, track.scale / usual if usual else 0.0


# --- Matroska and WebM: elements of an identifier, a length and content ---

SEGMENT, INFO, TRACKS, ENTRY, CLUSTER = 0x18538067, 0x1549A966, 0x1654AE6B, 0xAE, 0x1F43B675
TIME_SCALE, DURATION, DEFAULT_FRAME, VIDEO = 0x2AD7B1, 0x4489, 0x23E383, 0xE0
NUMBER, KIND, WIDTH, HEIGHT = 0xD7, 0x83, 0xB0, 0xBA
BLOCK, GROUP, GROUP_BLOCK, TIMECODE = 0xA3, 0xA0, 0xA1, 0xE7
USUAL_TIME_SCALE: Final = 1_000_000  # nanoseconds
_VIDEO_TRACK: Final = 1


def _elements(file: VideoFile, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Identifier, start and end of the content of each element; one of unknown length ends with its parent.

    What is in a cluster of unknown length comes after it, as if it were empty.
    """
    at = start
    while at < end:
        head = file.read(at, 12)
        id, after = _variable(head, 0, keep_mark=True)
        size, begin = _variable(head, after)
        if begin == 0:
            return
        if size == (1 << 7 * (begin - after)) - 1:
            stop = at + begin if id == CLUSTER else end
        else:
            stop = min(at + begin + size, end)
        yield id, at + begin, stop
        at = stop


def _variable(head: bytes, at: int, *, keep_mark: bool = False) -> tuple[int, int]:
    """A number of variable length and where it ends; (0, 0) if there is none."""
    if at >= len(head) or not head[at]:
        return 0, 0
    length = 9 - head[at].bit_length()
    if at + length > len(head):
        return 0, 0
    number = int.from_bytes(head[at : at + length], "big")
    return number if keep_mark else number & ~(1 << 7 * length), at + length


def _matroska(file: VideoFile) -> VideoHeader:
    segment = next(((b, e) for id, b, e in _elements(file, 0, file.size) if id == SEGMENT), None)
    if segment is None:
        return UNKNOWN
    seconds = per_frame = 0.0
    scale, number, height, width = USUAL_TIME_SCALE, 0, 0, 0
    seen = _Blocks()
    for id, begin, end in _elements(file, *segment):
        if id == INFO:
            found = {key: file.read(b, min(e - b, 8)) for key, b, e in _elements(file, begin, end)}
            scale = int.from_bytes(found.get(TIME_SCALE, b""), "big") or USUAL_TIME_SCALE
            seconds = _float(found.get(DURATION, b"")) * scale / 1e9
        elif id == TRACKS and not number:
            number, per_frame, height, width = _entries(file, begin, end)
        elif id == CLUSTER and seconds and per_frame:
            break
        else:
            try:
                seen.add(file, id, begin, end, number)
            except OutOfReads:  # the rest is taken for more of the same
                share = max(begin, 1) / file.size
                seen.frames, seen.last = round(seen.frames / share), round(seen.last / share)
                break
    if seconds and per_frame:
        return VideoHeader(round(seconds / per_frame), 1 / per_frame, height, width)
    length = seconds or seen.last * scale / 1e9
    fps = 1 / per_frame if per_frame else seen.frames / length if length else 0.0
    return VideoHeader(seen.frames, fps, height, width)


@dataclass(slots=True)
class _Blocks:
    """The frames of a track that were seen, and the time of the last cluster."""

    frames: int = 0
    last: int = 0

    def add(self, file: VideoFile, id: int, begin: int, end: int, number: int) -> None:
        """Look at an element: a cluster, or one of a cluster of unknown length. Raises OutOfReads."""
        if id == CLUSTER:
            for inner, first, last in _elements(file, begin, end):
                self.add(file, inner, first, last, number)
        elif id == TIMECODE:
            self.last = max(self.last, int.from_bytes(file.read(begin, min(end - begin, 8)), "big"))
        elif id in (BLOCK, GROUP):
            if id == GROUP:
                begin = next((b for inner, b, _ in _elements(file, begin, end) if inner == GROUP_BLOCK), end)
            self.frames += _variable(file.read(begin, 8), 0)[0] == number


def _entries(file: VideoFile, begin: int, end: int) -> tuple[int, float, int, int]:
    """Number, seconds per frame, height and width of the first video track."""
    for id, first, last in _elements(file, begin, end):
        if id != ENTRY:
            continue
        number = kind = nanoseconds = height = width = 0
        for key, at, stop in _elements(file, first, last):
            if key == VIDEO:
                for side, b, e in _elements(file, at, stop):
                    if side in (WIDTH, HEIGHT):
                        value = int.from_bytes(file.read(b, min(e - b, 8)), "big")
                        width, height = (value, height) if side == WIDTH else (width, value)
            elif key in (NUMBER, KIND, DEFAULT_FRAME):
                value = int.from_bytes(file.read(at, min(stop - at, 8)), "big")
                number = value if key == NUMBER else number
                kind = value if key == KIND else kind
                nanoseconds = value if key == DEFAULT_FRAME else nanoseconds
        if kind == _VIDEO_TRACK:
            # 33,333,333 ns mean 30 a second, as FFmpeg has it
            per_frame = float(1 / Fraction(10**9, nanoseconds).limit_denominator(1001)) if nanoseconds else 0.0
            return number, per_frame, height, width
    return 0, 0.0, 0, 0


def _float(content: bytes) -> float:
    forms = {4: "!f", 8: "!d"}
    return float(struct.unpack(forms[len(content)], content)[0]) if len(content) in forms else 0.0


# --- AVI: chunks of a name, a length and content ---


def _avi(file: VideoFile) -> VideoHeader:
    head = file.read(12, 12 + 8 + 40)  # LIST, its length, hdrl; avih, its length, its numbers
    if head[:4] != b"LIST" or head[8:16] != b"hdrlavih":
        return UNKNOWN
    microseconds, _, _, _, frames, _, _, _, width, height = struct.unpack_from("<10I", head, 20)
    fps = float(Fraction(10**6, microseconds).limit_denominator(1001)) if microseconds else 0.0
    # the first stream's own list, if it is the video: the rate is exact there
    stream = file.read(32 + struct.unpack_from("<I", head, 16)[0], 12 + 8 + 36)
    if stream[8:16] == b"strlstrh" and stream[20:24] == b"vids":
        scale, rate, _, frames = struct.unpack_from("<4I", stream, 40)
        fps = rate / scale if scale else fps
    return VideoHeader(frames, fps, height, width)


Reader = Callable[[VideoFile], VideoHeader]
# Mark, its place, the name of the container, and who reads it.
CONTAINERS: Final[tuple[tuple[bytes, int, str, Reader], ...]] = (
    (b"ftyp", 4, "mp4", _mp4),
    (b"moov", 4, "mp4", _mp4),
    (b"mdat", 4, "mp4", _mp4),
    (b"wide", 4, "mp4", _mp4),
    (b"\x1a\x45\xdf\xa3", 0, "matroska", _matroska),
    (b"RIFF", 0, "avi", _avi),
)
