"""Pure: the canary request for one token, in the forms that engines accept, and its response.

A canary is one greedy token for the smallest prompt, as a stream. The form that passes is learned once per engine
process: base models have no chat, some servers have only chat, embedding models have neither, and a priority may be
rejected. A rejected form is not tried again until the engine restarts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

from sidecar.engines.engine_type import CHAT, COMPLETIONS, EMBEDDINGS, EngineKind

PROMPT: Final = "1"
# Used if the response does not report them; a chat template adds some.
PROMPT_TOKENS: Final = {COMPLETIONS: 1, CHAT: 16, EMBEDDINGS: 1}
# Rejections that another form of the request may avoid.
OTHER_FORM: Final = (400, 404, 405, 415, 422, 501)
# SGLang responds 503 to a priority that it does not accept.
OTHER_PRIORITY: Final = (*OTHER_FORM, 500, 503)
# Finish reasons of a token that was not generated.
FAILED_FINISH_REASONS: Final = ("abort", "error")
DIGEST_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class CanaryForm:
    """One form of the request: the route, and the priority or None."""

    path: str
    priority: int | None = None


@dataclass(frozen=True, slots=True)
class CanaryAnswer:
    """A response of status 200. `error` is the status of an error inside it (500 if it has none), else 0.

    `digest` is a hash of the text; empty if there is none to compare (an embedding).
    """

    token: bool = False
    error: int = 0
    prompt_tokens: int = 0
    digest: str = ""


class CanaryForms:
    """The forms that are left to try, the most likely first."""

    def __init__(self, kind: EngineKind, priority: int | None) -> None:
        self._kind = kind
        self._priorities = [priority, None] if priority is not None else [None]
        self._left = self._all()
        self.known = False  # one has passed

    def forms(self) -> tuple[CanaryForm, ...]:
        """The forms to try now, in this order."""
        return self._left

    def passed(self, form: CanaryForm) -> None:
        """Keep this form: only it is used from now on."""
        self._left, self.known = (form,), True

    def goes_on(self, form: CanaryForm, status: int) -> bool:
        """Whether to try the next form after this status. If a known form fails, all are tried again next time."""
        if status not in (OTHER_FORM if form.priority is None else OTHER_PRIORITY):
            return False
        if self.known:
            self._left, self.known = self._all(), False
            return False
        return True

    def _all(self) -> tuple[CanaryForm, ...]:
        return tuple(CanaryForm(path, priority) for path in self._kind.canary_paths for priority in self._priorities)


def body(kind: EngineKind, form: CanaryForm, model: str) -> dict[str, Any]:
    """The JSON body of the request for one token."""
    if form.path == EMBEDDINGS:
        return {"model": model, "input": PROMPT}
    request: dict[str, Any] = {"model": model, "max_tokens": 1, "temperature": 0, "stream": True}
    if kind.reports_usage:
        request["stream_options"] = {"include_usage": True}
    if form.priority is not None:
        request["priority"] = form.priority
    if form.path == CHAT:
        return {**request, "messages": [{"role": "user", "content": PROMPT}]}
    return {**request, "prompt": PROMPT}


def read(raw: bytes, path: str) -> CanaryAnswer:
    """Parse a response, a stream of events or one JSON object. Anything else has no token."""
    token, error, prompt_tokens, text = False, 0, 0, ""
    for event in _events(raw):
        error = error or _error(event)
        prompt_tokens = _count(event.get("usage")) or prompt_tokens
        token = token or bool(event.get("data"))
        for choice in _choices(event):
            text_part, reason = _text(choice), choice.get("finish_reason")
            text += text_part
            token = token or bool(text_part or reason)
            error = error or (500 if reason in FAILED_FINISH_REASONS else 0)
    digest = blake2b(text.encode("utf-8", "replace"), digest_size=DIGEST_BYTES).hexdigest()
    comparable = token and path != EMBEDDINGS
    return CanaryAnswer(token, error, prompt_tokens or PROMPT_TOKENS[path], digest if comparable else "")


def _events(raw: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of events, or the one object of the whole response."""
    lines = [line[5:] for line in raw.splitlines() if line.startswith(b"data:")]
    for text in lines or [raw]:
        try:
            event = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            yield event


def _choices(event: dict[str, Any]) -> list[dict[str, Any]]:
    choices = event.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def _error(event: dict[str, Any]) -> int:
    error = event.get("error")
    if not error:
        return 0
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def _text(choice: dict[str, Any]) -> str:
    """The text of a choice, including reasoning."""
    parts = [choice.get("text")]
    for where in (choice.get("delta"), choice.get("message")):
        if isinstance(where, dict):
            parts += [where.get(name) for name in ("reasoning_content", "reasoning", "content")]
    return "".join(part for part in parts if isinstance(part, str))


def _count(usage: Any) -> int:
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and 0 < count < 1 << 20 else 0
