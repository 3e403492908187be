"""Event streams: a client gets the events that the engine would have sent it, and those alone.

The relay may ask for the usage of a stream, and then sees an event that its client did not ask for. The engines here
send it to whom they would send it; each differs in who that is.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from .compare import LENGTH, Sides, StartSides, assert_same_answer, assert_same_request
from .wire import Answer, Message, ask, chunked, request

CHAT = b"/v1/chat/completions"
COMPLETIONS = b"/v1/completions"
ROLE = b'{"id":"1","choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}'
WORD = b'{"id":"1","choices":[{"index":0,"delta":{"content":"h\xc3\xa9"}}]}'
LAST = b'{"id":"1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}'
USAGE = b'{"id":"1","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}'
TIMINGS = b',"timings":{"prompt_n":3,"predicted_per_second":9.5}}'

Events = Callable[[bool], bytes]  # the stream, with the usage or without


def lines(*data: bytes, end: bytes = b"\n", before: bytes = b"data: ") -> bytes:
    return b"".join(before + item + end + end for item in data)


def plain(*before: bytes, usage: bytes = USAGE, after: bytes = b"[DONE]", **form: bytes) -> Events:
    """Events of one line each, and the usage next to the last one if it is wanted."""
    return lambda wanted: lines(*before, *([usage] if wanted else []), after, **form)


def framed(*before: bytes, usage: bytes, after: bytes = b"data: [DONE]\n\n") -> Events:
    """Events that are written out."""
    return lambda wanted: b"".join((*before, usage if wanted else b"", after))


SHAPES: dict[str, Events] = {
    "LF": plain(ROLE, WORD, WORD, LAST),
    "CRLF": plain(ROLE, WORD, WORD, LAST, end=b"\r\n"),
    "CR": plain(ROLE, WORD, WORD, LAST, end=b"\r"),
    "no space": plain(ROLE, WORD, LAST, before=b"data:"),
    "two spaces": plain(ROLE, WORD, LAST, before=b"data:  "),
    "a byte order mark": lambda wanted: b"\xef\xbb\xbf" + plain(ROLE, WORD, LAST)(wanted),
    "no end": lambda wanted: plain(ROLE, WORD, LAST)(wanted).removesuffix(b"\n\n"),
    "one LF at the end": lambda wanted: plain(ROLE, WORD, LAST)(wanted).removesuffix(b"\n"),
    "no [DONE]": framed(lines(ROLE, WORD, LAST), usage=lines(USAGE), after=b""),
    "comments": framed(
        b": welcome\n\n", lines(ROLE), b": ping\n\n:\n\n", lines(WORD, LAST), b": bye\n\n", usage=lines(USAGE)
    ),
    "names, ids, retries": framed(
        b"retry: 3000\n\nid: 1\n" + lines(ROLE),
        b"event: message\nid: 2\ndata: " + WORD + b"\nretry: 10\n\n",
        lines(LAST),
        usage=b"id: 3\ndata: " + USAGE + b"\n\n",
        after=b"id: 4\ndata: [DONE]\n\n",
    ),
    "several lines of data": framed(
        b'data: {"choices":[{"index":0,\ndata: "delta":{"content":"a"}}]}\n\n',
        usage=b'data: {"choices":[],\ndata: "usage":{"prompt_tokens":3,\ndata: "completion_tokens":2}}\n\n',
    ),
    "unknown fields": framed(b"x-odd: 1\nfoo\n" + lines(WORD), lines(LAST), usage=b"foo\n" + lines(USAGE)),
    "blank lines": framed(b"\n\n\n" + lines(ROLE), b"\n\n" + lines(WORD, LAST), usage=lines(USAGE), after=b"\n\n\n"),
    "mixed line ends": framed(
        lines(ROLE, end=b"\r\n"), lines(WORD), lines(LAST, end=b"\r"), usage=lines(USAGE, end=b"\r\n")
    ),
    "usage first": plain(WORD, LAST, usage=b'{"usage":{"prompt_tokens":3,"completion_tokens":2},"choices":[]}'),
    "usage with spaces": plain(
        WORD, LAST, usage=b'{ "choices" : [ ] , "usage" : { "prompt_tokens": 3, "completion_tokens": 2 } }'
    ),
    "usage with details": plain(
        WORD,
        LAST,
        usage=b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,'
        b'"prompt_tokens_details":{"cached_tokens":1}},"service_tier":null}',
    ),
    "usage in small pieces": lambda wanted: plain(*[WORD] * 50, LAST)(wanted),
    "no choices but no usage": plain(b'{"choices":[],"prompt_filter_results":[{"index":0}]}', WORD, LAST),
    "usage in what is said": plain(
        b'{"choices":[{"delta":{"content":"\\"usage\\":{\\"prompt_tokens\\":1},\\"choices\\":[]"}}]}', LAST
    ),
    "usage next to choices": plain(
        WORD, b'{"choices":[{"delta":{},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
    ),
    "an error in the stream": framed(lines(WORD, b'{"error":{"message":"no","type":"x"}}'), usage=b""),
    "no JSON": framed(b"data: hello\n\ndata: {\n\ndata:\n\ndata\n\n", usage=lines(USAGE)),
    "a long event": plain(b'{"choices":[{"delta":{"content":"' + b"a" * 300_000 + b'"}}]}', LAST),
    "many events": plain(*[WORD] * 3000, LAST),
    "binary": framed(b"\x00\xff\xfe\n\n" + lines(WORD, LAST), usage=lines(USAGE)),
    "nothing": lambda wanted: b"",
}

TYPES = [
    b"text/event-stream",
    b"text/event-stream; charset=utf-8",
    b"text/event-stream;charset=UTF-8",
    b"Text/Event-Stream",
    b"TEXT/EVENT-STREAM ; charset=utf-8",
]

# What a client may say of its stream's options
OPTIONS = {
    "none": b"",
    "null": b',"stream_options":null',
    "empty": b',"stream_options":{}',
    "no usage": b',"stream_options":{"include_usage":false}',
    "usage": b',"stream_options":{"include_usage":true}',
    "usage, spaced": b' , "stream_options" : { "include_usage" : true }',
    "continuous alone": b',"stream_options":{"continuous_usage_stats":true}',
    "another": b',"stream_options":{"include_obfuscation":false}',
    "no object": b',"stream_options":7',
    "twice, then usage": b',"stream_options":{"include_usage":false},"stream_options":{"include_usage":true}',
    "twice, then none": b',"stream_options":{"include_usage":true},"stream_options":{"include_usage":false}',
    "usage null": b',"stream_options":{"include_usage":null}',
    "usage as a number": b',"stream_options":{"include_usage":1}',
}


def wants_as_vllm(body: dict[str, Any]) -> bool:
    """vLLM: whoever has options gets the usage unless they say no."""
    options = body.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage", True))


def wants_as_openai(body: dict[str, Any]) -> bool:
    """OpenAI, llama.cpp: the option must be set."""
    options = body.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))


def wants_never(body: dict[str, Any]) -> bool:
    """An engine that does not know the option."""
    return False


ENGINES = {"vllm": wants_as_vllm, "openai": wants_as_openai, "deaf": wants_never}


def engine(
    events: Events,
    wants: Callable[[dict[str, Any]], bool] = wants_as_openai,
    *,
    type: bytes = TYPES[0],
    size: int = 1 << 20,
    pieces: bool = False,
) -> Callable[[Message], bytes | tuple[bytes, ...]]:
    """A script: the stream in chunks of at most `size` bytes, each written on its own with `pieces`."""

    def script(message: Message) -> bytes | tuple[bytes, ...]:
        body = json.loads(message.body)
        if not body.get("stream"):
            return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
        head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % type
        said = events(wants(body))
        if not pieces:
            return head + chunked(said, size)
        return (
            head,
            *(chunked(said[at : at + size]).removesuffix(b"0\r\n\r\n") for at in range(0, len(said), size)),
            (b"0\r\n\r\n"),
        )

    return script


def asked(path: bytes = CHAT, options: bytes = b"", *headers: bytes, before: bytes = b"") -> bytes:
    """A request for a stream."""
    prompt = b'"messages":[{"role":"user","content":"hi"}]' if path == CHAT else b'"prompt":"hi"'
    body = b'{"model":"m",%b%b,"stream":true%b}' % (before, prompt, options)
    return request(b"POST %b HTTP/1.1" % path, *headers, body=body)


async def compare(both: Sides, sent: bytes) -> None:
    """The client sees the same; the engine sees the same but for what asks for the usage."""
    compared = await both.ask_both(sent)
    assert compared.direct.status == 200
    assert_same_answer(compared.direct, compared.relayed, free=LENGTH)
    for direct, relayed in zip(compared.asked_directly, compared.asked_by_relay, strict=True):
        assert_spliced(direct.body, relayed.body)
        same = replace(relayed, body=direct.body)
        assert_same_request(direct, same, free=LENGTH | {b"accept-encoding"})


def assert_spliced(direct: bytes, relayed: bytes) -> None:
    """The bodies are the same but for one short piece, which speaks of the usage."""
    if direct == relayed:
        return
    before = next((i for i, (a, b) in enumerate(zip(direct, relayed, strict=False)) if a != b), len(direct))
    longest = min(len(direct), len(relayed)) - before
    after = next((i for i in range(longest) if direct[-1 - i] != relayed[-1 - i]), longest)
    replaced, spliced = direct[before : len(direct) - after], relayed[before : len(relayed) - after]
    assert len(replaced) <= len(b'{"include_usage":false}') and len(spliced) <= 64
    assert json.loads(relayed)["stream_options"]["include_usage"] is True


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS], ids=["chat", "completions"])
@pytest.mark.parametrize("events", SHAPES.values(), ids=SHAPES)
async def test_shapes(sides: StartSides, events: Events, path: bytes) -> None:
    """Streams of every shape come as they are, asked for with the usage and without it."""
    both = await sides(engine(events))
    await compare(both, asked(path))
    await compare(both, asked(path, OPTIONS["usage"]))


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("events", SHAPES.values(), ids=SHAPES)
async def test_shapes_in_small_pieces(sides: StartSides, events: Events, size: int) -> None:
    """Where a chunk ends changes nothing."""
    if len(events(True)) > 20_000:
        size *= 1000
    both = await sides(engine(events, size=size, pieces=True))
    await compare(both, asked())


@pytest.mark.parametrize("type", TYPES, ids=bytes.decode)
async def test_types(sides: StartSides, type: bytes) -> None:
    """The name of the type is compared as HTTP says: without regard to case, whatever follows it."""
    both = await sides(engine(SHAPES["LF"], type=type))
    await compare(both, asked())


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
async def test_options(sides: StartSides, options: bytes, kind: str) -> None:
    """A client gets the usage if it would get it without a relay, from the first stream on."""
    both = await sides(engine(SHAPES["LF"], ENGINES[kind]))
    for path in (CHAT, COMPLETIONS, CHAT):
        await compare(both, asked(path, options))


BODIES = {
    "numbers": b'"temperature":1e400,"seed":-0,"top_p":1.000000000000000000001,"n":1E0,',
    "twins": b'"a":1,"a":2,"a":{"a":1,"a":2},',
    "spaces": b' "a" :\t[ 1 ,\r\n2 ] , ',
    "escapes": b'"\\u0061":"\\ud800\\/\\u00e9",',
    "stream first": b'"stream":false,',
    "nested": b'"metadata":{"stream":false,"stream_options":{"include_usage":true}},',
    "in a text": b'"user":"\\",\\"stream_options\\":{\\"include_usage\\":true},\\"stream\\":false,\\"",',
    "NaN": b'"a":NaN,"b":[-Infinity],',
}


@pytest.mark.parametrize("before", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("options", [b"", OPTIONS["no usage"]], ids=["none", "no usage"])
async def test_bodies_are_spliced(sides: StartSides, before: bytes, options: bytes) -> None:
    """To ask for the usage, one piece is put into the body; every other byte of it stays."""
    both = await sides(engine(SHAPES["LF"]))
    await compare(both, asked(CHAT, options, before=before))


@pytest.mark.parametrize(
    "body",
    [
        b'{"stream":true,"stream":false,"messages":[]}',
        b'{"stream":1,"messages":[]}',
        b'{"stream":"true","messages":[]}',
        b'{"stream":true}',
        b'{"stream":true }  \n',
        b'{ \n"stream":true,"messages":[]}',
        b'{"str\\u0065am":true,"messages":[]}',
        b'{"stream":true,"messages":[],"stream_opt\\u0069ons":{"include_usage":true}}',
    ],
    ids=bytes.decode,
)
async def test_odd_bodies(sides: StartSides, body: bytes) -> None:
    """A member counts as the engine's parser reads it: the last of two, with its escapes."""
    both = await sides(engine(SHAPES["LF"]))
    await compare(both, request(b"POST /v1/chat/completions HTTP/1.1", body=body))


# --- what an engine does otherwise when it is asked for the usage ---


def llama_cpp(wanted: bool) -> bytes:
    """llama.cpp: `timings` stand in whatever event is the last one."""
    if wanted:
        return lines(ROLE, WORD, LAST, USAGE[:-1] + TIMINGS, b"[DONE]")
    return lines(ROLE, WORD, LAST[:-1] + TIMINGS, b"[DONE]")


def null_usage(wanted: bool) -> bytes:
    """OpenAI: who asks for the usage gets `"usage":null` in every other event."""
    more = b',"usage":null}' if wanted else b"}"
    return lines(*(e[:-1] + more for e in (ROLE, WORD, LAST)), *([USAGE] if wanted else []), b"[DONE]")


@pytest.mark.parametrize("events", [llama_cpp, null_usage], ids=lambda e: e.__name__)
@pytest.mark.parametrize("options", [b"", OPTIONS["usage"]], ids=["none", "usage"])
@pytest.mark.parametrize("size", [1 << 20, 5])
async def test_side_effects_of_the_option(sides: StartSides, events: Events, options: bytes, size: int) -> None:
    """What an engine moves or adds when it is asked for the usage stays where the client would have found it."""
    both = await sides(engine(events, size=size, pieces=size < 100))
    for _ in range(3):
        await compare(both, asked(CHAT, options))


# --- streams in other frames ---


def packed(events: Events, coding: str, *, obeys: bool) -> Callable[[Message], bytes]:
    """A script: a compressed stream for whom accepts it, or with `obeys` false for everyone."""

    def script(message: Message) -> bytes:
        said = events(wants_as_openai(json.loads(message.body)))
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        if not obeys or coding.encode() in message.value(b"accept-encoding"):
            said = gzip.compress(said, mtime=0) if coding == "gzip" else zlib.compress(said)
            head += b"Content-Encoding: %b\r\n" % coding.encode()
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(said, 50)

    return script


def unpacked(answer: Answer) -> bytes:
    """The events, whatever their coding."""
    assert answer.final is not None and answer.final.is_whole
    body, coding = answer.final.body, answer.final.value(b"content-encoding")
    if coding == b"gzip":
        return gzip.decompress(body)
    return zlib.decompress(body) if coding == b"deflate" else body


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("obeys", [True, False], ids=["if accepted", "to everyone"])
@pytest.mark.parametrize("options", [b"", OPTIONS["usage"], OPTIONS["empty"]], ids=["none", "usage", "empty"])
async def test_compressed_streams(sides: StartSides, coding: str, obeys: bool, options: bytes) -> None:
    """A stream that may be compressed says the same, with no event that only the relay asked for."""
    both = await sides(packed(SHAPES["LF"], coding, obeys=obeys))
    compared = await both.ask_both(asked(CHAT, options, b"Accept-Encoding: %b" % coding.encode()))
    assert unpacked(compared.relayed) == unpacked(compared.direct)


async def test_a_stream_with_a_length(sides: StartSides) -> None:
    """A stream that is shorter than its length says, because an event was taken out, is whole all the same."""

    def script(message: Message) -> bytes:
        said = SHAPES["LF"](wants_as_openai(json.loads(message.body)))
        return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said)

    both = await sides(script)
    for options in (b"", OPTIONS["usage"]):
        await compare(both, asked(CHAT, options))


@pytest.mark.parametrize("version", [b"1.0", b"1.1"], ids=bytes.decode)
async def test_a_stream_that_ends_with_its_connection(sides: StartSides, version: bytes) -> None:
    """A stream without chunks ends with the connection of an engine, and says the same."""

    def script(message: Message) -> bytes:
        said = SHAPES["LF"](wants_as_openai(json.loads(message.body)))
        return b"HTTP/%b 200 OK\r\nContent-Type: text/event-stream\r\n\r\n%b" % (version, said)

    both = await sides(script, closes=True)
    for options in (b"", OPTIONS["usage"]):
        await compare(both, asked(CHAT, options))


async def test_a_stream_for_a_client_of_http_1_0(sides: StartSides) -> None:
    """A client of HTTP/1.0 gets the events without chunks."""
    both = await sides(engine(SHAPES["LF"]))
    answer = await ask(both.relayed, asked().replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert answer.final and not answer.final.is_chunked
    assert answer.final.body == SHAPES["LF"](False)


async def test_an_error_instead_of_a_stream(sides: StartSides) -> None:
    """The status and body of an engine that refuses a stream are the client's."""
    body = b'{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}'
    both = await sides(b"HTTP/1.1 422 No\r\nContent-Type: application/json\r\nContent-Length: 64\r\n\r\n" + body)
    compared = await both.ask_both(asked())
    compared.assert_same_answers()


@pytest.mark.parametrize("path", [b"/v1/messages", b"/v1/responses", b"/generate_stream", b"/x"], ids=bytes.decode)
async def test_streams_of_other_routes(sides: StartSides, path: bytes) -> None:
    """Streams of other interfaces are not changed, and nothing is added to what asks for them."""
    events = framed(
        b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":3}}}\n\n',
        b"event: ping\ndata: {}\n\n",
        b'event: content_block_delta\ndata: {"delta":{"text":"x"}}\n\n',
        b'data:{"token":{"id":1,"text":"x"}}\n\n',
        b'event: message_delta\ndata: {"usage":{"output_tokens":1}}\n\n',
        usage=b"",
        after=lines(USAGE),
    )
    both = await sides(engine(events))
    compared = await both.compare(asked(path))
    assert compared.asked_by_relay[0].body == compared.asked_directly[0].body
