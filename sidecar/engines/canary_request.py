"""Pure: which canary to send next, its body, and its response.

A canary is the smallest piece of the engine's own work: one greedy token of the smallest prompt, one vector, one score,
a tenth of a second of silence. The form that passes is learned once per engine process: base models have no chat, some
servers have only chat, embedding models have neither, and a priority may be rejected.

Rules: a form that passed with a model is known. Only known forms prove a hang. A form that was rejected before it ever
passed is not sent again to this process with this model, except once after users were served on its route.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final

from sidecar.engines.canary_rows import CanaryRow
from sidecar.engines.engine_type import EngineKind

# Rejections that another form of the request may avoid. Text Embeddings Inference answers 424 to what its model cannot.
OTHER_FORM: Final = (400, 404, 405, 415, 422, 424, 501)
# SGLang responds 503 to a priority that it does not accept.
OTHER_PRIORITY: Final = (*OTHER_FORM, 500, 503)
BUSY: Final = (429, 503)
KEY_REFUSED: Final = (401, 403)
# Finish reasons of a token that was not generated.
FAILED_FINISH_REASONS: Final = ("abort", "error")
DIGEST_BYTES: Final = 8
# How often a form that never passed may fail (500, a broken answer) before it counts as rejected.
MAX_FAILURES: Final = 10
# Forms that fail in one canary: with the failures above, half a minute of start-up in which a front may answer 500.
MAX_TRIES: Final = 3
# Models whose rejections are remembered.
MAX_MODELS: Final = 16
# SGLang with its prefill and decode apart answers 400 "without bootstrap room id". What it sends to itself as a health
# check (srt/entrypoints/http_server.py) names this host: then nothing is transferred, and nothing enters its cache.
TRANSFER_WORD: Final = b"bootstrap"
FAKE_TRANSFER: Final = {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0}


@dataclass(frozen=True, slots=True)
class CanaryForm:
    """One form of the request: its row, the priority or None, and whether it names a transfer that does not happen."""

    row: CanaryRow
    priority: int | None = None
    fake_transfer: bool = False

    @property
    def path(self) -> str:
        """Where it is sent."""
        return self.row.path


@dataclass(frozen=True, slots=True)
class CanaryAnswer:
    """A response of status 200. `error` is the status of an error inside it (500 if it has none), else 0.

    `token`: it shows work. `digest` is a hash of the text; empty if there is none to compare (an embedding).
    """

    token: bool = False
    error: int = 0
    prompt_tokens: int = 0
    digest: str = ""


@dataclass(slots=True)
class _Tried:
    """What became of the forms with one model."""

    passed: CanaryForm | None = None  # the last one that did
    known: set[str] = field(default_factory=set)  # all paths that did
    rejected: set[CanaryForm] = field(default_factory=set)
    failures: dict[CanaryForm, int] = field(default_factory=dict)  # of forms that never passed
    served: set[str] = field(default_factory=set)  # routes of users whose forms were tried again
    has_transfer: bool = False  # the engine misses the names of a transfer
    is_doubted: bool = False  # the form that passed was refused the last time


class CanaryForms:
    """The forms that are left to try with each model, the most likely first."""

    def __init__(self, kind: EngineKind, priority: int | None) -> None:
        self._kind = kind
        self._priorities = [priority, None] if priority is not None else [None]
        self._models: dict[str, _Tried] = {}
        self._last_row: CanaryRow | None = None  # passed with any model

    @property
    def has_passed(self) -> bool:
        """Whether any form has passed with any model."""
        return self._last_row is not None

    def next_form(self, model: str = "", route: str = "", asked: Collection[CanaryForm] = ()) -> CanaryForm | None:
        """The form to send next, of those that were not `asked` yet. `route`: of the users' last answered request.

        First the one that passed, then those of `route`, then the one that passed with another model. A form that
        failed comes after those that did not.
        """
        tried = self._tried(model)
        if route and route not in tried.served:
            tried.served.add(route)
            tried.rejected = {form for form in tried.rejected if route not in form.row.routes}

        def rank(form: CanaryForm) -> tuple[bool, int, bool, bool]:
            is_routed, is_last = route in form.row.routes, form.row is self._last_row
            return form != tried.passed, tried.failures.get(form, 0), not is_routed, not is_last

        left = (form for form in self._all(tried) if form not in asked and form not in tried.rejected)
        return min(left, key=rank, default=None)

    def is_known(self, form: CanaryForm, model: str) -> bool:
        """Whether this path has passed with this model: only then does a failure prove something."""
        return form.path in self._tried(model).known

    def passed(self, form: CanaryForm, model: str = "") -> None:
        """It is the first from now on."""
        tried = self._tried(model)
        tried.passed, tried.is_doubted, self._last_row = form, False, form.row
        tried.known.add(form.path)
        tried.failures.clear()

    def failed(self, form: CanaryForm, model: str = "", *, starved: bool = False) -> None:
        """A form that never passed failed: others go first. After MAX_FAILURES it is rejected, unless it `starved`."""
        tried = self._tried(model)
        if form.path in tried.known:
            return
        tried.failures[form] = tried.failures.get(form, 0) + 1
        if tried.failures[form] >= MAX_FAILURES and not starved:
            tried.rejected.add(form)

    def refused(self, form: CanaryForm, model: str, status: int, text: bytes = b"") -> bool:
        """The engine refused this form with this status and body. Returns whether another one is worth a try now.

        The one that passed is kept, because its refusal says something of the engine; if it is refused again, the
        others are tried, too.
        """
        tried = self._tried(model)
        is_known = form.path in tried.known
        if status not in (OTHER_FORM if form.priority is None or is_known else OTHER_PRIORITY):
            return False
        if status == 400 and TRANSFER_WORD in text.lower():
            tried.has_transfer = True
        if status not in OTHER_FORM:  # of a priority, or of an engine that loads: one without it is asked next
            if status not in BUSY:
                self.failed(form, model)
            return True
        if form == tried.passed:
            was_doubted, tried.is_doubted = tried.is_doubted, True
            return was_doubted
        tried.rejected.add(form)
        return True

    def _tried(self, model: str) -> _Tried:
        self._models[model] = tried = self._models.pop(model, None) or _Tried()
        while len(self._models) > MAX_MODELS:  # the least used goes
            del self._models[next(iter(self._models))]
        return tried

    def _all(self, tried: _Tried) -> Iterator[CanaryForm]:
        for row in self._kind.canaries:
            generates = row.works is None
            for fake_transfer in (True, False) if generates and tried.has_transfer else (False,):
                for priority in self._priorities if generates else (None,):
                    yield CanaryForm(row, priority, fake_transfer)


def body(kind: EngineKind, form: CanaryForm, model: str, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The body of the request, JSON or the fields of a form; `more` are members that this engine needs now."""
    request = {**({"model": model} if form.row.names_model else {}), **form.row.fields}
    if form.row.works is None:
        if kind.reports_usage:
            request["stream_options"] = {"include_usage": True}
        if form.priority is not None:
            request["priority"] = form.priority
        if form.fake_transfer:
            request |= FAKE_TRANSFER
    for name, value in ({} if form.row.is_upload else more or {}).items():
        at = request.get(name)
        request[name] = {**at, **value} if isinstance(at, dict) and isinstance(value, dict) else value
    return request


def read(raw: bytes, row: CanaryRow) -> CanaryAnswer:
    """Parse a response, a stream of events or one JSON value. Anything else shows no work."""
    works, error, prompt_tokens, text = False, 0, 0, ""
    for event in _events(raw):
        works = works or (row.works is not None and row.works(event))
        if not isinstance(event, dict):
            continue
        error = error or _error(event)
        prompt_tokens = _count(event) or prompt_tokens
        text += _string(event.get("response"))
        for choice in _choices(event) if row.works is None else ():
            text_part, reason = _text(choice), choice.get("finish_reason")
            text += text_part
            works = works or bool(text_part or reason)
            error = error or (500 if reason in FAILED_FINISH_REASONS else 0)
    digest = blake2b(text.encode("utf-8", "replace"), digest_size=DIGEST_BYTES).hexdigest()
    is_comparable = works and (row.works is None or bool(text))
    return CanaryAnswer(works, error, prompt_tokens or row.prompt_tokens, digest if is_comparable else "")


def _events(raw: bytes) -> Iterator[Any]:
    """The JSON values of a stream of events, or the one of the whole response."""
    lines = [line[5:] for line in raw.splitlines() if line.startswith(b"data:")]
    for text in lines or [raw]:
        try:
            yield json.loads(text)
        except (ValueError, RecursionError):
            continue


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
    return "".join(map(_string, parts))


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _count(event: dict[str, Any]) -> int:
    usage = event.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else event.get("prompt_eval_count")  # Ollama
    return count if isinstance(count, int) and 0 < count < 1 << 20 else 0
