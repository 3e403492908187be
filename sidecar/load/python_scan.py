"""Pure: what the compiled scanner finds, found with `json`, for short bodies where that was not built.

Rule: the place of a string in the body decides whether it is text or media, as in engines. Its content never does, so
no text can pass for something else. A key that is repeated holds its last value, as in engines' parsers; one that
nothing is known of counts each time that it is there, because only that can be said without remembering all keys.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from json.decoder import scanstring  # type: ignore[attr-defined]
from json.encoder import encode_basestring
from typing import Any, Final

from sidecar.load.found import (
    BYTES_PER_ID,
    MAX_PARTS,
    MAX_TEXTS,
    PART_LISTS,
    Found,
    FoundPart,
    Items,
    PromptTexts,
    Span,
)
from sidecar.load.request_keys import (
    AUDIO_TYPES,
    BINARY_KEYS,
    HELD_KEYS,
    IMAGE_TYPES,
    IMAGES_KEYS,
    MEDIA_TYPES,
    PRINTED_KEYS,
    PRINTED_PROMPT_KEYS,
    PROMPT_KEYS,
    SEALED_KEYS,
    TEXT_KEYS,
    VIDEO_TYPES,
)

_BOM: Final = b"\xef\xbb\xbf"
_BLANKS: Final = " \t\n\r"
_ASCII_BLANKS: Final = " \t\n\r\v\f\x1c\x1d\x1e\x1f"
_LINK: Final = ("http://", "https://")
_MAX_HEAD: Final = 136  # of a data URL, up to its base64 text
_BASE64_MARK: Final = ";base64,"
_LAST_COUNTS: Final = frozenset((*MEDIA_TYPES, *TEXT_KEYS, *BINARY_KEYS, *PRINTED_KEYS, *IMAGES_KEYS, "input"))

Leaf = str | list[float] | dict[str, Any]


class Again(str):
    """A key that is repeated later in its object."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


class Written(float):
    """A number with a fraction or an exponent, as it is written."""

    def __new__(cls, text: str) -> Written:
        made = super().__new__(cls, text)
        made.text = text
        return made

    text: str

    def __bool__(self) -> bool:
        return not set(self.text.lower().partition("e")[0]) <= set("-0.")


class _Raw(str):
    __slots__ = ()


def find(body: bytes, names: Sequence[str]) -> Found | None:
    """None if the body is no JSON object. `names`: the members whose places are wanted."""
    try:
        text = body.removeprefix(_BOM).decode("utf-8", "surrogatepass")
        at = _blank(text, 0)
        payload, end = _read(text, at)
    except (ValueError, RecursionError, StopIteration):
        return None
    if not isinstance(payload, dict) or _blank(text, end) != len(text):
        return None
    return _found(body, text, at, payload, names)


def _found(body: bytes, text: str, at: int, payload: dict[str, Any], names: Sequence[str]) -> Found:
    shift = len(_BOM) if body.startswith(_BOM) else 0

    def place(index: int) -> int:
        return shift + (index if text.isascii() else len(text[:index].encode("utf-8", "surrogatepass")))

    spans = {key: (start, end) for key, _, start, end in _members(text, at)}
    texts: list[str] = []
    token_ids = 0
    media: Counter[str] = Counter()
    fetches = False
    leaves_of: dict[str, list[Leaf]] = {
        key: list(prompt_leaves(key, payload[key])) for key in PROMPT_KEYS if key in payload
    }
    for value in chain.from_iterable(leaves_of.values()):
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, list):
            token_ids += len(value)
        else:
            media[value["type"]] += 1
            fetches = fetches or _is_fetched(value)
    tools = _tools(payload)
    functions = [tool.get("function") for tool in tools if isinstance(tool, dict)]
    strict = (holder.get("strict") for holder in (*tools, *functions) if isinstance(holder, dict))
    messages, sources = payload.get("messages"), payload.get("images")
    parts = list(_image_parts(text, spans, place))
    listed = sources if isinstance(sources, list) else []
    return Found(
        text_bytes=sum(len(item.encode(errors="replace")) for item in texts),
        characters=sum(map(len, texts)),
        token_ids=token_ids,
        images=sum(media[kind] for kind in IMAGE_TYPES),
        audios=sum(media[kind] for kind in AUDIO_TYPES),
        videos=sum(media[kind] for kind in VIDEO_TYPES),
        fetches=fetches,
        messages=len(messages) if isinstance(messages, list) else 0,
        offers_tools=bool(tools),
        is_strict=any(value is True for value in strict),
        image_parts=sum(not part.is_link for part in parts),
        link_parts=sum(part.is_link for part in parts),
        members={name: (place(spans[name][0]), place(spans[name][1])) for name in names if name in spans},
        items=dict(_items_of(payload, leaves_of)),
        parts=tuple(parts[:MAX_PARTS]),
        source_count=len(listed),
        sources=_sources(text, spans["images"][0], place)
        if isinstance(sources, list) and all(isinstance(item, str) for item in sources)
        else None,
        texts=_prompt_texts(texts),
    )


# --- sums ---


def prompt_leaves(key: str, value: Any) -> Iterator[Leaf]:
    """Those of a member of a body that holds a prompt. Documents have texts under any name."""
    if key in PRINTED_PROMPT_KEYS:
        return iter([printed(value)])
    return leaves([value], binary=frozenset() if key == "documents" else BINARY_KEYS | SEALED_KEYS)


def leaves(stack: list[Any], binary: frozenset[str] = BINARY_KEYS | SEALED_KEYS) -> Iterator[Leaf]:
    """The texts, lists of token ids, and media parts below the values of `stack`, which is consumed from its end.

    `binary`: keys of values that are no text.
    """
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield [item for item in value if isinstance(item, (int, float))]  # engines accept 7.0 and true as token ids
            stack.extend(item for item in value if not isinstance(item, (int, float)))
        elif isinstance(value, dict):
            kind = value.get("type")
            if isinstance(kind, str) and kind in MEDIA_TYPES:
                yield value
                stack.extend(value[key] for key in TEXT_KEYS if key in value)
                continue
            for key, item in value.items():
                if isinstance(key, Again) and (str(key) in _LAST_COUNTS or (binary and str(key) in SEALED_KEYS)):
                    continue
                if key in PRINTED_KEYS or (key == "input" and kind == "tool_use"):
                    yield printed(item)
                elif key in MEDIA_TYPES:
                    if item:
                        yield {"type": key}
                elif key in IMAGES_KEYS:
                    yield from [{"type": "image"}] * len(item) if isinstance(item, list) else ()
                elif key not in binary or (kind == "text" and key not in SEALED_KEYS):
                    stack.append(item)


def _items_of(payload: Mapping[str, Any], leaves_of: Mapping[str, list[Leaf]]) -> Iterator[tuple[str, Items]]:
    """The sums over the items of each member."""
    for key in dict.fromkeys((*PROMPT_KEYS, *HELD_KEYS)):
        value = payload.get(key)
        binary = frozenset[str]() if key == "documents" else BINARY_KEYS | SEALED_KEYS
        items = value if isinstance(value, list) else []
        if isinstance(value, dict) and key == "questions":
            items = list(value.values())
        weights = [_weight(leaves([item], binary)) for item in items if not isinstance(item, (int, float))]
        whole = _weight(leaves_of[key] if key in leaves_of else leaves([value]))
        if items or whole:
            integers, lists = (
                any(isinstance(item, (int, float)) for item in items),
                sum(isinstance(item, list) for item in items),
            )
            yield key, Items(len(items), integers, lists, whole, sum(weight * weight for weight in weights))


def _weight(found: Iterable[Leaf]) -> int:
    """What texts and token ids weigh, in bytes of text."""
    return sum(
        len(leaf.encode(errors="replace")) if isinstance(leaf, str) else BYTES_PER_ID * len(leaf)
        for leaf in found
        if not isinstance(leaf, dict)
    )


def reprinted(raw: bytes) -> str:
    """A JSON value as engines print it. Raises RecursionError."""
    return printed(_DECODER.decode(raw.decode("utf-8", "surrogatepass")))


def printed(value: Any) -> str:
    """A value as engines print it into a prompt: a text as it is, anything else as JSON; nothing for null."""
    if value is None or isinstance(value, str):
        return value or ""
    pieces: list[str] = []
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, _Raw):
            pieces.append(item)
        elif isinstance(item, str):
            pieces.append(encode_basestring(item))
        elif isinstance(item, (list, dict)):
            stack += reversed(list(_pieces(item)))
        else:
            pieces.append(item.text if isinstance(item, Written) else json.dumps(item))
    return "".join(pieces)


def _pieces(value: list[Any] | dict[str, Any]) -> Iterator[Any]:
    is_list = isinstance(value, list)
    yield _Raw("[" if is_list else "{")
    for n, item in enumerate(value):
        if n:
            yield _Raw(",")
        if isinstance(value, dict):
            yield _Raw(encode_basestring(item) + ":")
            yield value[item]
        else:
            yield item
    yield _Raw("]" if is_list else "}")


def _tools(payload: dict[str, Any]) -> list[Any]:
    """The tools that a request offers; SGLang takes them from messages, too."""
    messages = payload.get("messages")
    inner = [item for item in messages if isinstance(item, dict)] if isinstance(messages, list) else []
    offers = (holder.get(name) for holder in (payload, *inner) for name in ("tools", "functions"))
    return [tool for offer in offers if isinstance(offer, list) for tool in offer]


def _is_fetched(part: dict[str, Any]) -> bool:
    """Whether the engine fetches a media part from a link."""
    sources = (part.get(key) for key in (*MEDIA_TYPES, "url"))
    urls = (source.get("url") if isinstance(source, dict) else source for source in sources)
    return any(isinstance(url, str) and url[:8].lower().startswith(_LINK) for url in urls)


def _prompt_texts(texts: list[str]) -> PromptTexts | None:
    source, places = bytearray(), list[int]()
    for text in filter(None, texts):
        start = len(source)
        source += encode_basestring(text)[1:-1].encode("utf-8", "surrogatepass")
        places += (start, len(source), 0)
    return PromptTexts(source, places) if len(places) <= 3 * MAX_TEXTS else None


# --- places ---


def _image_parts(text: str, spans: Mapping[str, Span], place: Callable[[int], int]) -> Iterator[FoundPart]:
    """The images in parts of `messages` (chat) and `input` (responses): base64 data URLs, and links."""
    for n, name in enumerate(PART_LISTS[:2]):
        for i, message in enumerate(_items(text, spans[name][0]) if name in spans else ()):
            content = _last(text, message).get("content")
            for j, part in enumerate(_items(text, content) if content is not None else ()):
                members = _last(text, part)
                if "type" in members and _read(text, members["type"])[0] in ("image_url", "input_image"):
                    url = members.get("image_url")
                    if url is not None and text[url] == "{":
                        url = _last(text, url).get("url")
                    if url is not None and text[url] == '"':
                        found = _part(text, (n, i, j), part, url, place, is_named="uuid" in members)
                        if found is not None:
                            yield found


def _part(
    text: str, where: tuple[int, int, int], start: int, url: int, place: Callable[[int], int], *, is_named: bool
) -> FoundPart | None:
    string, end = scanstring(text, url + 1, True)
    is_link = _is_link(string)
    if not is_link and not _is_image(string):
        return None
    span = (place(url + 1), place(end - 1))
    return FoundPart(*where, place(start), span, "\\" in text[url:end], is_link, is_named)


def _sources(text: str, start: int, place: Callable[[int], int]) -> tuple[FoundPart, ...]:
    found = []
    for n, at in enumerate(_items(text, start)):
        string, end = scanstring(text, at + 1, True)
        span = (place(at + 1), place(end - 1))
        found.append(FoundPart(2, n, 0, 0, span, "\\" in text[at:end], _is_link(string), False))
    return tuple(found[:MAX_PARTS])


def _is_link(text: str) -> bool:
    """As url_policy.is_link has it."""
    head = text.lstrip()[:6].lower()
    return head.startswith(("http:", "https:"))


def _is_image(text: str) -> bool:
    """Whether it is a base64 data URL of an image."""
    head = text[:_MAX_HEAD]
    media_type, mark, _ = head[len("data:") :].partition(_BASE64_MARK)
    return bool(mark) and head.startswith("data:") and media_type.lstrip(_ASCII_BLANKS).lower().startswith("image/")


def _last(text: str, at: int) -> dict[str, int]:
    """Where the values of an object begin, by key; nothing if there is no object at `at`."""
    return {key: start for key, _, start, _ in _members(text, at)} if text[at] == "{" else {}


def _members(text: str, at: int) -> Iterator[tuple[str, Any, int, int]]:
    """Key, value, its start and its end of each member of the object at `at`, which is known to be valid."""
    at = _blank(text, at + 1)
    while text[at] != "}":
        at = _blank(text, at + 1) if text[at] == "," else at
        key, at = scanstring(text, at + 1, True)
        at = _blank(text, _blank(text, at) + 1)
        value, end = _read(text, at)
        yield key, value, at, end
        at = _blank(text, end)


def _items(text: str, at: int) -> Iterator[int]:
    """Where the items of the list at `at` begin; nothing if there is no list."""
    if text[at] != "[":
        return
    at = _blank(text, at + 1)
    while text[at] != "]":
        at = _blank(text, at + 1) if text[at] == "," else at
        yield at
        at = _blank(text, _read(text, at)[1])


def _blank(text: str, at: int) -> int:
    while at < len(text) and text[at] in _BLANKS:
        at += 1
    return at


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    last = {key: n for n, (key, _) in enumerate(pairs)}
    return {key if last[key] == n else Again(key): value for n, (key, value) in enumerate(pairs)}


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object, parse_float=Written)
# (text, start) -> (value, end); raises ValueError, StopIteration, RecursionError
_read: Final[Callable[[str, int], tuple[Any, int]]] = _DECODER.scan_once  # type: ignore[attr-defined]
