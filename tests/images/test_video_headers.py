"""What a container says of its video, against FFmpeg's own reading; hostile files are read within bounds."""

from __future__ import annotations

import base64
import io
import random
import struct
from fractions import Fraction
from functools import cache

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.images import video_headers
from sidecar.images.protocol import ImageLimits
from sidecar.images.video_headers import MAX_READS, UNKNOWN, VideoFile, VideoHeader, read
from sidecar.images.worker import video_decode, video_warm_up
from sidecar.images.worker.decode import ImageRejected

from . import clips

LIMITS = ImageLimits(64 << 20, 50_000_000)
made = cache(clips.clip)


@pytest.mark.parametrize("fps", [30, 24, Fraction(30000, 1001), 12])
@pytest.mark.parametrize("kind", clips.KINDS)
def test_a_header_says_what_the_decoder_finds(kind: str, fps: Fraction | int) -> None:
    """Frames, rate and size are those that OpenCV, vLLM's decoder, reports of the same file."""
    data = made(kind, 47, 322, 182, fps)
    found = read(data)
    assert found is not None
    assert (found.height, found.width) == (182, 322)
    assert found.fps == pytest.approx(float(fps), rel=0.05)
    if kind == "mkv, live":  # without a length: OpenCV finds no frames, and vLLM refuses it
        with pytest.raises(ImageRejected, match="damaged"):
            video_decode.open_video(data, LIMITS)
        assert found.frames == 47
        return
    source = video_decode.open_video(data, LIMITS).source
    assert found.frames == source.frames
    assert found.fps == pytest.approx(source.fps, rel=1e-12)  # a rate just below loses a frame


@pytest.mark.parametrize("kind", clips.KINDS)
def test_text_and_bytes_give_the_same(kind: str) -> None:
    """A file is read from its base64 text as from its bytes, with or without padding."""
    data = made(kind)
    for more in (b"", b"x", b"xy"):
        assert read(base64.b64encode(data + more), is_base64=True) == read(data + more)


def test_hidden_frames_do_not_count() -> None:
    """An edit list that shows a part of the frames: the header says what the decoder does."""
    data = bytearray(made("mp4", 60))
    at = data.index(b"elst")
    (length,) = struct.unpack_from("!I", data, at + 12)
    struct.pack_into("!I", data, at + 12, length // 2)
    found = read(bytes(data))
    assert found is not None
    assert found.frames == 30
    assert abs(video_decode.open_video(bytes(data), LIMITS).source.frames - found.frames) <= 1


def test_the_clip_of_the_warm_up_is_a_video() -> None:
    """What is decoded before files are out of reach is a real file."""
    data = video_warm_up.clip()
    assert read(data) == VideoHeader(4, 2.0, 32, 32)
    video = video_decode.open_video(data, LIMITS)
    assert [frame.shape for frame in video_decode.frames(video, [0, 3])] == [(32, 32, 3)] * 2


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(sorted(clips.KINDS)), seed=st.integers(0, 1 << 30), cut=st.floats(0, 1), base64_=st.booleans()
)
def test_a_damaged_file_raises_nothing(kind: str, seed: int, cut: float, base64_: bool) -> None:
    """Any byte may be wrong, and any part missing: numbers within bounds, or 0."""
    data = bytearray(made(kind))
    dice = random.Random(seed)
    for _ in range(dice.randint(1, 40)):
        data[dice.randrange(len(data))] = dice.randrange(256)
    data = data[: int(len(data) * cut)]
    found = read(base64.b64encode(data) if base64_ else bytes(data), is_base64=base64_)
    if found is not None:
        assert 0 <= found.frames <= video_headers.MAX_FRAMES
        assert 0 <= found.fps <= video_headers.MAX_FPS
        assert min(found.height, found.width) >= 0
        assert max(found.height, found.width) <= video_headers.MAX_SIDE


HOSTILE = {
    "empty boxes without end": b"\0\0\0\x10ftypisom\0\0\0\0" + b"\0\0\0\x08free" * 200_000,
    "a box in itself": b"\0\0\0\x10ftypisom\0\0\0\0" + b"\0\0\0\0moov" * 50_000,
    "a length of 2^64": b"\0\0\0\x10ftypisom\0\0\0\0" + b"\0\0\0\x01moov" + b"\xff" * 8,
    "clusters without end": b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\x01"
    + b"\xff" * 7
    + b"\x1f\x43\xb6\x75\x80" * 100_000,
    "unknown lengths in each other": b"\x1a\x45\xdf\xa3\x80"
    + b"\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff" * 9000,
    "zeros": b"\x1a\x45\xdf\xa3" + bytes(100_000),
    "no base64": b"\0\0\0\x10ftypisom",
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_costs_a_bounded_number_of_reads(name: str) -> None:
    """The number of reads is bounded whatever the file says, and the answer is that nothing is known."""
    file = VideoFile(memoryview(HOSTILE[name]), is_base64=False)
    head = HOSTILE[name]
    reader = next(
        (reader for mark, at, _, reader in video_headers.CONTAINERS if head[at : at + len(mark)] == mark), None
    )
    if reader is not None:
        try:
            reader(file)
        except video_headers.OutOfReads:
            assert file.left == 0
        assert 0 <= file.left <= MAX_READS
    assert read(HOSTILE[name]) in (None, UNKNOWN)
    assert read(HOSTILE[name], is_base64=True) in (None, UNKNOWN)


def test_decoded_frames_are_opencvs() -> None:
    """One thread or many: every byte of every frame is what vLLM's decoder gives."""
    data = made("mp4, B-frames", 40)
    capture = cv2.VideoCapture(io.BytesIO(data), cv2.CAP_FFMPEG, [])
    theirs = []
    while True:
        good, frame = capture.read()
        if not good:
            break
        theirs.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    assert len(theirs) == 40
    video = video_decode.open_video(data, LIMITS)
    indices = [0, 1, 7, 13, 39]
    for at, frame in zip(indices, video_decode.frames(video, indices), strict=True):
        ours = np.empty_like(frame)
        video_decode.put_rgb(ours, frame)
        assert np.array_equal(ours, theirs[at])
