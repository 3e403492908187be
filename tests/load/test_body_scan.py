"""Scans of bodies: the compiled one, Python's, and the parsed body agree, whatever the bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidecar.load import body_scan, request_keys
from sidecar.load.api_routes import CHAT
from sidecar.load.body_scan import TOO_LONG, find, find_in_python, lenient, prompt_text, scan
from sidecar.load.found import MAX_PARTS, MAX_TEXTS, Found
from sidecar.load.request_shape import describe

from ..fuzz import targets
from . import json_oracle

# Every word that means something in some place, and some that do not.
WORDS = sorted(
    {
        *request_keys.PROMPT_KEYS,
        *request_keys.OPTION_KEYS,
        *request_keys.MEDIA_TYPES,
        *request_keys.PRINTED_KEYS,
        *request_keys.BINARY_KEYS,
        *request_keys.SEALED_KEYS,
        *request_keys.IMAGES_KEYS,
        *("type", "url", "uuid", "strict", "function", "functions", "tool_use", "role", "a", "b", ""),
    }
)
URLS = (
    *("data:image/png;base64,AAAA", "data: IMAGE/PNG ;x;base64,/9", "data:text/plain;base64,AA", "data:image/png,AA"),
    *("http://a/b.png", "HTTPS://a", "\u00a0 https:a", "http//", "file:///a", "data:image/" + "x" * 120 + ";base64,A"),
)
TEXTS = ("hello", "é", "你好", "😀", "a\ud800b", '"\\/\b\f\n\r\t\x00\x1f\x7f', "text", *URLS)


def escaped(text: str, every: bool) -> bytes:
    """A text as a JSON string, with every character as an escape or with as few as can be."""
    if every:
        units = text.encode("utf-16-be", "surrogatepass").hex()
        return b'"%b"' % b"".join(b"\\u%b" % units[n : n + 4].encode() for n in range(0, len(units), 4))
    return json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass")


strings = st.builds(escaped, st.sampled_from([*WORDS, *TEXTS]) | st.text(max_size=5), st.booleans())
keys = st.builds(escaped, st.sampled_from(WORDS), st.sampled_from((False, False, False, True)))
scalars = st.sampled_from(
    [b"null", b"true", b"false", b"0", b"-0", b"7", b"-12", b"1.5", b"0.0", b"-0.0", b"1e+16", b"NaN", b"-Infinity"]
)
blanks = st.sampled_from([b"", b"", b" ", b"\n\t\r "])


def listed(items: Sequence[bytes], blank: bytes) -> bytes:
    return b"[%b%b%b]" % (blank, (b"," + blank).join(items), blank)


def object_of(members: Sequence[tuple[bytes, bytes]], blank: bytes) -> bytes:
    inside = (b"," + blank).join(key + blank + b":" + blank + value for key, value in members)
    return b"{%b%b%b}" % (blank, inside, blank)


values = st.recursive(
    strings | scalars,
    lambda inner: (
        st.builds(listed, st.lists(inner, max_size=4), blanks)
        | st.builds(object_of, st.lists(st.tuples(keys, inner), max_size=5), blanks)
    ),
    max_leaves=15,
)


def member(name: str, value: st.SearchStrategy[bytes]) -> st.SearchStrategy[tuple[bytes, bytes]]:
    return st.tuples(st.just(b'"%b"' % name.encode()), value)


def objects(*members: st.SearchStrategy[tuple[bytes, bytes]]) -> st.SearchStrategy[bytes]:
    """Objects that have any of `members`, also repeated, among others."""
    chosen = st.lists(st.one_of(*members, st.tuples(keys, values)), max_size=5)
    return st.builds(object_of, chosen, blanks)


def lists(item: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.builds(listed, st.lists(item | values, max_size=3), blanks) | values


links = st.sampled_from(URLS).map(lambda url: escaped(url, False)) | strings
parts = objects(
    member("type", st.sampled_from([b'"image_url"', b'"input_image"', b'"text"', b'"tool_use"', b"1"])),
    member("image_url", links | objects(member("url", links))),
    member("uuid", strings),
)
tools = lists(objects(member("strict", scalars), member("function", objects(member("strict", scalars)))))
messages = lists(objects(member("content", lists(parts)), member("tools", tools), member("functions", tools)))
bodies = objects(
    *(member(name, messages) for name in ("messages", "messages", "input")),
    *(member(name, tools) for name in ("tools", "functions")),
    member("images", lists(links)),
    member("stream", scalars),
    member("stream_options", objects(member("include_usage", scalars))),
)


def repeats_unknown(body: bytes) -> bool:
    """Whether an object repeats a key: parsers then see less than a scan, which counts unknown keys each time."""
    found = []

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found.append(len(dict(pairs)) < len(pairs))
        return dict(pairs)

    json.loads(body, object_pairs_hook=check)
    return any(found)


@settings(max_examples=200)
@given(bodies, st.sampled_from([b"", b"", b"\xef\xbb\xbf", b" \n"]))
def test_both_forms_find_the_same(body: bytes, before: bytes) -> None:
    """With repeated keys, escaped names, blanks and all: numbers, places and texts."""
    targets.body_scan(before + body)


@settings(max_examples=200)
@given(bodies)
@example(b'{"messages":[true,[],[true]]}')
def test_a_scan_finds_what_a_parser_finds(body: bytes) -> None:
    """The shape of a request is that of its parsed body, its image parts are those of it, where they are."""
    found = scan(body)
    assert found is not None
    payload = json.loads(body)
    for name, (start, end) in found.found.members.items():
        assert repr(json.loads(body[start:end])) == repr(payload[name])
    urls = dict(json_oracle.images(payload))
    for part in found.found.parts:
        text = json.loads(b'"%b"' % body[slice(*part.url)])
        assert urls[part.where] == text and body[part.start : part.start + 1] == b"{"
        assert text.startswith("data:") or part.is_link
    if not repeats_unknown(body):
        assert describe(found, CHAT, 0) == json_oracle.describe(payload, "chat", 0)


ODD = [
    *(b'{"prompt":%b}' % b for b in (b"01", b"1.", b".5", b"1e", b"-", b"+1", b"1" * 4301, b"tru", b"nul", b"nan")),
    *(
        b'{"prompt":"%b"}' % b
        for b in (b"\n", b"\x00", b"\\x", b"\\", b"\\u12g4", b"\xff", b"\xc0\x80", b"\xf5\x80\x80\x80")
    ),
    *(
        b'{"prompt":"%b"}' % b
        for b in (b"\xe4\xbd", b"\xe0\x80\x80", b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80", b"\\ud800\\u1")
    ),
    *(
        b"",
        b" ",
        b"{",
        b"}",
        b"[]",
        b"null",
        b'"a"',
        b'{"a"}',
        b'{"a":}',
        b'{"a":1,}',
        b"{,}",
        b"{a:1}",
        b'{"a":1}x',
        b"{}{}",
    ),
    *(
        b'{"a":[1,]}',
        b'{"a":[,1]}',
        b'{"a":[1 2]}',
        b'{"a" "b"}',
        b'{"a":1 "b":2}',
        b"{'a':1}",
        b"\xef\xbb\xbf\xef\xbb\xbf{}",
        b"{}\x0b",
    ),
]
SOUND = [
    *(b'{"tools":[%b]}' % b for b in (b"1.50", b"1E400", b"-0", b"-0.0", b"1" * 4300, b"NaN")),
    b'{"tools":["\\u0007\\b\\/\\u00e9"]}',
    *(b'{"content":[{"image":%b}]}' % b for b in (b"0", b"0.0", b"-0e9", b"1e-999", b"NaN", b"[]", b"{}", b'""')),
    *(b"{}", b" {}\n", b"\xef\xbb\xbf {}"),
    *(b'{"prompt":"\xed\xa0\xbd\xed\xb8\x80"}', b'{"prompt":"\\ud83d\xed\xb8\x80"}'),
    b'{"prompt":[{"text":"a","text":"bc","x":"d","x":"efg","data":"h","type":"image","type":"text","data":"ij"}]}',
    b'{"messages":[{"content":[{"type":"image_url","image_url":"http://a"}],"content":"b"}]}',
    b'{"messages":[{"tools":[{"strict":true}],"tools":[]}],"tools":{"strict":true}}',
    b'{"stream":false,"stream":true,"model":"a","model":"b","\\u006dodel":"c"}',
]  # fmt: skip


@pytest.mark.parametrize("body", [*ODD, *SOUND])
def test_odd_bodies_are_read_as_parsers_read_them(body: bytes) -> None:
    """What is JSON to Python's parser is to both scans, which find the same in it; all else is to neither."""
    targets.body_scan(body)
    assert (find(body) is not None) is (body in SOUND)


@pytest.mark.parametrize(
    ("body", "text_bytes"),
    [
        (b'{"prompt":[{"a":"1","a":"22"}]}', 3),
        (b'{"prompt":[{"text":"1","text":"22"}]}', 2),
        (b'{"prompt":"1","prompt":"22"}', 2),
        (b'{"tools":[{"a":1,"a":22}]}', len('[{"a":1,"a":22}]')),
    ],
)
def test_a_repeated_key_holds_its_last_value_or_counts_again(body: bytes, text_bytes: int) -> None:
    """The last, of keys that mean something; of others, each."""
    for found in (find(body), find_in_python(body)):
        assert found is not None and found.text_bytes == text_bytes


def test_depth_is_bounded() -> None:
    """What is nested deeper than parsers go is left unread, however deep, and without recursion."""
    for depth, is_read in ((900, True), (1022, True), (1024, False), (1_000_000, False)):
        found = find(b'{"prompt":' + b"[" * depth + b"1" + b"]" * depth + b"}")
        assert (found is not None) is is_read


def test_what_is_kept_is_bounded() -> None:
    """Of many texts no place is kept, of many images those of the first ones; all of them are counted."""
    texts = find(b'{"prompt":[%b]}' % b",".join([b'"ab"'] * (MAX_TEXTS + 1)))
    assert texts is not None and texts.texts is None and texts.text_bytes == 2 * (MAX_TEXTS + 1)
    part = b'{"type":"image_url","image_url":{"url":"data:image/png;base64,AA"}}'
    images = find(b'{"messages":[{"content":[%b]}]}' % b",".join([part] * (MAX_PARTS + 1)))
    assert images is not None and len(images.parts) == MAX_PARTS
    assert images.image_parts == images.images == MAX_PARTS + 1


def test_a_long_option_counts_as_set() -> None:
    """A schema that is too long to parse is a grammar all the same; a long name begins as it does; holders are read."""
    long = "x" * 5000
    body = {
        "model": long,
        "response_format": {"type": "json_schema", "json_schema": long},
        "sampling_params": {"json_schema": long, "max_new_tokens": 7},
        "n": "1" * 5000,
        "stream": long,
        "priority": "9" * 5000,
        "tools": [{}],
        "tool_choice": {"type": "function", "function": {"name": long}},
    }
    found = scan(json.dumps(body).encode())
    assert found is not None
    assert found.options["response_format"] is found.options["n"] is found.options["stream"] is TOO_LONG
    shape = describe(found, CHAT, 0)
    assert (shape.model, shape.max_output, shape.choices) == ("x" * 128, 7, 1)
    assert (shape.stream, shape.priority, shape.reorders, shape.withholds) == (False, 0, True, True)
    many = {name: [0] * 300 for name in request_keys.GRAMMARS}
    assert TOO_LONG in scan(json.dumps(many).encode()).options.values()  # type: ignore[union-attr]


def test_without_the_module_long_bodies_are_left_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short ones are read in Python; a longer one would hold the event loop."""
    monkeypatch.setattr(body_scan, "_fused", None)
    short = scan(b'{"model":"m","prompt":"ab"}')
    assert short is not None and (short.options["model"], short.found.text_bytes) == ("m", 2)
    assert body_scan.inside_of(b'"a\\n\\ud800"', 1, 10) == b"a\n?"
    assert scan(b'{"model":"m","prompt":"%b"}' % (b"a" * body_scan.MAX_PYTHON_BYTES)) is None


@given(st.text(), st.integers(0, 40), st.integers(0, 40), st.booleans())
def test_a_piece_of_a_text_can_be_read(text: str, start: int, size: int, every: bool) -> None:
    """Cut anywhere, in the middle of a character or of an escape, some text comes of it, and the whole of the whole."""
    raw = escaped(text, every)[1:-1]
    assert isinstance(lenient(raw[start : start + size]), str)
    assert lenient(raw) == text


def test_texts_are_read_from_their_places() -> None:
    """What engines print is printed, what clients escaped is not escaped."""
    body = b'{"prompt":["\\u00e9",[" a"]],"tools":[ {"a" : 1.50} ],"system":""}'
    found: Found | None = find(body)
    assert found is not None and found.texts is not None
    places = iter(found.texts.places)
    texts = [prompt_text(body, start, end, bool(printed)) for start, end, printed in zip(*[places] * 3, strict=True)]
    assert texts == ["é", " a", '[{"a":1.50}]']
