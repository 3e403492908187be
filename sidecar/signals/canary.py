"""The canary: the smallest piece of the engine's own work, read to its end.

- A short hash of the response is kept, never the text.
- It goes to the engine directly, so that a relay in trouble does not look like an engine in trouble, and is never
  counted as a tenant's work.
- It makes no engine load a model: if none is known to be loaded, none is asked.
- A form that never passed with this model in this process of the engine proves nothing, whatever its answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import InitVar, dataclass
from typing import Any, Final

import aiohttp

from sidecar.engines import canary_request
from sidecar.engines.canary_request import CanaryAnswer, CanaryForm, CanaryForms
from sidecar.engines.canary_rows import silence
from sidecar.engines.engine_type import EngineKind
from sidecar.engines.model_list import NONE_NAMED, Choice, choose
from sidecar.events import CanaryResult
from sidecar.runtime import open_files
from sidecar.signals.http_body import read_body
from sidecar.signals.identify import MISSING_STATUS

MAX_ANSWER_BYTES: Final = 1 << 20
MAX_ERROR_BYTES: Final = 64 << 10
MAX_LIST_BYTES: Final = 16 << 20
# `send` has its own timeout; aiohttp's default of 5 minutes may be shorter.
NO_TIMEOUT: Final = aiohttp.ClientTimeout(total=None)
# What Text Embeddings Inference answers to a failed inference, and to what its model cannot.
FAILED_DEPENDENCY: Final = 424
Ended = tuple[str, str, CanaryAnswer | None, bool]  # outcome, detail, the answer that passed, known


# Different refusals that an operator is shown.
MAX_REFUSALS: Final = 12


@dataclass(eq=False)
class CanarySignal:
    """Sends canaries. `send` never raises; the caller sends one at a time.

    `asleep` is awaited first, for engines that a request would wake. `priority` puts a request before all others.
    `is_idle` returns whether the engine reports that nothing runs.
    """

    session: aiohttp.ClientSession
    engine: str
    kind: EngineKind
    headers: dict[str, str]
    model: str = ""
    priority: InitVar[int | None] = None
    asleep: Callable[[], Awaitable[object]] | None = None
    is_idle: Callable[[], bool] = lambda: False

    def __post_init__(self, priority: int | None) -> None:
        self._forms = CanaryForms(self.kind, priority)
        self._missing: set[str] = set()  # lists of models that are not there
        self._sent: tuple[CanaryForm, str] | None = None  # the last form and its model
        self._refusals: dict[str, None] = {}  # of the forms that never passed, the last ones
        self.forget_model()

    async def send(self, allowed: float, used: str = "", route: str = "") -> CanaryResult:
        """Send one canary, starved after `allowed` seconds.

        `used`, `route`: model and route of the last request of a user that was answered.
        """
        started, self._sent = time.monotonic(), None

        def ended(outcome: str, detail: str, answer: CanaryAnswer | None = None, known: bool = False) -> CanaryResult:
            took = started, time.monotonic(), allowed
            of = (answer.prompt_tokens, answer.digest, self._choice.model) if answer else (0, "", "")
            return CanaryResult(outcome, *took, detail, *of, known)  # type: ignore[arg-type]

        try:
            async with asyncio.timeout(allowed):
                if self.asleep is not None and await self.asleep():
                    return ended("moot", "the engine is asleep; a request would wake it")
                if refusal := await self._choose(used):
                    return ended(*refusal)
                return ended(*await self._attempt(self._choice, route))
        except TimeoutError:
            self._failed(starved=True)
            return ended("starved", f"no token within {allowed:.1f} s{self._of()}", known=self._is_known())
        except aiohttp.ClientConnectorError as e:
            if open_files.is_exhausted(e):
                return ended("moot", open_files.EXHAUSTED_TEXT)
            return ended("refused", "the engine refuses connections")
        except (aiohttp.ClientError, OSError, ValueError, RecursionError) as e:
            self._failed()
            outcome = "failed" if self._is_known() else "rejected"
            return ended(outcome, f"the response broke off ({type(e).__name__}){self._of()}", known=self._is_known())

    async def _attempt(self, choice: Choice, route: str) -> Ended:
        """Send one form after the other, until one passes or its failure says something."""
        model, forms = choice.model, self._forms
        asked: set[CanaryForm] = set()
        refusals: list[str] = []
        failures = 0  # of forms that never passed: they prove nothing, and the engine may be starting
        proof = ""  # the outcome of a known form that the engine refused
        while form := forms.next_form(model, route, asked):
            asked.add(form)
            self._sent = form, model
            known = forms.is_known(form, model)
            status, answer, text = await self._ask(form, choice)
            if status == 200 and answer.token:
                forms.passed(form, model)
                self._choice = choice  # it was not the name that another form was refused for
                return "ok", form.path, answer, True
            refusals.append(
                f"HTTP {status} on {form.path}" if status != 200 else f"no token in the answer of {form.path}"
            )
            if status in canary_request.OTHER_FORM:
                self.forget_model()  # the name may be rejected: the next canary looks it up again
            if known and status not in canary_request.KEY_REFUSED:  # a key that was changed proves nothing
                proof = "failed" if status in (200, FAILED_DEPENDENCY) or status >= 500 else "rejected"
            if forms.refused(form, model, status, text):
                continue
            if status in canary_request.BUSY:
                return "busy", refusals[-1], None, known
            if known or status in canary_request.KEY_REFUSED:
                break
            forms.failed(form, model)
            failures += 1
            if failures == canary_request.MAX_TRIES:
                break
        if proof:
            return proof, f"{_joined(refusals)}; it has passed before", None, True
        self._refusals = dict.fromkeys([*self._refusals, *refusals][-MAX_REFUSALS:])
        said = ", ".join(self._refusals)
        # Before anything has passed, the engine may still be starting behind its front.
        outcome = "failed" if failures and not forms.has_passed else "rejected"
        return outcome, f"no canary passes here: {said}{_remedy(said)}", None, False

    async def _ask(self, form: CanaryForm, choice: Choice) -> tuple[int, CanaryAnswer, bytes]:
        """Send one request; an error inside a response of status 200 counts as its status. The bytes are an error's."""
        more = {**choice.fields, **(self.kind.idle_fields if self.is_idle() else {})}
        fields = canary_request.body(self.kind, form, choice.model, more)
        body = {"data": _upload(fields)} if form.row.is_upload else {"json": fields}
        url = self.engine + form.path
        async with self.session.post(url, headers=self.headers, timeout=NO_TIMEOUT, **body) as response:
            if response.status != 200:
                text = await response.content.read(MAX_ERROR_BYTES) if response.status == 400 else b""
                return response.status, CanaryAnswer(), text
            text = await read_body(response, MAX_ANSWER_BYTES)
        answer = canary_request.read(text, form.row)
        return answer.error or 200, answer, text if answer.error else b""

    async def _choose(self, used: str) -> Ended | None:
        """Choose a model, each time where what is loaded can change. Returns the outcome when there is none."""
        if self._choice.lasts and self.kind.series:  # of a server that is not known nothing lasts
            return None
        known = self._forms.has_passed
        for path in self.kind.model_paths:
            if path in self._missing:
                continue
            async with self.session.get(self.engine + path, headers=self.headers, timeout=NO_TIMEOUT) as response:
                if response.status == 200:
                    self._choice = choose(await read_body(response, MAX_LIST_BYTES), self.model, used)
                    return self._no_model(self._choice, known)
            if response.status != MISSING_STATUS or known:
                break
            self._missing.add(path)
        else:
            self._missing.clear()  # the next canary looks again
        self._choice = Choice(self.model)
        if self.model:
            return None
        status, detail = response.status, f"HTTP {response.status} on {path}"
        if status in canary_request.BUSY:
            return "busy", detail, None, known
        # a list that fails says nothing of whether tokens are generated, nor does a key; one that is gone does
        proves = status < 500 and status not in canary_request.KEY_REFUSED
        return "rejected", f"{detail}{_remedy(detail) or '; set --canary-model'}", None, known and proves

    def _no_model(self, choice: Choice, known: bool) -> Ended | None:
        if choice.model:
            return None
        if choice.is_unloaded and known:
            return "moot", choice.why, None, False  # before one has passed, the start must not wait for a model
        return "rejected", choice.why, None, known and choice.why == NONE_NAMED

    def _is_known(self) -> bool:
        """Whether what was sent last has passed before; before anything was sent, whether anything has."""
        return self._forms.is_known(*self._sent) if self._sent else self._forms.has_passed

    def _failed(self, *, starved: bool = False) -> None:
        if self._sent:
            self._forms.failed(*self._sent, starved=starved)

    def _of(self) -> str:
        return f" on {self._sent[0].path}" if self._sent else ""

    def forget_model(self) -> None:
        """Choose again: the engine may serve another model now."""
        # A name that the engine always takes need not be looked up.
        always = "" if self.model else self.kind.canary_model
        self._choice = Choice(always, lasts=bool(always))


def _upload(fields: dict[str, Any]) -> aiohttp.FormData:
    form = aiohttp.FormData()
    form.add_field("file", silence(), filename="silence.wav", content_type="audio/wav")
    for name, value in fields.items():
        form.add_field(name, value)
    return form


def _joined(refusals: list[str]) -> str:
    return ", ".join(dict.fromkeys(refusals))


def _remedy(refusals: str) -> str:
    return "; set --engine-key" if any(f"HTTP {status} " in refusals for status in canary_request.KEY_REFUSED) else ""
