"""Pure: what one pass over a body finds: how much text and media, where its images stand, what its options say.

Rules: the bytes are gone over once, by the compiled scanner (kernels/csrc/body_scan.hpp), which checks them and keeps
numbers and positions. Only options are parsed, and of those only short ones: a longer one counts as set to something
unknown (TOO_LONG); of a long model name the beginning is read, and of a long object that holds options its members.
Where the module was not built, bodies up to MAX_PYTHON_BYTES are read in Python, with the same result (python_scan.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from sidecar.load import python_scan
from sidecar.load.found import Found, FoundPart, Items, PromptTexts, Span
from sidecar.load.request_keys import HELD_KEYS, HELD_LISTS, HOLDERS, LIST_HOLDERS, OPTION_KEYS, PROMPT_KEYS

try:
    from sidecar.kernels import _fused  # type: ignore[attr-defined]  # compiled, so it has no types
except ImportError:
    _fused = None

Buffer = bytes | memoryview | bytearray

# A JSON schema of a tool or an answer may be longer: then it is set, which is all that is asked of it.
MAX_OPTION_BYTES: Final = 1024
MAX_OPTIONS_BYTES: Final = 4096  # all of a body; those of a long holder: MAX_OPTION_BYTES
MAX_PYTHON_BYTES: Final = 8 << 10  # json.loads and the walk take 4.5 ms for them at worst
TOO_LONG: Final = object()  # the value of an option that was not parsed
_NAMES: Final = tuple(dict.fromkeys((*PROMPT_KEYS, *HELD_KEYS, *OPTION_KEYS)))
_ITEM_NAMES: Final = len({*PROMPT_KEYS, *HELD_KEYS})  # the first of them, whose items are counted
_decode: Final = msgspec.json.Decoder(dict[str, Any]).decode  # ten times as fast as `json`
_OPTIONS: Final = frozenset(OPTION_KEYS)
_WANTED: Final = _fused.wanted(PROMPT_KEYS, _NAMES[len(PROMPT_KEYS) :]) if _fused is not None else None


@dataclass(slots=True)
class BodyScan:
    """A body that is a JSON object."""

    found: Found
    options: Mapping[str, Any]


def scan(body: Buffer) -> BodyScan | None:
    """None if the body is no JSON object, too deep for engines' parsers, or too long to be read without the module."""
    found = find(body)
    if found is None:
        return None
    if held := _held_lists(body, found):
        found.items = {**found.items, **held}
    try:
        return BodyScan(found, _read_options(body, found.members))
    except RecursionError:
        return None


def _held_lists(body: Buffer, found: Found) -> dict[str, Items]:
    """The items of lists that stand in an object: vLLM's documents of any media, TEI's sentences."""
    held = {}
    for name in LIST_HOLDERS:
        if name not in found.items or name not in found.members or body[found.members[name][0]] != ord("{"):
            continue
        inside = find(memoryview(body)[slice(*found.members[name])])
        lists = [] if inside is None else [inside.items[key] for key in HELD_LISTS if key in inside.items]
        if lists and (longest := max(lists, key=lambda items: items.number)).number:
            held[name] = longest._replace(weight=found.items[name].weight)
    return held


def is_compiled() -> bool:
    """Whether the module was built; without it, long bodies are left unread."""
    return _fused is not None


def find(body: Buffer) -> Found | None:
    """Sizes and positions alone."""
    return _by_module(body) if _fused is not None else find_in_python(body)


def find_in_python(body: Buffer) -> Found | None:
    """The same without the compiled module."""
    return python_scan.find(bytes(body), _NAMES) if len(body) <= MAX_PYTHON_BYTES else None


def inside_of(body: Buffer, start: int, end: int) -> bytes:
    """The text of a string that was found, in UTF-8."""
    view = memoryview(body)[start:end]
    if _fused is not None:
        return bytes(_fused.unescape(view))
    text: str = json.loads(b'"%b"' % bytes(view))
    return text.encode(errors="replace")


def prompt_text(source: Buffer, start: int, end: int, printed: bool) -> str:
    """A text of PromptTexts."""
    raw = bytes(memoryview(source)[start:end])
    if not printed:
        return str(json.loads(b'"%b"' % raw))
    try:
        return python_scan.reprinted(raw)
    except RecursionError:
        return raw.decode(errors="replace")


def lenient(raw: bytes) -> str:
    """A piece of a string's inside, which may be cut anywhere, as text."""
    start = next((n for n in range(min(4, len(raw))) if raw[n] & 0xC0 != 0x80), 0)
    for end in range(len(raw), max(start, len(raw) - 12), -1):
        try:
            return str(json.loads(b'"%b"' % raw[start:end]))
        except ValueError:
            continue
    return raw.decode(errors="replace")


def _by_module(body: Buffer) -> Found | None:
    found: Any = _fused.scan_body(_WANTED, body)
    if found is None:
        return None
    numbers, (members, items, parts, source_count, sources, texts) = found
    flat = memoryview(members).cast("Q").tolist()
    counts = iter(memoryview(items).cast("Q").tolist())
    fields: list[Any] = [
        *numbers,
        {_NAMES[n]: (start, end) for n, start, end in zip(flat[::3], flat[1::3], flat[2::3], strict=True)},
        {
            _NAMES[n]: Items(count, bool(integers), lists, weight, squares)
            for n, count, integers, lists, weight, squares in zip(*[counts] * 6, strict=True)
            if n < _ITEM_NAMES
        },
        _parts(parts),
        source_count,
        None if sources is None else _parts(sources),
        None if texts is None else PromptTexts(body, memoryview(texts).cast("Q")),
    ]
    return Found(*fields)


def _parts(packed: bytes) -> tuple[FoundPart, ...]:
    if not packed:
        return ()
    flat = iter(memoryview(packed).cast("Q").tolist())
    return tuple(
        FoundPart(kind, item, part, start, (url, end), bool(escaped), bool(link), bool(named))
        for kind, item, part, start, url, end, escaped, link, named in zip(*[flat] * 9, strict=True)
    )


def _read_options(body: Buffer, members: Mapping[str, Span], *, nested: bool = False) -> dict[str, Any]:
    """The values of the options that are there. Raises RecursionError."""
    texts, left, long = [], MAX_OPTION_BYTES if nested else MAX_OPTIONS_BYTES, {}
    for name, (start, end) in members.items():
        if name not in _OPTIONS:
            continue
        if end - start <= min(left, MAX_OPTION_BYTES):
            texts.append(b'"%b":%b' % (name.encode(), bytes(body[start:end])))
            left -= end - start
        else:
            long[name] = _long_option(name, memoryview(body)[start:end], nested)
    options = _parse(b"{%b}" % b",".join(texts))
    return {**options, **long} if long else options


def _parse(text: bytes) -> dict[str, Any]:
    """An object that was checked by the scanner; `json` also accepts NaN and lone surrogates."""
    try:
        return _decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        parsed: dict[str, Any] = json.loads(text)
        return parsed


def _long_option(name: str, value: memoryview, nested: bool) -> Any:
    if name == "model" and value[0] == ord('"'):
        return lenient(bytes(value[1:MAX_OPTION_BYTES]))
    if name in HOLDERS and value[0] == ord("{") and not nested:
        found = find(value)
        return TOO_LONG if found is None else _read_options(value, found.members, nested=True)
    return TOO_LONG
