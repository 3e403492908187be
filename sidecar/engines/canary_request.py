"""Pure: the request for one token, in the forms that engines take, and what its answer says.

A canary is one greedy token of the smallest prompt there is, as a stream. Which form passes is learned once for each engine
process: base models have no chat, some servers have nothing but chat, embedding models have neither, and a priority may be
refused. What was refused is not asked again until the engine is another one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

from sidecar.engines.engine_type import CHAT, COMPLETIONS, EMBEDDINGS, EngineKind

PROMPT: Final = "1"
PROMPT_TOKENS: Final = {COMPLETIONS: 1, CHAT: 16, EMBEDDINGS: 1}  # where the answer does not say; a template adds some
OTHER_FORM: Final = (400, 404, 405, 415, 422, 501)  # refusals that another form of the request may not meet
OTHER_PRIORITY: Final = (*OTHER_FORM, 500, 503)  # SGLang answers 503 to a priority that it does not take
BROKEN: Final = ("abort", "error")  # finish reasons of a token that was not generated
ANSWER_BYTES: Final = 8  # of the hash that stands for an answer


@dataclass(frozen=True, slots=True)
class CanaryForm:
    """One way to ask: the route, and the priority or None."""

    path: str
    priority: int | None = None


@dataclass(frozen=True, slots=True)
class CanaryAnswer:
    """What came with status 200. `error` is the status that an error inside it names (500 where it names none), else 0.

    `digest` stands for the text; it is empty where there is none to compare (an embedding).
    """

    token: bool = False
    error: int = 0
    prompt_tokens: int = 0
    digest: str = ""


class CanaryForms:
    """The forms that are left to try, the likeliest first."""

    def __init__(self, kind: EngineKind, priority: int | None) -> None:
        self._kind = kind
        self._priorities = [priority, None] if priority is not None else [None]
        self._left = self._all()
        self.known = False  # one has passed

    def forms(self) -> tuple[CanaryForm, ...]:
        """What to try now, in this order."""
        return self._left

    def passed(self, form: CanaryForm) -> None:
        """This one is taken: nothing else is asked from now on."""
        self._left, self.known = (form,), True

    def goes_on(self, form: CanaryForm, status: int) -> bool:
        """Whether the next form may fare better than this one did. Where none is left, all are tried again next time."""
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
    asked: dict[str, Any] = {"model": model, "max_tokens": 1, "temperature": 0, "stream": True}
    if kind.tells_usage:
        asked["stream_options"] = {"include_usage": True}
    if form.priority is not None:
        asked["priority"] = form.priority
    if form.path == CHAT:
        return {**asked, "messages": [{"role": "user", "content": PROMPT}]}
    return {**asked, "prompt": PROMPT}


def read(raw: bytes, path: str) -> CanaryAnswer:
    """What an answer says, whether it came as events or as one JSON object. Anything else holds no token."""
    token, error, prompt_tokens, text = False, 0, 0, ""
    for event in _events(raw):
        error = error or _error(event)
        prompt_tokens = _count(event.get("usage")) or prompt_tokens
        token = token or bool(event.get("data"))
        for choice in _choices(event):
            said, reason = _said(choice), choice.get("finish_reason")
            text += said
            token = token or bool(said or reason)
            error = error or (500 if reason in BROKEN else 0)
    digest = blake2b(text.encode("utf-8", "replace"), digest_size=ANSWER_BYTES).hexdigest()
    comparable = token and path != EMBEDDINGS
    return CanaryAnswer(token, error, prompt_tokens or PROMPT_TOKENS[path], digest if comparable else "")


def _events(raw: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of events, or the one that the whole answer is."""
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


def _said(choice: dict[str, Any]) -> str:
    """The text of a choice, thoughts included."""
    parts = [choice.get("text")]
    for where in (choice.get("delta"), choice.get("message")):
        if isinstance(where, dict):
            parts += [where.get(name) for name in ("reasoning_content", "reasoning", "content")]
    return "".join(part for part in parts if isinstance(part, str))


def _count(usage: Any) -> int:
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and 0 < count < 1 << 20 else 0
