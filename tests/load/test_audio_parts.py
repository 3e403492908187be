"""Recordings in parts of a chat are as long as their files say, whatever form the part has, and nothing else is one."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.load import audio_parts
from sidecar.load.audio_parts import seconds_in

from .test_audio_upload import DECODED, SOUNDS, wav

MINUTE = base64.b64encode(wav(60.0)).decode()
# An hour of an Ogg file: its pages in the middle are passed over.
OGG = (SOUNDS / "opus.ogg").read_bytes()
LAST_PAGE = OGG.rfind(b"OggS")
LONG_OGG = OGG[:LAST_PAGE] + bytes(400_000) + OGG[LAST_PAGE:]


def chat(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, *parts]}]}


@pytest.mark.parametrize(
    "body",
    [
        chat({"type": "input_audio", "input_audio": {"data": MINUTE, "format": "wav"}}),
        chat({"type": "input_audio", "input_audio": {"format": "wav", "data": MINUTE}}),
        chat({"input_audio": {"data": MINUTE}}),
        chat({"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64," + MINUTE}}),
        chat({"type": "audio_url", "audio_url": "data:audio/x-wav;base64," + MINUTE}),
        {"text": "What is it?", "audio_data": [MINUTE]},
        {"text": "What is it?", "audio_data": "data:audio/wav;base64," + MINUTE},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_every_form_of_a_part_is_measured(body: dict[str, Any], indent: int | None) -> None:
    """OpenAI's, vLLM's and SGLang's, in any order of members and with any spaces; slashes may be escaped."""
    raw = json.dumps(body, indent=indent)
    assert seconds_in(raw.encode(), 1) == pytest.approx([60.0])
    assert seconds_in(raw.replace("/", "\\/").encode(), 1) == pytest.approx([60.0], rel=0.02)


@pytest.mark.parametrize("name", [name for name in DECODED if name != "late.m4a"])
def test_a_part_is_as_long_as_its_decoder_finds_it(name: str) -> None:
    """Of each format whose length is in its first bytes, or in the last ones."""
    text = base64.b64encode((SOUNDS / name).read_bytes()).decode()
    [seconds] = seconds_in(json.dumps(chat({"type": "input_audio", "input_audio": {"data": text}})).encode(), 1)
    assert seconds == pytest.approx(DECODED[name], rel=0.04)


def test_only_the_ends_of_a_long_file_are_read() -> None:
    """The last page of an Ogg file states its length, however much is between."""
    text = base64.b64encode(LONG_OGG).decode()
    [seconds] = seconds_in(json.dumps(chat({"type": "input_audio", "input_audio": {"data": text}})).encode(), 1)
    assert seconds == pytest.approx(DECODED["opus.ogg"], rel=0.04)


def test_no_text_and_no_decoy_makes_a_recording_shorter() -> None:
    """Texts are no parts; of more finds than there are recordings, the longest ones count. Links have no length."""
    part = {"type": "input_audio", "input_audio": {"data": MINUTE, "format": "wav"}}
    decoy = {"type": "function", "function": {"parameters": {"input_audio": {"data": "AAAA"}}}}
    text = {"type": "text", "text": json.dumps(part)}
    link = {"type": "audio_url", "audio_url": {"url": "https://example.com/a.wav"}}
    assert seconds_in(json.dumps({"tools": [decoy], **chat(part)}).encode(), 1) == pytest.approx([60.0])
    assert seconds_in(json.dumps(chat(text, link)).encode(), 1) == []
    assert seconds_in(json.dumps(chat(*[part] * 3)).encode(), 3) == pytest.approx([60.0] * 3)


@given(st.binary(max_size=200), st.integers(0, 3))
def test_any_body_is_survived(middle: bytes, number: int) -> None:
    """Whatever follows a key, there are at most as many lengths as recordings."""
    for head in (b'"input_audio":{"data":"', b'"audio_data":["', b'"audio_url":"data:audio/ogg;base64,T2dnUw'):
        assert len(seconds_in(head + middle + b'"' + middle, number)) <= number


def test_a_body_full_of_recordings_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many are looked at."""
    monkeypatch.setattr(audio_parts, "MAX_LOOKED_AT", 2)
    body = json.dumps(chat(*[{"type": "input_audio", "input_audio": {"data": MINUTE}}] * 5)).encode()
    assert len(seconds_in(body, 5)) == 2
