"""Sans-I/O: what an engine's answer delivers, counted while it passes.

Rules: bytes go out unchanged, and no later than their event is complete. Two exceptions: the usage that only the
sidecar asked for is removed, and a usage gets its price if the client asked for it. llama.cpp puts its timings into the
usage event if there is one: they go back into the last choice, which waits for the event after it. Events are found by
their blank line; only a usage event is parsed. Memory is bounded.

An event counts as a token if it carries data and is neither `[DONE]`, nor usage only, nor the role that opens a chat.
A named event (Anthropic, OpenAI responses) counts if its name ends in `delta`, which names a piece of output.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

from msgspec import structs

from sidecar.events import Usage
from sidecar.relay.request_body import parse_object

# What ends an event. No form is a prefix of another, so chunking cannot matter.
_EVENT_END: Final = re.compile(rb"\n\r?\n|\r\r")
_LINES: Final = re.compile(rb"\r\n|\r|\n")
_USAGE_KEY: Final = b'"usage"'  # inside a JSON text the quotes would be escaped, so this is always a key
_TIMINGS_KEY: Final = b'"timings"'
_OPENING_ROLES: Final = (b'"role":"assistant","content":""', b'"role": "assistant", "content": ""')
_MAX_HELD_BYTES: Final = 64 << 10  # an incomplete event is held back up to this; usage events have below 4 KiB
_MAX_KEPT_BYTES: Final = 1 << 20  # of an event or body, kept to read its usage
# Events whose usage does not cover the output yet: Anthropic's, and those of the responses API.
_OPENING_EVENTS: Final = ("message_start", "response.created", "response.queued", "response.in_progress")
_PROMPT_KEYS: Final = ("prompt_tokens", "input_tokens")
_COMPLETION_KEYS: Final = ("completion_tokens", "output_tokens")
_decoder: Final = json.JSONDecoder()

Price = Callable[[Usage], int]  # milli-MU


class SSE:
    """One stream of server-sent events. `hide_usage`: remove the usage-only event; `price`: a usage's `mu_milli`."""

    def __init__(self, hide_usage: bool, price: Price | None = None) -> None:
        self._hide_usage = hide_usage
        self._price = price
        self._holds = hide_usage or price is not None  # events are released only when complete
        self._open = bytearray()  # the incomplete event; when it is longer than _MAX_KEPT_BYTES, only its end
        self._overlong = False
        self._held = 0  # bytes at the end of it that were not released
        self._first: bytes = b""
        self._last: bytes = b""
        self._name: bytes = b""  # of the event that is _last
        self._last_choice: bytes = b""  # an event that waits for the usage after it
        self.tokens = 0
        self.started = False  # generation has visibly begun
        self.done = False

    def feed(self, chunk: bytes) -> bytes:
        """Read bytes, count their tokens, and return what goes out now (perhaps nothing)."""
        is_calm = not self._open and not self._last_choice and not (self._hide_usage and _has_last_choice(chunk))
        if is_calm and (count := _count_plain_events(chunk)):
            self.tokens += count
            self.started = True
            return chunk
        return self._scan(chunk)

    def finish(self) -> bytes:
        """The stream ended: return what was held of an incomplete event."""
        rest = self.release() + self._unsent()
        self._open.clear()
        self._held = 0
        return rest

    def release(self) -> bytes:
        """The event that waits for the one after it."""
        event, self._last_choice = self._last_choice, b""
        return event

    @property
    def is_between_events(self) -> bool:
        """Whether what went out so far ends between two events, so that another may follow."""
        return len(self._open) == self._held

    @property
    def usage(self) -> Usage | None:
        """The usage of the last event that has one; what it lacks of the prompt comes from the first one.

        Unless it is that of the whole answer, its output is at least what was counted.
        """
        (_, first), (_, last) = _find_usage(self._first), _find_usage(self._last)
        usage = _parse_usage(last)
        if usage is None or not usage.prompt_tokens or _count_of(last, *_PROMPT_KEYS) is None:
            usage = _parse_usage({**first, **{name: value for name, value in last.items() if value}})
        if usage is None or usage.completion_tokens >= self.tokens or _is_final(self._name, self._last):
            return usage
        return structs.replace(usage, completion_tokens=self.tokens)

    def _scan(self, chunk: bytes) -> bytes:
        out: list[bytes | memoryview] = [] if self._holds else [chunk]
        fresh = max(0, len(self._open) - 2)  # no blank line ends before here
        self._open += chunk
        self._held += len(chunk) if self._holds else 0
        start = 0
        while match := _EVENT_END.search(self._open, max(start, fresh)):
            event = bytes(self._open[start : match.end()])
            unsent = self._held - (len(self._open) - match.end()) if self._held else 0
            is_hidden = self._count(event)
            if self._last_choice:
                out.append(_with_timings(self.release(), event) if is_hidden else self.release())
            if is_hidden:
                event = event[: len(event) - len(event.lstrip(b"\r\n"))]  # keep the blank lines before it
                unsent = min(unsent, len(event))
            elif self._hide_usage and unsent == len(event) and not event.startswith(b"event:"):
                event = _without_null_usage(event)
                unsent = len(event)
                if _has_last_choice(event):
                    self._last_choice, unsent = event, 0
            elif self._price is not None and unsent == len(event):
                if _USAGE_KEY in event and not _parse_event(event)[0]:  # OpenAI's events have no name
                    event = add_price(event, self._price)
                unsent = len(event)
            if unsent > 0:
                out.append(event[-unsent:])
            self._held = min(self._held, len(self._open) - match.end())
            start = match.end()
        del self._open[:start]
        if len(self._open) > _MAX_HELD_BYTES and self._held:  # too long to be held
            out.append(self._unsent())
            self._held = 0
        if len(self._open) > _MAX_KEPT_BYTES:  # longer than any usage: its beginning is dropped
            self._overlong = True
            del self._open[: len(self._open) - _MAX_KEPT_BYTES // 2]
        return out[0] if len(out) == 1 and isinstance(out[0], bytes) else b"".join(out)

    def _unsent(self) -> bytes:
        return bytes(self._open[len(self._open) - self._held :])

    def _count(self, event: bytes) -> bool:
        """Count one event. Returns whether to remove it."""
        if self._overlong or len(event) > _MAX_KEPT_BYTES:
            self._overlong = False
            self.tokens += 1
            return False
        name, data = _parse_event(event)
        if not data or data == b"[DONE]":
            self.done = self.done or bool(data)
            return False
        if _USAGE_KEY in data and usage_of(data) is not None:
            self._first = self._first or data
            self._last, self._name = data, name
            if _is_usage_only(data):
                return self._hide_usage and len(event) <= _MAX_HELD_BYTES
        output = _is_output(name, data)
        self.started = self.started or output or not name
        self.tokens += output
        return False


def error_event(error: dict[str, str], route: str) -> bytes:
    """The event that ends a stream with an error, in the form that the clients of `route` raise on.

    OpenAI's look for `error` in the data, Anthropic's for an event of that name, the responses API for both.
    """
    if route not in ("messages", "responses"):
        return b"data: %b\n\n" % json.dumps({"error": error}).encode()
    data = {"type": "error", "code": error["code"], "message": error["message"], "error": error}
    return b"event: error\ndata: %b\n\n" % json.dumps(data).encode()


def usage_of(text: bytes) -> Usage | None:
    """The last `usage` object in a JSON text that may lack its beginning; OpenAI's or Anthropic's names."""
    return _parse_usage(_find_usage(text)[1])


def add_price(text: bytes, price: Price) -> bytes:
    """`text` with `mu_milli` as first member of its last usage object, if there is one."""
    brace, found = _find_usage(text)
    usage = _parse_usage(found)
    if usage is None:
        return text
    return b'%b"mu_milli":%d,%b' % (text[: brace + 1], price(usage), text[brace + 1 :])


class BodyTail:
    """The end of a body that is no event stream, kept to read its usage."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, chunk: bytes) -> None:
        self._bytes += chunk
        if len(self._bytes) > 2 * _MAX_KEPT_BYTES:
            del self._bytes[:-_MAX_KEPT_BYTES]

    @property
    def usage(self) -> Usage | None:
        return usage_of(bytes(self._bytes))


def _find_usage(text: bytes) -> tuple[int, dict[str, Any]]:
    """The last `usage` object in a JSON text, after the index of its brace; (-1, {}) if there is none."""
    at = len(text)
    for _ in range(8):  # `"usage": null`, or a string that reads so
        if (at := text.rfind(_USAGE_KEY, 0, at)) < 0:
            break
        head = text[at + len(_USAGE_KEY) : at + len(_USAGE_KEY) + 16].lstrip()
        if head.startswith(b":") and head[1:].lstrip().startswith(b"{"):
            brace = text.index(b"{", at)
            try:
                return brace, _decoder.raw_decode(text[brace : brace + _MAX_HELD_BYTES].decode(errors="replace"))[0]
            except (ValueError, RecursionError):
                break
    return -1, {}


def _count_plain_events(chunk: bytes) -> int:
    """The number of events if the chunk is only complete one-line data events that are all output; else 0."""
    events = chunk.count(b"\n\n")
    plain = (
        chunk.endswith(b"\n\n")
        and chunk.count(b"\n") == 2 * events
        and chunk.startswith(b"data:")
        and chunk.count(b"\n\ndata:") == events - 1
        and _USAGE_KEY not in chunk
        and b"[DONE]" not in chunk
        and b"\r" not in chunk
        and _OPENING_ROLES[0] not in chunk
        and _OPENING_ROLES[1] not in chunk
        and b"data:\n" not in chunk
        and b"data: \n" not in chunk
    )
    return events if plain else 0


def _parse_event(event: bytes) -> tuple[bytes, bytes]:
    """(name, data) of an event. Several data lines are joined, as the standard requires."""
    name, data = b"", []
    for line in _LINES.split(event):
        if line.startswith(b"data:"):
            data.append(line[6:] if line.startswith(b"data: ") else line[5:])
        elif line.startswith(b"event:"):
            name = line[6:].strip()
    return name, b"\n".join(data)


def _is_output(name: bytes, data: bytes) -> bool:
    if name:
        return name.endswith(b"delta") and name != b"message_delta"  # Anthropic's, of a usage
    return not any(role in data for role in _OPENING_ROLES)


def _has_last_choice(text: bytes) -> bool:
    """Whether a choice ends in these events."""
    return b'"finish_reason":"' in text or b'"finish_reason": "' in text


def _without_null_usage(event: bytes) -> bytes:
    """An event without `"usage":null`, which OpenAI adds where the usage is asked for.

    A usage next to a choice stays: many engines send it unasked.
    """
    start, end = _find_member(event, _USAGE_KEY)
    if start < 0 or not event[start:end].endswith(b"null"):
        return event
    before, after = event[:start].rstrip(), event[end:].lstrip()
    if before.endswith(b","):
        return before[:-1] + event[end:]
    return event[:start] + after[1:].lstrip() if after.startswith(b",") else event[:start] + event[end:]


def _with_timings(choice: bytes, usage: bytes) -> bytes:
    """The event of the last choice with the `timings` of the usage event after it, where llama.cpp had put them."""
    start, end = _find_member(usage, _TIMINGS_KEY)
    at = choice.rfind(b"}")
    return choice if start < 0 or at < 0 else b"%b,%b%b" % (choice[:at], usage[start:end], choice[at:])


def _find_member(text: bytes, key: bytes) -> tuple[int, int]:
    """Where the last member of that name begins and ends; (-1, -1) without one. Long ones are not looked at."""
    at = text.rfind(key) if len(text) <= _MAX_HELD_BYTES else -1
    value = text[at + len(key) :].decode("latin-1")  # a character a byte
    colon = value.lstrip()
    if at < 0 or not colon.startswith(":"):
        return -1, -1
    try:
        begin = value.index(":") + 1
        begin += len(value) - begin - len(value[begin:].lstrip())
        return at, at + len(key) + _decoder.raw_decode(value, begin)[1]
    except (ValueError, RecursionError):
        return -1, -1


def _is_usage_only(data: bytes) -> bool:
    if len(data) > _MAX_HELD_BYTES:
        return False
    event = parse_object(data) or {}
    return event.get("choices") == [] and isinstance(event.get("usage"), dict)


def _is_final(name: bytes, data: bytes) -> bool:
    """Whether an event's usage covers the whole answer, not only what came so far."""
    event = parse_object(data)
    if event is None or (name.decode("latin-1") or event.get("type")) in _OPENING_EVENTS:
        return False
    choices = event.get("choices")
    return not isinstance(choices, list) or all(isinstance(c, dict) and c.get("finish_reason") for c in choices)


def _parse_usage(usage: dict[str, Any]) -> Usage | None:
    prompt, completion = _count_of(usage, *_PROMPT_KEYS), _count_of(usage, *_COMPLETION_KEYS)
    if prompt is None and completion is None:
        return None
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    within = _count_of(details, "cached_tokens") if isinstance(details, dict) else None
    cached = (_count_of(usage, "cache_read_input_tokens") if within is None else within) or 0
    # Anthropic's `input_tokens` leave out what was read from the cache or put into it; OpenAI's, with details, hold all
    whole = isinstance(details, dict) or "prompt_tokens" in usage
    beyond = 0 if whole else cached + (_count_of(usage, "cache_creation_input_tokens") or 0)
    return Usage((prompt or 0) + beyond, completion or 0, cached)


def _count_of(holder: dict[str, Any], *names: str) -> int | None:
    for name in names:
        value = holder.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31:
            return value
    return None
