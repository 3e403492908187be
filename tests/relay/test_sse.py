"""Streams: counted, cleaned of our own usage event, and otherwise byte for byte what the engine wrote."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.events import Usage
from sidecar.load import answer_scan, usage_forms
from sidecar.load.usage_forms import ToldUsage
from sidecar.relay.sse import SSE, add_price

PAGES = Path(__file__).parents[1] / "engines" / "pages" / "answers"
TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
)
CONTINUOUS = b'data: {"choices":[{"index":0}],"usage":{"prompt_tokens":9,"completion_tokens":1}}\n\n'
NO_USAGE = b'data: {"choices":[{"index":0}],"usage":null}\n\n'
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


def named(name: str, data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), json.dumps(data).encode())


def usage_of(text: bytes) -> Usage | None:
    """The usage of a whole answer."""
    told = usage_forms.read(answer_scan.read(text))
    return None if told is None else told.usage()


def run(chunks: list[bytes], hide: bool) -> tuple[bytes, SSE]:
    sse = SSE(hide)
    out = b"".join(sse.feed(chunk) for chunk in chunks)
    return out + sse.finish(), sse


def test_a_chat_stream_is_counted_and_its_usage_read() -> None:
    """Tokens are the events with output; usage, role, pings and the end are not; nothing is changed for who asked."""
    chunks = [ROLE, TOKEN, PING, TOKEN + TOKEN, USAGE, DONE]
    out, sse = run(chunks, hide=False)
    assert out == b"".join(chunks)
    assert (sse.tokens, sse.done, sse.usage) == (3, True, Usage(9, 3, 4))


def test_our_own_usage_event_is_taken_out() -> None:
    """Exactly the usage-only event is missing from what the client sees."""
    out, sse = run([ROLE + TOKEN, USAGE + DONE], hide=True)
    assert out == ROLE + TOKEN + DONE
    assert sse.usage == Usage(9, 3, 4)


def without_null(event: bytes) -> bytes:
    """As it is where the usage was not asked for."""
    return event.replace(b',"usage":null', b"").replace(b', "usage": null', b"")


def test_the_timings_of_a_hidden_usage_go_back_into_the_last_choice() -> None:
    """llama.cpp moves them into the usage event; the last choice waits for it, and for no longer than the stream."""
    last = b'data: {"choices":[{"finish_reason":"stop","delta":{}}]}\n\n'
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1},"timings":{"prompt_n":3}}\n\n'
    sse = SSE(True)
    assert sse.feed(TOKEN + last) == TOKEN and sse.is_between_events
    assert sse.feed(usage) == last[:-3] + b',"timings":{"prompt_n":3}}\n\n'
    for end in (b"data: [DONE]\n\n", TOKEN):
        sse = SSE(True)
        assert (sse.feed(last), sse.feed(end)) == (b"", last + end)
    sse = SSE(True)
    assert (sse.feed(last), sse.finish(), sse.finish()) == (b"", last, b"")


def test_the_fingerprint_of_a_hidden_usage_goes_back_into_the_last_choice() -> None:
    """vLLM moves it there, too; a choice that has its own keeps it."""
    last = b'data: {"choices":[{"finish_reason":"stop","delta":{}}]}\n\n'
    own = b'data: {"choices":[{"finish_reason":"stop","delta":{}}],"system_fingerprint":"a"}\n\n'
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1},"system_fingerprint":"b"}\n\n'
    sse = SSE(True)
    assert sse.feed(last + usage) == last[:-3] + b',"system_fingerprint":"b"}\n\n'
    sse = SSE(True)
    assert sse.feed(own + usage) == own


def test_an_event_with_choices_and_usage_stays() -> None:
    """Continuous usage comes on events that carry output; they are never taken out, and what follows counts, too."""
    out, sse = run([CONTINUOUS, NO_USAGE, TOKEN], hide=True)
    assert out == CONTINUOUS + without_null(NO_USAGE) + TOKEN
    assert (sse.tokens, sse.usage) == (3, Usage(9, 3))


def test_a_complete_event_is_never_held() -> None:
    """While usage is hidden, each event goes out with the chunk that completes it, also before an incomplete one."""
    sse = SSE(True)
    assert sse.feed(TOKEN) == TOKEN
    assert sse.feed(TOKEN + TOKEN[:10]) == TOKEN
    assert sse.feed(TOKEN[10:]) == TOKEN
    assert sse.feed(USAGE[:20]) == b""
    assert sse.feed(USAGE[20:] + DONE) == DONE


def test_without_hiding_nothing_is_held_at_all() -> None:
    """Bytes of an incomplete event go out at once when there is nothing to take out."""
    sse = SSE(False)
    assert sse.feed(TOKEN[:10]) == TOKEN[:10]
    assert sse.tokens == 0
    assert sse.feed(TOKEN[10:]) == TOKEN[10:]
    assert sse.tokens == 1


def test_a_long_event_is_let_go() -> None:
    """An event too long to be a usage passes in pieces, is counted once, and memory stays bounded."""
    sse = SSE(True)
    out = sse.feed(b'data: {"choices":[],"x":"')
    for _ in range(64):
        out += sse.feed(b"a" * 65536)
        assert len(sse._open) <= (1 << 20) + 65536
    out += sse.feed(b'"}\n\n' + USAGE)
    assert out == b'data: {"choices":[],"x":"' + b"a" * (64 * 65536) + b'"}\n\n'
    assert (sse.tokens, sse.usage) == (1, Usage(9, 3, 4))


def test_content_that_looks_like_a_protocol_is_content() -> None:
    """Words such as "usage", data: and [DONE] in generated text, which JSON escapes, neither hide nor end anything."""
    event = (
        b"data: " + json.dumps({"choices": [], "text": 'data: [DONE] "usage": {"prompt_tokens": 1}'}).encode() + b"\n\n"
    )
    out, sse = run([event], hide=True)
    assert out == event
    assert (sse.tokens, sse.done, sse.usage) == (1, False, None)


def test_anthropic_events_count_deltas_and_merge_usage() -> None:
    """The prompt's size comes with message_start, the output's with message_delta; only content deltas are tokens."""
    events = [
        b'event: message_start\ndata: {"message":{"usage":{"input_tokens":25,"output_tokens":1}}}\n\n',
        b'event: content_block_start\ndata: {"type":"content_block_start"}\n\n',
        b'event: ping\ndata: {"type":"ping"}\n\n',
        b'event: content_block_delta\ndata: {"delta":{"text":"Hi"}}\n\n',
        b'event: message_delta\ndata: {"usage":{"output_tokens":15}}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    ]
    out, sse = run(events, hide=False)
    assert out == b"".join(events)
    assert (sse.tokens, sse.usage) == (1, Usage(25, 15))


@pytest.mark.parametrize(
    ("page", "usage"),
    [
        ("vllm-0.32-messages", Usage(781, 6, 768)),
        ("vllm-0.32-responses", Usage(781, 6, 768)),
        ("vllm-0.32-chat-continuous", Usage(781, 6, 768)),
        ("llamacpp-b10434-messages", Usage(1561, 20, 1560)),
        ("llamacpp-b10434-chat.sse", Usage(40, 3, 39)),
        ("llamacpp-b10434-chat.json", Usage(40, 4, 39)),
        ("llamacpp-b10434-responses", Usage(40, 3, 39)),
        ("llamacpp-b10434-completion", Usage(30, 4, 29)),
        ("llamacpp-b10434-completion-two.sse", Usage(39, 6, 37)),
        ("llamacpp-b10434-completion-two.json", Usage(39, 8, 37)),
        ("llamacpp-b10434-embeddings", Usage(19, 0)),
        ("sglang-0.5.23-chat", Usage(69, 6, 68)),
        ("sglang-0.5.23-chat-two", Usage(69, 12, 68)),
        ("sglang-0.5.23-completions.json", Usage(131, 10, 0)),
        ("sglang-0.5.23-completions.sse", Usage(59, 5, 58)),
        ("sglang-0.5.23-generate", Usage(59, 5, 58)),
        ("sglang-0.5.23-generate-two.json", Usage(125, 10, 118)),
        ("sglang-0.5.23-generate-two.sse", Usage(125, 10, 123)),
        ("sglang-0.5.23-messages", Usage(69, 6, 68)),
        ("sglang-0.5.23-ollama-chat.json", Usage(69, 5)),
        ("sglang-0.5.23-responses", Usage(69, 4, 68)),  # of 6: its own count
    ],
)
def test_what_engines_answer_is_read_as_they_mean_it(page: str, usage: Usage) -> None:
    """Recorded from real engines: the prompt is all of it, whether its count holds the cached part or not."""
    for file in [*PAGES.glob(page), *PAGES.glob(page + ".*")]:
        if file.suffix == ".json":
            assert usage_of(file.read_bytes()) == usage
        else:
            assert run([file.read_bytes()], hide=False)[1].usage == usage


def test_the_events_of_a_recorded_stream_are_its_tokens() -> None:
    """Neither the opening role, nor `null`, nor an end without text is one: what a client leaves is counted right."""
    for page, tokens in (("chat", 3), ("completion", 4), ("completion-two", 6), ("messages", 20), ("responses", 3)):
        assert run([(PAGES / f"llamacpp-b10434-{page}.sse").read_bytes()], hide=False)[1].tokens == tokens, page
    for page, tokens in (("completions", 5), ("generate", 5), ("generate-two", 10)):
        assert run([(PAGES / f"sglang-0.5.23-{page}.sse").read_bytes()], hide=False)[1].tokens == tokens, page


def test_an_item_for_each_choice_counts_their_prompt_once() -> None:
    """Recorded from SGLang: two choices of one prompt."""
    read = usage_forms.read(answer_scan.read((PAGES / "sglang-0.5.23-generate-n.json").read_bytes()), 2)
    assert read == ToldUsage(59, 10, 58)


def test_a_stream_without_counts_is_counted() -> None:
    """Recorded from SGLang's form of Ollama's API: five tokens, a line each, some without text yet."""
    for page in ("chat", "generate"):
        sse = SSE(False, is_lines=True)
        sse.feed((PAGES / f"sglang-0.5.23-ollama-{page}.sse").read_bytes())
        assert (sse.tokens, sse.told) == (5, None), page


FAILURES = [
    b'data: {"error": {"message": "x", "code": 500}}\n\n',
    b'data:{"error":"Request failed during generation","error_type":"generation"}\n\n',
    b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}\n\n',
    b"event: error\ndata: x\n\n",
    b'event: response.failed\ndata: {"response":{"status":"failed"}}\n\n',
    b'data: {"type":"response.failed","response":{"error":{"code":"server_error"}}}\n\n',
    b'error: {"code":500,"message":"Compute error."}\n\n',
    b'data: {"text":"x","meta_info":{"prompt_tokens":3,"finish_reason":{"type":"abort","message":"x"}}}\n\n',
    b'data: {"type":"message-end","delta":{"finish_reason":"ERROR"}}\n\n',
]


@pytest.mark.parametrize("failure", FAILURES)
@given(st.lists(st.integers(0, 300), max_size=4))
def test_an_error_in_a_stream_is_no_token_and_is_known(failure: bytes, cuts: list[int]) -> None:
    """In the form of each engine, however it is cut: the stream has failed, and has had the tokens before it."""
    stream = TOKEN + TOKEN + failure
    edges = sorted({0, len(stream), *(cut % len(stream) for cut in cuts)})
    out, sse = run([stream[a:b] for a, b in itertools.pairwise(edges)], hide=False)
    assert (out, sse.failed, sse.tokens) == (stream, True, 2)


def test_a_line_of_json_is_an_event() -> None:
    """Ollama's streams: each line a token, the last one has the usage, an error is one line."""
    token = b'{"message":{"role":"assistant","content":"x"},"done":false}\n'
    last = b'{"message":{"role":"assistant","content":""},"done":true,"prompt_eval_count":9,"eval_count":4}\n'
    sse = SSE(False, is_lines=True)
    assert sse.feed(token + token[:9]) + sse.feed(token[9:] + last) == token + token + last
    assert (sse.tokens, sse.usage, sse.failed, sse.is_between_events) == (2, Usage(9, 4), False, True)
    sse.feed(b'{"error":"x"}\n')
    assert (sse.tokens, sse.failed) == (2, True)


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices":[{"delta":{"content":"x"}}],"error":null}\n\n',
        b'data: {"choices":[{"delta":{"content":"\\"error\\": {}"}}]}\n\n',
        b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"name":"error"}}]}}]}\n\n',
        b'data: {"choices":[{"delta":{"content":"x"},"logprobs":{"error":{"x":1}}}]}\n\n',
    ],
)
def test_the_word_error_is_no_error(event: bytes) -> None:
    """Null, content, a tool's name and deeper members do not make a failure of a token."""
    assert (run([event], hide=True)[1].failed, run([event], hide=True)[1].tokens) == (False, 1)


def test_a_usage_in_an_event_of_megabytes_is_found() -> None:
    """The end of a response repeats its tools and all of its output; it is scanned in pieces."""
    response = {"tools": [{"usage": {"input_tokens": 1}}], "output": ["y" * 70_000] * 40}
    usage = {"input_tokens": 9, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 4}}
    event = named("response.completed", {"response": {**response, "usage": usage, "text": "z" * 70_000}})
    delta = named("response.output_text.delta", {"delta": "x"})
    out, sse = run([event[n : n + 50_000] for n in range(0, len(event), 50_000)] + [delta], hide=False)
    assert (len(out), sse.usage, sse.tokens) == (len(event) + len(delta), Usage(9, 3, 4), 1)


@pytest.mark.parametrize(
    ("opening", "closing", "usage"),
    [
        ({"input_tokens": 100, "output_tokens": 0}, {"input_tokens": 10, "cache_read_input_tokens": 90}, (100, 90)),
        ({"input_tokens": 100}, {"input_tokens": 0, "cache_read_input_tokens": 100}, (100, 100)),
        ({"input_tokens": 10, "cache_read_input_tokens": 90, "cache_creation_input_tokens": 0}, {}, (100, 90)),
        ({"input_tokens": 10, "cache_read_input_tokens": 90}, {"input_tokens": 0}, (100, 90)),
        ({"input_tokens": 10, "cache_read_input_tokens": 90}, {"input_tokens": None}, (100, 90)),
        ({"input_tokens": 10, "cache_read_input_tokens": 90}, {"cache_read_input_tokens": None}, (100, 90)),
        ({"input_tokens": 10}, {"cache_read_input_tokens": 60, "cache_creation_input_tokens": 30}, (100, 60)),
        ({"input_tokens": 0, "output_tokens": 0}, {"input_tokens": 100}, (100, 0)),
    ],
)
def test_an_opening_and_a_closing_usage_are_one(
    opening: dict[str, Any], closing: dict[str, Any], usage: tuple[int, int]
) -> None:
    """The closing usage counts; of the prompt it may repeat all, a part, other parts, or nothing."""
    stream = (
        named("message_start", {"message": {"usage": opening}}),
        named("content_block_delta", {"delta": {"text": "Hi"}}),
        named("message_delta", {"usage": {**closing, "output_tokens": 15}}),
    )
    assert run(list(stream), hide=False)[1].usage == Usage(usage[0], 15, usage[1])


OPENINGS = {
    "anthropic": named("message_start", {"message": {"usage": {"input_tokens": 9, "output_tokens": 0}}}),
    "placeholder": named("message_start", {"message": {"usage": {"input_tokens": 9, "output_tokens": 1}}}),
    "unnamed": b'data: {"type": "message_start", "message": {"usage": {"input_tokens": 9, "output_tokens": 0}}}\n\n',
    "responses": named("response.created", {"response": {"usage": {"input_tokens": 9, "output_tokens": 0}}}),
    "in progress": named("response.in_progress", {"response": {"usage": {"input_tokens": 9, "output_tokens": 0}}}),
    "chat": b'data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}],'
    b'"usage":{"prompt_tokens":9,"completion_tokens":0}}\n\n',
}
DELTA = named("content_block_delta", {"delta": {"text": "x"}})
CLOSINGS = {
    "anthropic": named("message_delta", {"usage": {"input_tokens": 9, "output_tokens": 3}}),
    "responses": named("response.completed", {"response": {"usage": {"input_tokens": 9, "output_tokens": 3}}}),
    "cut short": named("response.incomplete", {"response": {"usage": {"input_tokens": 9, "output_tokens": 3}}}),
    "chat": b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3}}\n\n',
    "last": b'data: {"choices":[{"delta":{},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":9,"completion_tokens":3}}\n\n',
    "text": b'data: {"choices":[{"text":"","finish_reason":"length"}],'
    b'"usage":{"prompt_tokens":9,"completion_tokens":3}}\n\n',
}


@pytest.mark.parametrize("opening", OPENINGS)
@given(seen=st.integers(0, 200))
def test_until_a_stream_says_what_it_was_the_count_stands(opening: str, seen: int) -> None:
    """What opens a stream knows nothing of its output: left early, it has had what was counted."""
    _, sse = run([OPENINGS[opening], *[DELTA] * seen], hide=False)
    assert sse.usage is not None and sse.usage.prompt_tokens == 9
    begun = opening in ("placeholder", "unnamed")  # 1 is stated, or counted
    assert seen <= sse.usage.completion_tokens <= seen + begun


@pytest.mark.parametrize("closing", CLOSINGS)
@given(opening=st.sampled_from(sorted(OPENINGS)), seen=st.integers(0, 20))
def test_what_closes_a_stream_counts(closing: str, opening: str, seen: int) -> None:
    """A closing usage is the engine's last word, where events held several tokens and where some held none."""
    _, sse = run([OPENINGS[opening], *[DELTA] * seen, CLOSINGS[closing]], hide=False)
    assert sse.usage == Usage(9, 3)


def test_a_running_usage_knows_more_than_a_count_of_events() -> None:
    """Of a stream with the usage on every event, left early, that counts: an event may hold several tokens."""
    running = (
        b'data: {"choices":[{"delta":{"content":"x"},"finish_reason":null}],'
        b'"usage":{"prompt_tokens":9,"completion_tokens":%d}}\n\n'
    )
    assert run([running % 4, running % 8], hide=False)[1].usage == Usage(9, 8)
    assert run([running % 0, running % 0], hide=False)[1].usage == Usage(9, 2)


def test_responses_start_with_their_first_delta() -> None:
    """`response.created` comes before any work was done, so it starts nothing; the delta does."""
    sse = SSE(False)
    sse.feed(b'event: response.created\ndata: {"response":{"usage":null}}\n\n')
    assert not sse.started
    sse.feed(b'event: response.output_text.delta\ndata: {"delta":"x"}\n\n')
    assert (sse.started, sse.tokens) == (True, 1)
    sse.feed(b'event: response.completed\ndata: {"response":{"usage":{"input_tokens":3,"output_tokens":1}}}\n\n')
    assert sse.usage == Usage(3, 1)


ENDS = [b"\n\n", b"\r\n\r\n", b"\r\r"]
LINES = [
    TOKEN[:-2],
    ROLE[:-2],
    USAGE[:-2],
    CONTINUOUS[:-2],
    DONE[:-2],
    PING[:-2],
    b"data:x",
    b"data",
    b"id: 7",
    b"",
    b"event: x.delta\ndata: 1",
    b"data: \xff\ndata: y",
]
streams = st.lists(
    st.tuples(st.sampled_from(LINES) | st.binary(max_size=8), st.sampled_from(ENDS)).map(b"".join), max_size=12
).map(b"".join)


@given(streams, st.lists(st.integers(0, 2000), max_size=12), st.booleans())
def test_chunking_changes_nothing(stream: bytes, cuts: list[int], hide: bool) -> None:
    """However the same bytes are cut, the same bytes come out and the same is counted."""
    edges = sorted({0, len(stream), *(c % (len(stream) + 1) for c in cuts)})
    chunks = [stream[a:b] for a, b in itertools.pairwise(edges)]
    out, sse = run(chunks, hide)
    whole, reference = run([stream], hide)
    single, _ = run([stream[i : i + 1] for i in range(len(stream))], hide)
    assert out == whole == single
    assert (sse.tokens, sse.done, sse.usage, sse.started) == (
        reference.tokens,
        reference.done,
        reference.usage,
        reference.started,
    )
    if not hide:
        assert out == stream


@given(streams)
def test_hiding_removes_usage_events_only(stream: bytes) -> None:
    """What remains is the stream less some whole usage-only events."""
    out, _ = run([stream], hide=True)
    rest = stream
    for end in ENDS:
        rest, out = rest.replace(USAGE[:-2] + end, b""), out.replace(USAGE[:-2] + end, b"")
    assert out == rest


@pytest.mark.parametrize(
    ("text", "usage"),
    [
        (b'{"usage": {"prompt_tokens": 3, "completion_tokens": 4}}', Usage(3, 4)),
        (b'{"data":[1],"usage":{"prompt_tokens":3,"total_tokens":3},"id":"usage"}', Usage(3, 0)),
        (b'{"usage":{"total_tokens":56}}', Usage(56, 0)),
        (b'{"tools":[{"usage":{"prompt_tokens":1}}],"x":"\\"usage\\":{"}', None),
        (b'{"usage":{"input_tokens":5,"output_tokens":6,"cache_read_input_tokens":2}}', Usage(7, 6, 2)),
        (b'{"usage":{"input_tokens":5,"output_tokens":6,"cache_creation_input_tokens":90}}', Usage(95, 6, 0)),
        (
            b'{"usage":{"input_tokens":5,"output_tokens":6,'
            b'"cache_creation_input_tokens":10,"cache_read_input_tokens":80}}',
            Usage(95, 6, 80),
        ),
        (
            b'{"usage":{"input_tokens":5,"output_tokens":6,'
            b'"cache_creation_input_tokens":null,"cache_read_input_tokens":null}}',
            Usage(5, 6),
        ),
        (b'{"usage":{"input_tokens":0,"cache_read_input_tokens":9,"output_tokens":6}}', Usage(9, 6, 9)),
        (
            b'{"usage":{"prompt_tokens":90,"completion_tokens":6,'
            b'"cache_read_input_tokens":80,"cache_creation_input_tokens":0}}',
            Usage(90, 6, 80),
        ),
        (b'{"usage":{"input_tokens":5,"output_tokens":6,"input_tokens_details":{"cached_tokens":1}}}', Usage(5, 6, 1)),
        (b'{"usage":null}', None),
        (b'{"usage":{"prompt_tokens":"3"}}', None),
        (b'{"usage":{"prompt_tokens":-3,"completion_tokens":1.5}}', None),
        (b'{"usage":{"prompt_tok', None),
        (b'{"usage":' + b"[" * 5000, None),
        (b'"usage"', None),
        (b"", None),
    ],
)
def test_usage_is_read_or_absent(text: bytes, usage: Usage | None) -> None:
    """Both vendors' names are understood, a cut text too; nonsense is no usage and never an error."""
    assert usage_of(text) == usage


@given(st.binary(max_size=64).map(lambda b: b'{"usage":{' + b))
def test_any_bytes_after_the_key_are_survived(text: bytes) -> None:
    """Garbage from an engine is no error of ours."""
    usage_of(text)


CHUNKS = (
    b'data: {"choices":[{"delta":{"content":"\\"usage\\":{ x"}}],"usage":null}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n',
    b"data: [DONE]\n\n",
)


@given(st.data())
def test_a_price_is_put_into_the_usage_that_is_shown(data: st.DataObject) -> None:
    """However the bytes are cut, that one event gets a member, all others are unchanged, and the usage is the same."""
    whole = b"".join(CHUNKS)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    sse = SSE(False, lambda usage: 1000 * usage.prompt_tokens + usage.completion_tokens)
    out = b"".join(sse.feed(whole[a:b]) for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)) + sse.finish()
    assert out == whole.replace(b'{"prompt_tokens"', b'{"mu_milli":3002,"prompt_tokens"')
    assert sse.usage == Usage(3, 2) and sse.tokens == 1 and sse.done


def test_a_usage_that_is_hidden_stays_hidden_and_named_events_stay_as_they_are() -> None:
    """A usage that only the sidecar asked for has no price; events with names pass unchanged."""
    hidden = SSE(True, lambda _: 7)
    assert hidden.feed(b"".join(CHUNKS)) == without_null(CHUNKS[0]) + CHUNKS[2]
    named = b'event: message_delta\ndata: {"usage":{"output_tokens":2}}\n\n'
    assert SSE(False, lambda _: 7).feed(named) == named


def test_a_body_without_a_usage_has_no_price() -> None:
    """Null, a text that reads so, or nothing at all: the very bytes."""
    for body in (b'{"usage":null}', b'{"a":"\\"usage\\":{"}', b"{}", b"", b'{"usage":{}}'):
        assert add_price(body, lambda _: 7) == body
    assert json.loads(add_price(b'{"usage": {"prompt_tokens": 3}}', lambda _: 7)) == {
        "usage": {"mu_milli": 7, "prompt_tokens": 3}
    }
