"""Pure: the usage that engines report in answers, in the form of each API.

Rules:
- The form follows from the answer, not the path: SGLang and TGI share `/generate`, llama.cpp has two for completions.
- `prompt` is all of it. Anthropic's `input_tokens` leave out what came from the cache or went into it (vLLM and SGLang
  do the same), everyone else's counts hold the cached part.
- The first event of a stream does not cover its output. Until a usage covers the whole answer, the larger of reported
  and counted tokens applies. Parts that were not reported are estimated.
- An answer may be of several sequences: of one prompt each (a list), or of several choices of one prompt.

vLLM 0.32: entrypoints/openai/engine/protocol.py, entrypoints/cohere/protocol.py. SGLang 0.5: `meta_info` in
srt/managers/tokenizer_manager.py, summed as in srt/entrypoints/openai/usage_processor.py. TGI 3: router/src/lib.rs
(Details, StreamDetails), counts of whole answers in header fields: router/src/server.rs. llama.cpp b10434:
tools/server/server-task.cpp; `tokens_cached` there is all that its slot holds, not what came from the cache. Ollama:
api/types.go (Metrics). Cohere v2: `usage.tokens` is what was processed, `billed_units` less.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from sidecar.events import RequestSize, Usage
from sidecar.load import answer_scan
from sidecar.load.answer_scan import Buffer, Members
from sidecar.load.cost_model import with_audio_seconds

MAX_SEQUENCES: Final = 1 << 12  # of one stream, whose running counts are kept
MAX_COUNT: Final = 1 << 31
NOTHING: Final = RequestSize(uncached=0)


Path = tuple[str, ...]  # names from the holder down


def _paths(*texts: str) -> tuple[Path, ...]:
    """Paths as the table writes them: "tokens.input_tokens"."""
    return tuple(tuple(text.split(".")) if text else () for text in texts)


@dataclass(frozen=True, slots=True)
class UsageForm:
    """Where one form of usage is found: `holder` is the member that has it, "" the top.

    The other fields are paths below the holder; the first valid count is used. `beyond`: parts of the prompt that
    its count leaves out, unless `total_tokens` shows that it has them.
    """

    name: str
    holder: str
    prompt: tuple[Path, ...] = ()
    output: tuple[Path, ...] = ()
    cached: tuple[Path, ...] = ()
    beyond: tuple[Path, ...] = ()
    seconds: tuple[Path, ...] = ()
    lacks: frozenset[str] = frozenset()  # it is another form where one of these is there


_DETAILS: Final = ("prompt_tokens_details", "input_tokens_details", "input_token_details")
_CACHED: Final = tuple(f"{details}.cached_tokens" for details in _DETAILS)
_WRITTEN: Final = "cache_creation_input_tokens"
_READ: Final = "cache_read_input_tokens"

# The first matching form is used. A `usage` in an event's `response`, `message` or `delta` is lifted to the top.
FORMS: Final = (
    UsageForm(
        "anthropic",
        "usage",
        prompt=_paths("input_tokens"),
        output=_paths("output_tokens"),
        cached=_paths(_READ),
        beyond=_paths(_READ, _WRITTEN),
        lacks=frozenset((*_DETAILS, "prompt_tokens", "type")),
    ),
    UsageForm(
        "openai",
        "usage",
        prompt=_paths("prompt_tokens", "input_tokens"),
        output=_paths("completion_tokens", "output_tokens"),
        cached=_paths(*_CACHED, "prompt_cache_hit_tokens", _READ),
        seconds=_paths("prompt_audio_seconds"),
    ),
    UsageForm(
        "cohere",
        "usage",
        prompt=_paths("tokens.input_tokens", "billed_units.input_tokens"),
        output=_paths("tokens.output_tokens", "billed_units.output_tokens"),
        cached=_paths("cached_tokens", "tokens.cached_tokens"),
    ),
    UsageForm("duration", "usage", seconds=_paths("seconds")),
    UsageForm("ranking", "usage", prompt=_paths("total_tokens")),
    UsageForm("cohere ranking", "meta", prompt=_paths("tokens.input_tokens"), output=_paths("tokens.output_tokens")),
    UsageForm(
        "cohere bill",
        "meta",
        prompt=_paths("billed_units.input_tokens"),
        output=_paths("billed_units.output_tokens"),
        beyond=_paths("billed_units.image_tokens"),
    ),
    UsageForm(
        "sglang",
        "meta_info",
        prompt=_paths("prompt_tokens"),
        output=_paths("completion_tokens"),
        cached=_paths("cached_tokens"),
    ),
    UsageForm("tgi", "details", prompt=_paths("input_length"), output=_paths("generated_tokens")),
    UsageForm(
        "llama.cpp",
        "",
        prompt=_paths("tokens_evaluated"),
        output=_paths("tokens_predicted"),
        cached=_paths("timings.cache_n"),
    ),
    UsageForm(
        "llama.cpp timings",
        "timings",
        prompt=_paths("prompt_n"),
        output=_paths("predicted_n"),
        cached=_paths("cache_n"),
        beyond=_paths("cache_n"),
    ),
    UsageForm("ollama", "", prompt=_paths("prompt_eval_count"), output=_paths("eval_count")),
    UsageForm("verbose transcription", "", seconds=_paths("duration")),
)
# Header fields of whole answers that report it if the body does not: TGI's, Text Embeddings Inference's.
HEADER_PROMPTS: Final = (b"x-prompt-tokens", b"x-compute-tokens")
HEADER_OUTPUT: Final = b"x-generated-tokens"
# vLLM's vectors as bytes: the rest of their answer, as JSON.
HEADER_ANSWER: Final = b"metadata"

# Events whose usage does not cover the output yet: Anthropic's, and those of the responses API.
_OPENING_EVENTS: Final = frozenset(("message_start", "response.created", "response.queued", "response.in_progress"))
_FAILED_EVENTS: Final = frozenset(("error", "response.failed"))
# Of a choice: vLLM's FinishReason, SGLang's.
_FAILED_END: Final = re.compile(rb'"finish_reason"\s*:\s*"(?:error|abort)"')
_TIMED_CACHE, _TIMED_PROMPT = _paths("timings.cache_n"), _paths("timings.prompt_n")
_TOTAL: Final = _paths("total_tokens")
_HOLDERS: Final = ("response", "message", "delta")  # of a usage in an event


class ToldUsage(msgspec.Struct, frozen=True, gc=False):
    """The usage an engine reported; None: not reported. `final`: the numbers cover the whole answer."""

    prompt: int | None = None
    output: int | None = None
    cached: int | None = None
    seconds: float | None = None
    final: bool = True

    def usage(self, expected: RequestSize = NOTHING, counted: int = 0) -> Usage:
        """The usage to record: parts that were not reported come from `expected` and `counted`."""
        if self.seconds and expected.audio_seconds:
            expected = with_audio_seconds(expected, self.seconds)
        prompt, output, cached = self.prompt, self.output, self.cached or 0
        if self.cached is None and not self.final:
            cached = expected.cached
        if prompt is None:
            prompt, cached = expected.uncached + expected.cached, expected.cached
        if output is None:
            output = counted or (expected.output if self.final else 0)
        elif not self.final:
            output = max(output, counted)
        return Usage(prompt, output, min(cached, prompt), self.seconds or 0.0)

    def is_whole(self, expected: RequestSize) -> bool:
        """Whether the engine reported all of that usage, for the whole answer."""
        return self.final and self.prompt is not None and (self.output is not None or not expected.output)


def read(items: Iterable[Members], choices: int = 1) -> ToldUsage | None:
    """The usage of a whole answer. `choices`: how many items of a list answer one prompt."""
    told = [(form, one) for members in items if (found := _read_item(members)) for form, one in (found,)]
    if len(told) == 1 and told[0][0].name == "tgi":
        return _of_all(told[0][1], choices)
    return _sum(told, choices)


def with_header(told: ToldUsage | None, field: Callable[[bytes], str], choices: int = 1) -> ToldUsage | None:
    """The usage of a whole answer, completed from its header. `field`: the value of a header field, or ""."""
    if told is None and (answer := field(HEADER_ANSWER)).startswith("{"):
        return read(answer_scan.read(answer.encode("latin-1", "replace")))
    prompt = next((count for name in HEADER_PROMPTS if (count := _header_count(field(name))) is not None), None)
    output = _header_count(field(HEADER_OUTPUT))
    if prompt is None and output is None:
        return told
    if told is None:
        return _of_all(ToldUsage(prompt, output), choices)
    if told.output is None and output is not None:
        told = _of_all(replace(told, output=output), choices)
    return replace(told, prompt=prompt) if told.prompt is None else told


def _of_all(best: ToldUsage, choices: int) -> ToldUsage:
    """The usage of all `choices`, where that of the best one is known (TGI's): the others are about as long."""
    if choices == 1 or best.output is None:
        return best
    return replace(best, output=min(best.output * choices, MAX_COUNT), final=False)


def has_failed_choice(text: Buffer) -> bool:
    """Whether a choice in a JSON text, or in a part of it, ended by a failure of the engine.

    Inside a JSON string the quotes would be escaped, so no text that was generated can pass for it.
    """
    return _FAILED_END.search(text) is not None


def has_failed(members: Members, kind: str = "") -> bool:
    """Whether an answer or an event (`kind`: its name) reports an engine failure. `"error": null` does not."""
    if members.get("error") or members.get("object") == "error" or (kind or members.get("type")) in _FAILED_EVENTS:
        return True
    meta, delta = members.get("meta_info"), members.get("delta")
    reason = meta.get("finish_reason") if isinstance(meta, dict) else None
    if isinstance(reason, dict) and reason.get("type") == "abort":  # SGLang's
        return True
    ends = (members.get("finish_reason"), delta.get("finish_reason") if isinstance(delta, dict) else None)
    return any(isinstance(end, str) and end.startswith("ERROR") for end in ends)  # Cohere's


class UsageMeter:
    """The usage reported so far by the events of one answer: to `prompts` prompts, with `choices` for each."""

    __slots__ = ("_choices", "_expected", "_first", "_last", "_sequences")

    def __init__(self, choices: int = 1, prompts: int = 1) -> None:
        self._choices = choices
        self._expected = min(choices * prompts, MAX_SEQUENCES)
        self._first: Members | None = None
        self._last: tuple[Members, bool] | None = None  # and whether it covers the whole answer
        self._sequences: dict[int, tuple[Members, bool]] = {}  # where each event is of one of them

    def take(self, members: Members, kind: str = "") -> bool:
        """Add an event named `kind`. True if it holds a usage."""
        found = _read_item(members)
        if found is None:
            return False
        is_final = (kind or members.get("type")) not in _OPENING_EVENTS and _has_ended(members)
        index = members.get("index")
        if found[0].name in ("sglang", "llama.cpp") and isinstance(index, int):
            if index in self._sequences or len(self._sequences) < MAX_SEQUENCES:
                self._sequences[index] = members, is_final
        else:
            self._first = self._first or members
            self._last = members, is_final
        return True

    @property
    def told(self) -> ToldUsage | None:
        """The usage known by now. Prompt counts missing in the last usage come from the first one."""
        if self._sequences:
            ordered = [self._sequences[index] for index in sorted(self._sequences)]
            told = read((members for members, _ in ordered), self._choices)
            has_all = len(ordered) >= self._expected
            return told and replace(told, final=has_all and all(ended for _, ended in ordered))
        if self._first is None or self._last is None:
            return None
        last, ended = self._last
        told = read([last])
        if told is None or not told.prompt:
            told = read([_merged(self._first, last)])
        return told and replace(told, final=ended)


def _has_ended(members: Members) -> bool:
    """Whether the sequence of an event has ended, as far as its form shows it."""
    meta = members.get("meta_info")
    if isinstance(meta, dict) and "prompt_tokens" in meta:
        return meta.get("finish_reason") is not None
    if "tokens_predicted" in members:
        return members.get("stop") is True
    return members.get("done") is not False


def _merged(first: Members, last: Members) -> Members:
    """Merge two usages: the last one, with values that are missing or 0 filled in from the first."""
    opening, closing = _lifted(first).get("usage"), _lifted(last).get("usage")
    if not isinstance(opening, dict) or not isinstance(closing, dict):
        return last
    return {"usage": {**opening, **{name: value for name, value in closing.items() if value}}}


def _lifted(members: Members) -> Members:
    """Lift a nested usage to the top."""
    if isinstance(members.get("usage"), dict):
        return members
    holders = (members.get(name) for name in _HOLDERS)
    usages = (holder["usage"] for holder in holders if isinstance(holder, dict) and "usage" in holder)
    return {**members, "usage": usage} if (usage := next(usages, None)) is not None else members


def _read_item(members: Members) -> tuple[UsageForm, ToldUsage] | None:
    lifted = _lifted(members)
    for form in FORMS:
        holder = lifted.get(form.holder) if form.holder else lifted
        if not isinstance(holder, dict) or not form.lacks.isdisjoint(holder):
            continue
        told = _read_form(form, holder, lifted)
        if (told.prompt, told.output, told.seconds) != (None, None, None):
            return form, told
    return None


def _read_form(form: UsageForm, holder: Members, members: Members) -> ToldUsage:
    prompt, cached = _first_count(holder, form.prompt), _first_count(holder, form.cached)
    if prompt is not None and form.beyond:
        total, output = _first_count(holder, _TOTAL), _first_count(holder, form.output)
        if total is None or total != prompt + (output or 0):
            prompt += sum(_first_count(holder, (path,)) or 0 for path in form.beyond)
    if cached is None and form.name == "openai":  # llama.cpp's chat, before its usage had details
        cached = _first_count(members, _TIMED_CACHE)
    elif cached is None and form.name == "llama.cpp" and prompt is not None:
        new = _first_count(members, _TIMED_PROMPT)
        cached = None if new is None else max(0, prompt - new)
    seconds = None
    for path in form.seconds:
        seconds = _number(_at(holder, path)) if seconds is None else seconds
    return ToldUsage(prompt, _first_count(holder, form.output), cached, seconds)


def _sum(told: list[tuple[UsageForm, ToldUsage]], choices: int) -> ToldUsage | None:
    """The total usage of several sequences. The prompt of several choices counts once."""
    if len(told) <= 1:
        return told[0][1] if told else None
    prompts = [one for _, one in islice(told, 0, None, max(1, choices))]
    seconds = [one.seconds for _, one in told if one.seconds is not None]
    return ToldUsage(
        _total(one.prompt for one in prompts),
        _total(one.output for _, one in told),
        _total(one.cached for one in prompts),
        sum(seconds) if seconds else None,
    )


def _total(counts: Iterable[int | None]) -> int | None:
    """The sum, None if one of them is unknown."""
    known = list(counts)
    return None if None in known else min(sum(count for count in known if count is not None), MAX_COUNT)


def _first_count(holder: Members, paths: tuple[Path, ...]) -> int | None:
    for path in paths:
        value = holder.get(path[0]) if len(path) == 1 else _at(holder, path)
        if isinstance(value, float) and value.is_integer():  # vLLM's for Cohere
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_COUNT:
            return value
    return None


def _at(holder: Members, path: Path) -> Any:
    value: Any = holder
    for name in path:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def _number(value: Any) -> float | None:
    """A count or a duration; vLLM writes the latter as a text."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number < MAX_COUNT else None


def _header_count(text: str) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= 9 else None
