"""The length of an uploaded recording, against what decoders of its format give."""

from __future__ import annotations

import io
import struct
import wave
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.load.api_routes import api_of
from sidecar.load.audio_upload import MAX_SECONDS, USUAL_BYTES_PER_S, describe_upload, seconds_of
from sidecar.load.request_shape import RequestShape

SOUNDS = Path(__file__).parent / "sounds"
# Samples over rate, as FFmpeg 8 decodes each file.
DECODED = {
    "silence.flac": 2.5,
    "vorbis.ogg": 2.52,
    "opus.ogg": 2.5,
    "opus.webm": 2.5,
    "early.m4a": 2.56,  # its movie header precedes its samples
    "late.m4a": 2.517,
    "counted.mp3": 2.5,
    "cbr.mp3": 2.592,
}


def wav(seconds: float, rate: int = 16_000, channels: int = 1, width: int = 2) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(width)
        sound.setframerate(rate)
        sound.writeframes(bytes(channels * width * int(rate * seconds)))
    return file.getvalue()


def form(parts: list[tuple[bytes, bytes]], boundary: bytes = b"xyz") -> tuple[bytes, str]:
    """A form of (head, value), as clients send it."""
    body = b"".join(b"--%b\r\n%b\r\n\r\n%b\r\n" % (boundary, head, value) for head, value in parts)
    return body + b"--%b--\r\n" % boundary, f"multipart/form-data; boundary={boundary.decode()}"


def field(name: str) -> bytes:
    return b'Content-Disposition: form-data; name="%b"' % name.encode()


def file(name: str) -> bytes:
    return b'content-disposition: form-data; name="file"; filename="%b"\r\nContent-Type: audio/wav' % name.encode()


def described(body: bytes, content_type: str) -> RequestShape:
    api = api_of("POST", "/v1/audio/transcriptions", has_body=True)
    assert api is not None
    return describe_upload(body, content_type, api)


@pytest.mark.parametrize("name", DECODED)
def test_a_file_is_as_long_as_its_decoder_finds_it(name: str) -> None:
    """Within the padding of its coding; a constant bit rate is read from the first frame."""
    sound = (SOUNDS / name).read_bytes()
    assert seconds_of(memoryview(sound)) == pytest.approx(DECODED[name], rel=0.04)


@given(st.floats(0.01, 20), st.sampled_from([8000, 16_000, 44_100]), st.sampled_from([1, 2]), st.sampled_from([1, 2]))
def test_a_wav_file_is_exact(seconds: float, rate: int, channels: int, width: int) -> None:
    """Any rate, channels and width."""
    sound = wav(seconds, rate, channels, width)
    assert seconds_of(memoryview(sound)) == pytest.approx(int(rate * seconds) / rate)


def test_a_wav_file_of_open_length_is_as_long_as_it_is() -> None:
    """A writer that streams leaves the sizes open; other chunks may come first."""
    sound = bytearray(wav(2.0))
    sound[40:44] = b"\xff\xff\xff\xff"
    assert seconds_of(memoryview(sound)) == pytest.approx(2.0)
    listed = sound[:12] + b"LIST\x03\0\0\0abc\0" + sound[12:]
    assert seconds_of(memoryview(listed)) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "head", [b"", b"RIFF\0\0\0\0WAVE", b"fLaC", b"OggS", b"\0\0\0\x20ftypM4A ", b"\x1a\x45\xdf\xa3"]
)
@given(rest=st.binary(max_size=300))
def test_whatever_comes_has_a_length(head: bytes, rest: bytes) -> None:
    """Bytes that are no file of their format count by their size."""
    assert 0 <= seconds_of(memoryview(head + rest)) <= MAX_SECONDS


def test_an_impossible_header_is_not_believed() -> None:
    """Neither an hour of nothing, nor an hour in no time."""
    sound = bytearray((SOUNDS / "silence.flac").read_bytes())
    struct.pack_into(">Q", sound, 18, (16_000 << 44) | ((1 << 36) - 1))
    assert seconds_of(memoryview(sound)) == len(sound) / USUAL_BYTES_PER_S
    struct.pack_into(">Q", sound, 18, (16_000 << 44) | 1)
    long = bytes(sound) + bytes(8000 * 3600)
    assert seconds_of(memoryview(long)) == pytest.approx(3600, rel=1e-3)


def test_the_shape_follows_from_the_form() -> None:
    """The file, the model, the prompt, a stream: in any order; a mark inside a file is none without its line."""
    sound = wav(3.0) + b"--xyz"
    options = [(field("model"), b"whisper"), (field("prompt"), b"Hello"), (field("stream"), b"True")]
    for parts in ([*options, (file("a.wav"), sound)], [(file("a.wav"), sound), *options]):
        shape = described(*form(parts))
        assert (shape.model, shape.stream, shape.text_bytes, shape.generative) == ("whisper", True, 5, True)
        assert shape.audio_seconds == pytest.approx(3.0)
        assert shape.told_output == round(2.5 * 3.0)
    assert described(*form([(file("a.wav"), sound), (field("max_completion_tokens"), b"7")])).max_output == 7


def test_a_form_that_is_none_counts_by_its_size() -> None:
    """An engine may still decode the bytes as audio."""
    assert described(b"x" * 8000, "multipart/form-data").audio_seconds == pytest.approx(1.0)
    assert described(b"x" * 8000, "audio/aac").audio_seconds == pytest.approx(1.0)
    assert described(wav(2.0), "audio/wav").audio_seconds == pytest.approx(2.0)
    assert described(*form([(field("model"), b"m")])).audio_seconds > 0.0


@given(st.binary(max_size=400), st.text(max_size=40))
def test_any_form_is_read(body: bytes, content_type: str) -> None:
    """No bytes break it."""
    for kind in (content_type, "multipart/form-data; boundary=x", 'multipart/form-data; boundary="--"'):
        assert described(body, kind).audio_seconds >= 0
