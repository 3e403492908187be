"""Sans-I/O: what an engine's streamed answer delivers, counted while it passes.

Rules: bytes go out unchanged, and no later than their event is complete. Two exceptions: the usage that only the
sidecar asked for is removed, and a usage gets its price if the client asked for it. What engines put into the usage
event, if there is one, instead of the last choice (llama.cpp its timings, vLLM the fingerprint) goes back into that
choice, which waits for the event after it. Events are found by
their blank line, or their line feed (Ollama's lines of JSON); only events with usage or errors are parsed. Memory is
bounded.

An event counts as a token if it carries data and is neither `[DONE]`, nor usage only, nor the role that opens a chat.
A named event (Anthropic, OpenAI responses, Cohere) counts if its name ends in `delta`, which names a piece of output.
An error inside the stream is no token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Final

from msgspec import structs

from sidecar.events import Usage
from sidecar.load import answer_scan, usage_forms
from sidecar.load.answer_scan import AnswerScan, Members
from sidecar.load.usage_forms import ToldUsage, UsageMeter
from sidecar.relay.request_body import parse_object

# What ends an event. No form is a prefix of another, so chunking cannot matter.
_EVENT_END: Final = re.compile(rb"\n\r?\n|\r\r")
_LINE_END: Final = re.compile(rb"\n")
_LINES: Final = re.compile(rb"\r\n|\r|\n")
_USAGE_KEY: Final = b'"usage"'  # inside a JSON text the quotes would be escaped, so this is always a key
_TIMINGS_KEY: Final = b'"timings"'
_MOVED_KEYS: Final = (_TIMINGS_KEY, b'"system_fingerprint"')
_CHOICES_KEY: Final = b'"choices"'
# Members that report usage or an engine failure: an event without them is not parsed.
_TELLING: Final = (
    *(_USAGE_KEY, _TIMINGS_KEY, b'"meta_info"', b'"details"', b'"tokens_predicted"', b'eval_count"', b'"error"'),
    b'"ERROR',
)
_TYPE: Final = re.compile(rb'\s*\{\s*"type"\s*:\s*"([^"\\]{1,64})"')  # Cohere's events begin with their name
_FAILING_NAMES: Final = (b"error", b"response.failed")
_FAILED_LINE: Final = b"error:"  # older llama.cpp
# Choices without output: the role that opens a chat, and the end of one (llama.cpp, SGLang).
_EMPTY_CHOICES: Final = (
    *(b'"role":"assistant","content":""', b'"role": "assistant", "content": ""'),
    *(b'"role":"assistant","content":null', b'"role": "assistant", "content": null', b'"delta":{}', b'"delta": {}'),
)
_NO_CHOICES: Final = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_MAX_HELD_BYTES: Final = 64 << 10  # an incomplete event is held back up to this; usage events have below 4 KiB
_MAX_KEPT_BYTES: Final = 1 << 20  # of an event; a longer one is scanned in pieces
JSON_LINES: Final = ("application/x-ndjson", "application/jsonl", "application/x-jsonlines")
_decoder: Final = json.JSONDecoder()

Price = Callable[[Usage], int]  # milli-MU


class SSE:
    """One stream of server-sent events, or of lines of JSON (`is_lines`).

    `hide_usage`: remove the usage-only event; `price`: a usage's `mu_milli`; `choices`: sequences of each of the
    `prompts`.
    """

    def __init__(
        self,
        hide_usage: bool,
        price: Price | None = None,
        *,
        is_lines: bool = False,
        choices: int = 1,
        prompts: int = 1,
    ) -> None:
        self._hide_usage = hide_usage
        self._price = price
        self._holds = hide_usage or price is not None  # events are released only when complete
        self.is_lines = is_lines
        self._end = _LINE_END if is_lines else _EVENT_END
        self._open = bytearray()  # the incomplete event
        self._long: tuple[bytes, AnswerScan] | None = None  # one that is too long to be kept: its name, and its data
        self._held = 0  # bytes at the end of it that were not released
        self._meter = UsageMeter(choices, prompts)
        self._sequences = min(choices * prompts, usage_forms.MAX_SEQUENCES)
        self._ended: set[int] = set()  # the choices that have
        self._last: bytes = b""  # the data of the last event with a usage and choices
        self._running: bytes = b""  # the data of the last event with a running count, not read yet
        self._last_choice: bytes = b""  # an event that waits for the usage after it
        self.tokens = 0
        self.started = False  # generation has visibly begun
        self.done = False
        self.failed = False  # as reported by the engine

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
    def told(self) -> ToldUsage | None:
        """The usage reported by the engine so far."""
        if self._running:
            self._read(answer_scan.read(self._running), b"")
            self._running = b""
        told = self._meter.told
        is_final = told is None or not self._last or self._is_final(self._last)
        return told if is_final or told is None else structs.replace(told, final=False)

    def _is_final(self, data: bytes) -> bool:
        """Whether the usage of an event with choices covers the whole answer, not only what came so far."""
        choices = (parse_object(data) or {}).get("choices")
        if not isinstance(choices, list) or not choices:
            return True
        has_all = self._sequences == 1 or len(self._ended) >= self._sequences
        return has_all and all(isinstance(c, dict) and c.get("finish_reason") for c in choices)

    @property
    def has_ended(self) -> bool:
        """Whether the engine has said that the answer is complete, or why it is not."""
        told = self._meter.told
        return self.done or self.failed or bool(self._ended) or (told is not None and told.final)

    @property
    def usage(self) -> Usage | None:
        """The same as a usage: unless it covers the whole answer, its output is at least what was counted."""
        told = self.told
        return None if told is None else told.usage(counted=self.tokens)

    def _scan(self, chunk: bytes) -> bytes:
        out: list[bytes | memoryview] = [] if self._holds else [chunk]
        fresh = max(0, len(self._open) - 2)  # no blank line ends before here
        self._open += chunk
        self._held += len(chunk) if self._holds else 0
        start = 0
        while match := self._end.search(self._open, max(start, fresh)):
            event = bytes(self._open[start : match.end()])
            unsent = self._held - (len(self._open) - match.end()) if self._held else 0
            is_hidden = self._count(event)
            if self._last_choice:
                out.append(_with_moved(self.release(), event) if is_hidden else self.release())
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
        if len(self._open) > _MAX_KEPT_BYTES:
            self._look_at_long(bytes(self._open[:-2]))  # its end may have begun
            del self._open[:-2]
        return out[0] if len(out) == 1 and isinstance(out[0], bytes) else b"".join(out)

    def _unsent(self) -> bytes:
        return bytes(self._open[len(self._open) - self._held :])

    def _look_at_long(self, piece: bytes) -> None:
        """A piece of an event that is too long to be kept. Its data is assumed to be one line of JSON."""
        if self._long is None:
            name, _ = (b"", b"") if self.is_lines else _parse_event(piece)
            self._long = name, AnswerScan()
            piece = piece[max(0, piece.find(b"{")) :]
        self._long[1].feed(piece)

    def _count(self, event: bytes) -> bool:
        """Count one event. Returns whether to remove it."""
        if self._long is not None or len(event) > _MAX_KEPT_BYTES:
            self._look_at_long(event)
            self._count_long()
            return False
        name, data = (b"", event.strip()) if self.is_lines else _parse_event(event)
        if not data or data in (b"[DONE]", b"null"):  # llama.cpp opens a stream of several prompts by null
            self.done = self.done or data == b"[DONE]"
            self.failed = self.failed or (not data and event.startswith(_FAILED_LINE))
            return False
        if not name and (match := _TYPE.match(data)):
            name = match[1]
        if _has_last_choice(data):
            self._end_choices(data)
        tells, is_delta = False, name.endswith(b"delta") and name != b"message_delta"
        if _is_running(data):
            self._running = data
        elif not is_delta and (any(map(data.__contains__, _TELLING)) or name in _FAILING_NAMES):
            tells, has_failed = self._read(answer_scan.read(data), name)
            if has_failed:
                return False
        if tells:
            self._running = b""
            self._last = data if _CHOICES_KEY in data else b""
            if self._last and _is_usage_only(data):
                return self._hide_usage and len(event) <= _MAX_HELD_BYTES
        output = _is_output(name, data) and not (self.is_lines and tells)
        self.started = self.started or output or not name
        self.tokens += output
        return False

    def _end_choices(self, data: bytes) -> None:
        """Choices end in an event."""
        choices = (parse_object(data) or {}).get("choices")
        ended = (
            [c for c in choices if isinstance(c, dict) and c.get("finish_reason")] if isinstance(choices, list) else []
        )
        for choice in ended:
            if isinstance(index := choice.get("index", 0), int) and len(self._ended) < self._sequences:
                self._ended.add(index)
        self.failed = self.failed or (bool(ended) and usage_forms.has_failed_choice(data))

    def _count_long(self) -> None:
        assert self._long is not None
        (name, scan), self._long = self._long, None
        tells, has_failed = self._read(scan.items(), name)
        self._last = b"" if tells else self._last
        if has_failed:
            return
        output = _is_output(name, b"")
        self.started = self.started or output or not name
        self.tokens += output

    def _read(self, items: list[Members], name: bytes) -> tuple[bool, bool]:
        """Whether an event reports a usage, and whether it reports a failure."""
        kind = name.decode("latin-1")
        tells = [self._meter.take(members, kind) for members in items]
        has_failed = any(usage_forms.has_failed(members, kind) for members in items or [{}])
        self.failed = self.failed or has_failed
        return any(tells), has_failed


def error_event(error: dict[str, str], route: str, *, is_line: bool = False) -> bytes:
    """The event that ends a stream with an error, in the form that the clients of `route` raise on.

    OpenAI's look for `error` in the data, Anthropic's for an event of that name, the responses API for both.
    """
    if is_line:  # Ollama's
        return b"%b\n" % json.dumps({"error": error["message"]}).encode()
    if route not in ("messages", "responses"):
        return b"data: %b\n\n" % json.dumps({"error": error}).encode()
    data = {"type": "error", "code": error["code"], "message": error["message"], "error": error}
    return b"event: error\ndata: %b\n\n" % json.dumps(data).encode()


def add_price(text: bytes, price: Price) -> bytes:
    """A body or an event, with `mu_milli` as first member of its usage, if it has one."""
    begin = text.find(b"{") if text.startswith(b"data:") else 0
    told = usage_forms.read(answer_scan.read(text[begin:]))
    brace = -1 if told is None else begin + answer_scan.start_of(text[begin:], "usage")
    if told is None or brace < begin or text[brace : brace + 1] != b"{":
        return text
    return b'%b"mu_milli":%d,%b' % (text[: brace + 1], price(told.usage()), text[brace + 1 :])


def _count_plain_events(chunk: bytes) -> int:
    """The number of events if the chunk is only complete one-line data events that are all output; else 0."""
    events = chunk.count(b"\n\n")
    plain = (
        chunk.endswith(b"\n\n")
        and chunk.count(b"\n") == 2 * events
        and chunk.startswith(b"data:")
        and chunk.count(b"\n\ndata:") == events - 1
        and chunk.count(_CHOICES_KEY) == events  # so none is `[DONE]`, an error, or in the form of another API
        and _USAGE_KEY not in chunk
        and b"\r" not in chunk
        and b'"role"' not in chunk
        and b"{}" not in chunk
        and not _has_last_choice(chunk)
    )
    return events if plain else 0


def _parse_event(event: bytes) -> tuple[bytes, bytes]:
    """(name, data) of an event. Several data lines are joined, as the standard requires."""
    if event.startswith(b"data:") and event.find(b"\n") == len(event) - 2 and b"\r" not in event:
        return b"", event[6:-2] if event.startswith(b"data: ") else event[5:-2]
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
    if _CHOICES_KEY in data:
        return not any(empty in data for empty in _EMPTY_CHOICES)
    return b'"stop":true' not in data  # the end of a completion of llama.cpp


def _is_running(data: bytes) -> bool:
    """Whether an event of SGLang has counts that the next one repeats: so not all need to be parsed."""
    return (
        b'"meta_info"' in data
        and (b'"finish_reason":null' in data or b'"finish_reason": null' in data)
        and b'"index"' not in data  # with several prompts, each event belongs to one
    )


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


def _with_moved(choice: bytes, usage: bytes) -> bytes:
    """The event of the last choice with those members of the usage event after it that would else stand in it."""
    for key in _MOVED_KEYS:
        start, end = _find_member(usage, key)
        at = choice.rfind(b"}")
        if start >= 0 and at >= 0 and key not in choice:
            choice = b"%b,%b%b" % (choice[:at], usage[start:end], choice[at:])
    return choice


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
    if len(data) > _MAX_HELD_BYTES or not _NO_CHOICES.search(data):
        return False
    event = parse_object(data) or {}
    return event.get("choices") == [] and isinstance(event.get("usage"), dict)
