"""Bodies: what is found in them, what is spliced in, and that nothing of a user can fool either."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.load import request_shape
from sidecar.load.api_routes import CHAT, COMPLETIONS, api_of
from sidecar.load.request_shape import RequestShape, describe
from sidecar.relay.request_body import ParsedBody, parse, rebuild

from ..load import json_oracle

PIXEL = "iVBORw0KGgo" * 400


def chat(*parts: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": list(parts)}]}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def sent(skeleton: ParsedBody, replaced: dict[int, tuple[str, bytes]], **kwargs: bool) -> Any:
    return json.loads(b"".join(rebuild(skeleton, replaced, **kwargs)))


def test_an_image_is_found_and_never_copied() -> None:
    """The base64 text is a view into the body that came in, and nothing else of the scan holds it."""
    body = json.dumps(chat({"type": "text", "text": "hi"}, image(f"data:image/png;base64,{PIXEL}"))).encode()
    skeleton = parse(body)
    [part] = skeleton.images
    assert (part.where, part.media_type) == ("messages[0].content[1]", "image/png")
    assert part.data.obj is body
    assert bytes(part.data) == PIXEL.encode()
    assert PIXEL not in repr(skeleton.scan)


def test_the_original_bytes_are_sent_when_nothing_changes() -> None:
    """Without replacement and without a question for usage the very object that came in goes out."""
    body = json.dumps(chat(image(f"data:image/png;base64,{PIXEL}")), indent=3).encode()
    assert rebuild(parse(body), {}) == [body]


def test_a_replacement_lands_in_its_own_part_only() -> None:
    """Of two images the replaced one changes, the other and everything else stays."""
    first, second = f"data:image/png;base64,{PIXEL}", "data:image/jpeg;base64,AAAA"
    skeleton = parse(json.dumps(chat(image(first), image(second))).encode())
    out = sent(skeleton, {1: ("image/bmp", b"QkJC")})
    assert out == chat(image(first), image("data:image/bmp;base64,QkJC"))


def test_bare_image_urls_and_responses_parts_are_images_too() -> None:
    """`image_url` may be a plain string, and /v1/responses calls the part input_image and the list input."""
    url = "data:image/webp;base64,AAAA"
    body = {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]}
    [part] = parse(json.dumps(body).encode()).images
    assert (part.where, part.media_type, bytes(part.data)) == ("input[0].content[0]", "image/webp", b"AAAA")


def test_escaped_slashes_are_read() -> None:
    r"""PHP writes `\/` into base64 and media type: the image is found, unescaped, and replaced all the same."""
    url = "data:image/png;base64,AA//BB=="
    body = json.dumps(chat(image(url))).replace("/", "\\/").encode()
    skeleton = parse(body)
    [part] = skeleton.images
    assert bytes(part.data) == b"AA//BB=="
    assert rebuild(skeleton, {}) == [body]
    assert sent(skeleton, {}, ask_usage=True)["messages"] == chat(image(url))["messages"]
    assert sent(skeleton, {0: ("image/bmp", b"QQ")})["messages"][0]["content"][0]["image_url"]["url"] == (
        "data:image/bmp;base64,QQ"
    )


@pytest.mark.parametrize(
    "text",
    [
        'see "data:image/png;base64,AAAA" here',
        "data:image/png;base64,AAAA",
        "data:,0-0.",
        '\\"data:image/png;base64,AAAA',
        ";base64,;base64,",
        '"',
        "\\",
        "\u0000\ud800",
    ],
)
def test_text_is_never_an_image(text: str) -> None:
    """A data URL in a text, quoted or alone, comes out as it went in and is no image."""
    body = chat({"type": "text", "text": text}, image(f"data:image/png;base64,{PIXEL}"))
    skeleton = parse(json.dumps(body).encode())
    assert [part.where for part in skeleton.images] == ["messages[0].content[1]"]
    out = sent(skeleton, {0: ("image/bmp", b"QQ")})
    assert out["messages"][0]["content"][0]["text"] == text


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"null", b'{"a": NaN', b"\xff\xfe", b"[" * 100_000, b'{"a":"data:image/png;base64,AA']
)
def test_what_is_no_json_object_is_the_engines_to_judge(body: bytes) -> None:
    """Invalid, foreign or too deep JSON yields no payload, no images, and the original bytes."""
    skeleton = parse(body)
    assert skeleton.scan is None
    assert not skeleton.images
    assert rebuild(skeleton, {}, ask_usage=True) == [body]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_body_in_wide_characters_is_left_alone(encoding: str) -> None:
    """Python's parser would read it, and so does an engine in Python; nothing of ours can be spliced into it."""
    body = json.dumps({"model": "m", "stream": True}).encode(encoding)
    skeleton = parse(body)
    assert skeleton.scan is None and rebuild(skeleton, {}, ask_usage=True) == [body]


def test_a_long_text_is_measured() -> None:
    """However long, a text is counted to the byte, and what could not be read counts by its length."""
    body = b'{"prompt":"' + b"a" * (20 << 20) + b'"}'
    assert describe(parse(body).scan, COMPLETIONS, len(body)).text_bytes == 20 << 20
    assert describe(None, COMPLETIONS, len(body)).text_bytes == len(body)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.text() | st.just("data:image/png;base64,AA/9"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
parts = st.lists(
    st.sampled_from(
        ["data:image/png;base64,AAAA", "data:image/svg+xml,<svg>", "http://x/y.png", "data:image/png;base64,"]
    ).map(image)
    | st.text().map(lambda t: {"type": "text", "text": t}),
    max_size=4,
)


@given(values, parts, st.booleans(), st.booleans())
def test_join_undoes_cut(extra: Any, content: list[Any], ascii_only: bool, slashes: bool) -> None:
    """Whatever JSON surrounds the images, a body that is rebuilt means the same as the one that came in."""
    body = {"extra": extra, "stream_options": None, **chat(*content)}
    text = json.dumps(body, ensure_ascii=ascii_only)
    if slashes:
        text = text.replace("/", "\\/")
    skeleton = parse(text.encode(errors="surrogatepass"))
    out = sent(skeleton, {}, ask_usage=True)
    assert out == {**body, "stream_options": {"include_usage": True}}
    replaced = sent(skeleton, {n: ("image/bmp", b"QQ") for n, _ in enumerate(skeleton.images)})
    expected = [
        image("data:image/bmp;base64,QQ")
        if p.get("image_url", {}).get("url", "").startswith("data:image/png;base64,")
        else p
        for p in content
    ]
    if skeleton.images:
        assert replaced == {**body, "messages": [{"role": "user", "content": expected}]}


def shape_of(payload: dict[str, Any], route: str = "chat") -> RequestShape:
    """What the relay makes of a body, as bytes."""
    api = api_of("POST", f"/{route}" if route != "chat" else "/chat/completions", has_body=True)
    assert api is not None
    return describe(parse(json.dumps(payload).encode()).scan, api, 0)


def message(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


URL = "data:image/png;base64," + PIXEL
TEXTS = [URL, "data: and then a long story", "data:," + PIXEL, URL + "\\n" + URL, "data:text/plain;base64,жизнь"]
PLACES: dict[str, Callable[[str], dict[str, Any]]] = {
    "content": lambda t: {"messages": [{"role": "user", "content": t}]},
    "text part": lambda t: message({"type": "text", "text": t}),
    "text next to an image": lambda t: message({"type": "text", "text": t}, image(URL)),
    "prompt": lambda t: {"prompt": t},
    "prompts": lambda t: {"prompt": ["a", t]},
    "suffix": lambda t: {"prompt": "a", "suffix": t},
    "responses": lambda t: {"input": t, "instructions": t},
    "responses part": lambda t: {"input": [{"role": "user", "content": [{"type": "input_text", "text": t}]}]},
    "system": lambda t: {"system": t},
    "system block": lambda t: {"system": [{"type": "text", "text": t}]},
    "tool result": lambda t: message({"type": "tool_result", "tool_use_id": "1", "content": t}),
    "tool result block": lambda t: message({"type": "tool_result", "content": [{"type": "text", "text": t}]}),
    "tool message": lambda t: {"messages": [{"role": "tool", "content": t}]},
    "thinking": lambda t: message({"type": "thinking", "thinking": t}),
    "rerank": lambda t: {"query": t, "documents": [t, {"text": t}]},
    "score": lambda t: {"text_1": t, "text_2": [t]},
    "cohere documents": lambda t: {"documents": [{"data": t}, {"data": {"snippet": t}}]},
    "cohere chat": lambda t: {"message": t, "chat_history": [{"message": t}], "preamble": t},
    "cohere embed": lambda t: {"texts": [t]},
    "decision": lambda t: {"state": {"a": t}, "questions": {"q": {"instructions": t}}},
    "keys of a state": lambda t: {"state": {t: 1}},
    "vertex": lambda t: {"instances": [{"inputs": t}]},
    "infill's files": lambda t: {"prompt": "a", "input_extra": [{"filename": "f", "text": t}]},
    "ollama": lambda t: {"prompt": "a", "system": t, "template": t},
    "template's arguments": lambda t: {"messages": [], "chat_template_kwargs": {"documents": [t]}},
    "embeddings": lambda t: {"input": [t, t]},
    "sglang": lambda t: {"text": t},
    "tgi": lambda t: {"inputs": t},
    "infill": lambda t: {"input_prefix": t, "input_suffix": t},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_text_counts_whatever_it_says(place: str, text: str) -> None:
    """Where an engine reads text, a data URL is as much text as any other of its length."""
    plain = text.translate({ord("d"): "D", ord(";"): ","})  # of the same length, and like no data URL
    assert shape_of(PLACES[place](text)) == shape_of(PLACES[place](plain))
    assert shape_of(PLACES[place](text)).text_bytes >= len(text.encode())


@pytest.mark.parametrize("slashes", [False, True])
def test_what_a_media_part_holds_is_no_text(slashes: bool) -> None:
    """Escaped or not, typed, untyped or named by its key: media count nothing as text."""
    sound, film = "data:audio/wav;base64,AA//" * 99, "data:video/mp4;base64,AA//" * 99
    body = message(
        image(URL + "/"),
        {"image_url": {"url": URL + "/"}},
        {"type": "audio_url", "audio_url": {"url": sound}},
        {"video_url": {"url": film}},
        {"type": "file", "file": {"file_data": URL + "/"}},
        {"type": "image", "source": {"type": "base64", "data": PIXEL}},
        {"text": "", "image": URL + "/"},
        {"type": "document", "source": {"type": "base64", "data": PIXEL}},
    )
    text = json.dumps(body).replace("/", "\\/") if slashes else json.dumps(body)
    skeleton = parse(text.encode())
    shape = describe(skeleton.scan, CHAT, 0)
    assert (shape.images, shape.audios, shape.videos) == (4, 1, 1)
    assert shape.text_bytes < 50


LONG = "a long story " * 99


@pytest.mark.parametrize(
    "payload",
    [
        {"prompt": [7, LONG, 8]},
        {"prompt": [[7, 8], LONG]},
        {"prompt": [True, LONG]},
        {"messages": [{"role": "user", "type": "image_url", "content": LONG}]},
        message({"type": "image", "text": LONG}),
        message({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": LONG}}),
        message({"type": "tool_use", "name": "f", "input": {"data": LONG}}),
        message({"type": "tool_use", "name": "f", "input": {"type": "image", "image": LONG}}),
        message({"type": "tool_use", "name": "f", "input": {LONG: 1}}),
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"data": LONG}}}]}]},
        {"tools": [{"name": "f", "input_schema": {"properties": {"data": {"type": "string", "description": LONG}}}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "audio", "x": LONG}}}]},
    ],
)
def test_a_text_counts_whatever_stands_next_to_it(payload: dict[str, Any]) -> None:
    """Token ids, types and names around a text make nothing else of it, where engines read it all the same."""
    assert shape_of(payload).text_bytes >= len(LONG)


def test_token_ids_are_counted_next_to_texts() -> None:
    """llama.cpp takes texts and token ids in one list; every id of it is a token."""
    assert shape_of({"prompt": [7, "ab", 8, "c"]}) == RequestShape(text_bytes=3, token_ids=2)


def test_what_engines_print_counts_as_printed() -> None:
    """Definitions of tools and the input of a call go into the prompt as JSON, a data URL in them as it came."""
    tools = [{"name": "f", "input_schema": {"type": "object", "examples": [URL, 1.5, None]}}]
    printed = len(json.dumps(tools, separators=(",", ":")))
    assert shape_of({"tools": tools}).text_bytes == printed
    assert shape_of({"tools": None}).text_bytes == 0
    called = message({"type": "tool_use", "input": {"a": [1, 2, "é"]}})
    assert shape_of(called).text_bytes == len("usertool_use") + len('{"a":[1,2,"é"]}'.encode())


def test_tools_of_any_depth_are_counted() -> None:
    """What is nested as deep as the parser goes, and deeper than it could be printed, is read and no error of ours."""
    read = 0
    for depth in range(900, 1000):
        body = b'{"tools":' + b"[" * depth + b'"' + LONG.encode() + b'"' + b"]" * depth + b"}"
        scan = parse(body).scan
        if scan is not None:
            assert describe(scan, CHAT, 0).text_bytes >= len(LONG)
            read += 1
    assert read


@given(values, parts, st.booleans())
def test_a_shape_is_that_of_the_parsed_body(extra: Any, content: list[Any], slashes: bool) -> None:
    """A request is as large as what its bytes mean."""
    body = {"prompt": extra, "model": extra, "system": extra, **message(*content)}
    text = json.dumps(body).replace("/", "\\/") if slashes else json.dumps(body)
    skeleton = parse(text.encode())
    assert describe(skeleton.scan, CHAT, 0) == json_oracle.describe(json.loads(text), "chat", 0)


def test_a_model_is_named_as_its_client_names_it() -> None:
    """A data URL for a name is that name, shortened; nothing of ours stands in its place."""
    assert shape_of({"model": URL}).model == URL[: request_shape.MAX_MODEL_NAME_CHARS]


def test_usage_is_asked_by_a_splice() -> None:
    """Where the client gave no stream_options, its own bytes follow the added member unchanged."""
    body = b'  { "model" : "m", "stream":true}'
    assert b"".join(rebuild(parse(body), {}, ask_usage=True)) == (
        b'  {"stream_options":{"include_usage":true}, "model" : "m", "stream":true}'
    )


USAGE = b'"include_usage":true'
AGAIN = b'"include\\u005fusage":true'


@pytest.mark.parametrize(
    ("options", "sent_options"),
    [
        (b'"stream_options":null', b'"stream_options":{%b}' % USAGE),
        (b'"stream_options":{"include_usage": 0,"a":1,"a":2}', b'"stream_options":{"include_usage": true,"a":1,"a":2}'),
        (b'"stream_options":{%b,"include\\u005fusage":0}' % USAGE, b'"stream_options":{%b,%b}' % (USAGE, AGAIN)),
        (b'"stream_options":7,"stream_options":null', b'"stream_options":7,"stream_options":{%b}' % USAGE),
        (b'"stream\\u005foptions":null', b'"stream\\u005foptions":{%b}' % USAGE),
        (
            b'"stream_options":{"a":"%b","include_usage":false}' % (b"x" * 5000),
            b'"stream_options":{"a":"%b","include_usage":true}' % (b"x" * 5000),
        ),
    ],
)  # fmt: skip
def test_options_are_spliced_and_nothing_else_changes(options: bytes, sent_options: bytes) -> None:
    """Forms of numbers, repeated keys and blanks go out as they came; the last options are the ones that count."""
    around = b'\xef\xbb\xbf {"stream": true, "temperature":1e400,"seed":1.50 , %b,"a":1,"a":-0}\n'
    parsed = parse(around % options)
    assert describe(parsed.scan, CHAT, 0).ask_usage
    assert b"".join(rebuild(parsed, {}, ask_usage=True)) == around % sent_options


def test_images_are_spliced_and_nothing_else_changes() -> None:
    """Two images, a name and the options at once: what is left of the body is what came."""
    url = b'"data:image/png;base64,AAAA"'
    parts = b'[{ "type":"image_url", "image_url" : {"url": %b}},{"image_url":%b,"type":"image_url","x":1e400,"x":0}]'
    body = b'{"stream":true,"messages":[{"content":' + parts + b'}],"stream_options":null}'
    parsed = parse(body % (url, url))
    parsed.images[1].name = "n"
    new = {0: ("image/bmp", b"QQ"), 1: ("", b"file:///a")}
    changed = body % (b'"data:image/bmp;base64,QQ"', b'"file:///a"')
    changed = changed.replace(b'{"image_url":"file', b'{"uuid":"n","image_url":"file')
    changed = changed.replace(b"null", b'{"include_usage":true}')
    assert b"".join(rebuild(parsed, new, ask_usage=True)) == changed


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (None, True),
        ({}, False),
        ({"continuous_usage_stats": True}, False),
        ({"include_usage": False}, True),
        ({"include_usage": True}, False),
        ("x", False),
        ([], False),
    ],
)
def test_usage_is_asked_only_where_the_client_did_not(options: Any, asked: bool) -> None:
    """Options that are wrong, or do not name it, stay: the engine refuses them, or has a default."""
    payload = {"stream": True, "stream_options": options}
    assert shape_of(payload).ask_usage is asked
    assert shape_of({**payload, "stream": False}).ask_usage is False
    assert shape_of(payload, "messages").ask_usage is False


@pytest.mark.parametrize(
    ("payload", "shape"),
    [
        (
            {"model": "m", "prompt": "abcd", "max_tokens": 7, "n": 2},
            RequestShape("m", max_output=14, choices=2, text_bytes=4),
        ),
        ({"prompt": [1, 2, 3]}, RequestShape(token_ids=3)),
        ({"prompt": [[1, 2], [3]]}, RequestShape(token_ids=3, prompts=2, skew=2 * (2**2 + 1) / 3**2)),
        ({"prompt": ["ab", "é"]}, RequestShape(text_bytes=4, prompts=2)),
        ({"prompt": "жизнь"}, RequestShape(text_bytes=10, script=2)),
        ({"prompt": "你好 vLLM, 世界和平"}, RequestShape(text_bytes=25, script=2)),
        ({"prompt": "你好"}, RequestShape(text_bytes=6, script=3)),
        ({"model": 7, "max_tokens": -1, "n": "x"}, RequestShape()),
        ({"messages": [{"content": [{"type": {}}, {"type": ["image_url"]}]}]}, RequestShape(text_bytes=9, messages=1)),
        ({"max_tokens": True, "max_completion_tokens": 5}, RequestShape(max_output=5)),
        ({"sampling_params": {"max_new_tokens": 9}, "text": "abc"}, RequestShape(max_output=9, text_bytes=3)),
        (
            chat({"type": "text", "text": "ab"}, image("http://x")),
            RequestShape("m", text_bytes=len("userabtext"), messages=1, images=1, reorders=True),
        ),
        (
            {"messages": [{"content": [{"type": "input_audio", "input_audio": {"data": "A" * 99}}]}]},
            RequestShape(messages=1, audios=1, audio_tokens=250, reorders=True),
        ),
        (
            {
                "messages": [
                    {
                        "content": [
                            {"type": "video_url", "video_url": {"url": "http://v"}},
                            {"type": "text", "text": "ab"},
                        ]
                    }
                ]
            },
            RequestShape(text_bytes=6, messages=1, videos=1, video_frames=32, video_tokens=4096, reorders=True),
        ),
    ],
)
def test_shapes_are_numbers_of_the_prompt(payload: dict[str, Any], shape: RequestShape) -> None:
    """Text, token ids, images and limits are found where engines take them from; nonsense counts as absent."""
    assert shape_of(payload, "completions") == shape
