"""What answers say of themselves, by the engines' own forms, in any pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.events import AnswerDetails
from sidecar.relay.answer_details import MAX_HEAD_BYTES, MAX_REASONS, AnswerReader


def event(data: object, name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(data).encode() + b"\n\n"


CHAT = b"".join(
    [
        event({"id": "chatcmpl-1", "model": "llama", "choices": [{"index": 0, "delta": {"role": "assistant"}}]}),
        event({"id": "chatcmpl-1", "model": "llama", "choices": [{"index": 0, "delta": {"content": 'a "stop"'}}]}),
        event({"id": "chatcmpl-1", "model": "llama", "choices": [{"index": 0, "finish_reason": "length"}]}),
        event({"id": "chatcmpl-1", "model": "llama", "choices": [{"index": 1, "finish_reason": "stop"}]}),
        b"data: [DONE]\n\n",
    ]
)
MESSAGES = b"".join(
    [
        event(
            {"type": "message_start", "message": {"id": "msg_1", "model": "some-model", "content": []}}, "message_start"
        ),
        event({"type": "content_block_delta", "delta": {"text": "x"}}, "content_block_delta"),
        event({"type": "message_delta", "delta": {"stop_reason": "end_turn"}}, "message_delta"),
    ]
)
RESPONSES = event({"type": "response.created", "response": {"id": "resp_1", "model": "gpt"}}, "response.created")
OLLAMA = b'{"model":"qwen","message":{"content":"x"},"done":false}\n{"model":"qwen","done":true,"done_reason":"stop"}\n'
SGLANG = event({"text": "x", "meta_info": {"id": "s-1", "finish_reason": {"type": "stop", "matched": 3}}})
STREAMS = [
    (CHAT, AnswerDetails("chatcmpl-1", "llama", ("length", "stop"))),
    (MESSAGES, AnswerDetails("msg_1", "some-model", ("end_turn",))),
    (RESPONSES, AnswerDetails("resp_1", "gpt")),
    (OLLAMA, AnswerDetails("", "qwen", ("stop",))),
    (SGLANG, AnswerDetails("s-1", "", ("stop",))),
]


@pytest.mark.parametrize(("stream", "found"), STREAMS)
@given(data=st.data())
def test_a_stream_is_read_whatever_its_pieces_are(stream: bytes, found: AnswerDetails, data: st.DataObject) -> None:
    """Id, model and reasons are found, however the bytes are cut."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    reader = AnswerReader()
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        reader.feed(stream[start:end])
    assert reader.details() == found


def test_a_body_in_one_piece_is_read() -> None:
    """The forms of whole answers: OpenAI's with several choices."""
    reader = AnswerReader()
    choices = [{"message": {"content": "x"}, "finish_reason": reason} for reason in ("stop", "tool_calls")]
    reader.body(json.dumps({"id": "c-1", "model": "m", "choices": choices}).encode())
    assert reader.details() == AnswerDetails("c-1", "m", ("stop", "tool_calls"))


def test_a_text_that_reads_like_a_key_is_none() -> None:
    """What a model writes is no reason for its end, and no name."""
    reader = AnswerReader()
    text = '{"finish_reason": "hacked", "id": "x"}'
    reader.feed(event({"choices": [{"delta": {"content": text}}]}))
    assert reader.details() == AnswerDetails()


@pytest.mark.parametrize(
    "start",
    [b"data: {broken\n", b"data: 3\n", b"data: []\n", b'data: {"id": 3, "model": ["a"]}\n', b'data: {"id": "a\\nb"}\n'],
)
def test_what_is_none_of_it_is_passed_over(start: bytes) -> None:
    """Broken JSON and names that are no short texts are not believed, and do not end the reading."""
    reader = AnswerReader()
    reader.feed(start + CHAT)
    assert reader.details() == STREAMS[0][1]


def test_what_is_kept_is_bounded() -> None:
    """A stream without an id, and one of endless reasons, cost no more than their bounds."""
    reader = AnswerReader()
    for _ in range(200):
        reader.feed(b"x" * 4096 + b'"finish_reason":"stop"')
    assert reader._head is None and len(reader._tail) < 200
    assert len(reader.details().finish_reasons) == MAX_REASONS
    long = AnswerReader()
    long.feed(event({"model": "m" * 200}))
    assert long.details().model == "" and len(long._head or b"") <= MAX_HEAD_BYTES
