"""The canary: a request for one token, read to the end of its stream.

- A short hash of the response is kept, never the text.
- It goes to the engine directly, so that a relay in trouble does not look like an engine in trouble, and is never
  counted as a tenant's work.
- It makes no engine load a model: if none is known to be loaded, none is asked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import InitVar, dataclass
from typing import Final

import aiohttp

from sidecar.engines import canary_request
from sidecar.engines.canary_request import CanaryAnswer, CanaryForm, CanaryForms
from sidecar.engines.engine_type import EngineKind
from sidecar.engines.model_list import Choice, choose
from sidecar.events import CanaryResult
from sidecar.signals.http_body import read_body

MAX_ANSWER_BYTES: Final = 1 << 20
MAX_LIST_BYTES: Final = 16 << 20
# `send` has its own timeout; aiohttp's default of 5 minutes may be shorter.
NO_TIMEOUT: Final = aiohttp.ClientTimeout(total=None)


@dataclass(eq=False)
class CanarySignal:
    """Sends canaries. `send` never raises; the caller sends one at a time.

    `asleep` is awaited first, for engines that a request would wake. `priority` puts a request before all others.
    """

    session: aiohttp.ClientSession
    engine: str
    kind: EngineKind
    headers: dict[str, str]
    model: str = ""
    priority: InitVar[int | None] = None
    asleep: Callable[[], Awaitable[object]] | None = None

    def __post_init__(self, priority: int | None) -> None:
        self._forms = CanaryForms(self.kind, priority)
        self._passed_model = ""
        self.forget_model()

    async def send(self, allowed: float, used: str = "") -> CanaryResult:
        """Send one canary, starved after `allowed` seconds. `used`: the model of a user's last answered request."""
        started = time.monotonic()

        def ended(outcome: str, detail: str = "", answer: CanaryAnswer | None = None) -> CanaryResult:
            took = started, time.monotonic(), allowed
            of = (answer.prompt_tokens, answer.digest, self._choice.model) if answer else ()
            return CanaryResult(outcome, *took, detail, *of)  # type: ignore[arg-type]

        try:
            async with asyncio.timeout(allowed):
                if self.asleep is not None and await self.asleep():
                    return ended("moot", "the engine is asleep; a request would wake it")
                if refusal := await self._choose(used):
                    return ended(*refusal)
                return ended(*await self._attempt(self._choice))
        except TimeoutError:
            return ended("starved", f"no token within {allowed:.1f} s")
        except aiohttp.ClientConnectorError:
            return ended("refused", "the engine refuses connections")
        except (aiohttp.ClientError, OSError, ValueError, RecursionError) as e:
            return ended("failed", f"the response broke off ({type(e).__name__})")

    async def _attempt(self, choice: Choice) -> tuple[str, str, CanaryAnswer | None]:
        """Outcome, detail, and the response to the form that passed."""
        refusals = []
        for form in self._forms.forms():
            status, answer = await self._ask(form, choice.model)
            if status == 200 and not answer.token:
                # A failure of an engine that has served tokens; another engine may always respond so.
                failed = self._forms.known and not self._is_new(choice)
                return "failed" if failed else "rejected", f"no token in the answer of {form.path}", None
            if status == 200:
                self._forms.passed(form)
                self._choice = choice  # it was not the name that another form was refused for
                self._passed_model = choice.model
                return "ok", form.path, answer
            refusals.append(f"HTTP {status} on {form.path}")
            if status in canary_request.OTHER_FORM:
                self.forget_model()  # the name may be rejected: the next canary looks it up again
            if not self._forms.goes_on(form, status):
                break
        outcome, detail = _refusal(status, ", ".join(dict.fromkeys(refusals)))
        return "rejected" if outcome == "failed" and self._is_new(choice) else outcome, detail, None

    def _is_new(self, choice: Choice) -> bool:
        """Whether another model passed before: what this one cannot do proves nothing."""
        return self._passed_model not in ("", choice.model)

    async def _ask(self, form: CanaryForm, model: str) -> tuple[int, CanaryAnswer]:
        """Send one request; an error inside a response of status 200 counts as its status."""
        body = canary_request.body(self.kind, form, model)
        url = self.engine + form.path
        async with self.session.post(url, json=body, headers=self.headers, timeout=NO_TIMEOUT) as response:
            if response.status != 200:
                return response.status, CanaryAnswer()
            answer = canary_request.read(await read_body(response, MAX_ANSWER_BYTES), form.path)
        return answer.error or 200, answer

    async def _choose(self, used: str) -> tuple[str, str] | None:
        """Choose a model, each time where what is loaded can change. Returns the outcome when there is none."""
        if self._choice.lasts and self.kind.series:  # of a server that is not known nothing lasts
            return None
        async with self.session.get(self.engine + "/v1/models", headers=self.headers) as response:
            if response.status == 200:
                self._choice = choose(await read_body(response, MAX_LIST_BYTES), self.model, used)
                return None if self._choice.model else ("rejected", self._choice.why)
        self._choice = Choice(self.model)
        if self.model:
            return None
        # a list that fails says nothing of whether tokens are generated
        outcome, detail = _refusal(response.status, f"HTTP {response.status} on /v1/models")
        return ("rejected" if outcome == "failed" else outcome), f"{detail}; set --canary-model"

    def forget_model(self) -> None:
        """Choose again: the engine may serve another model now."""
        # A name that the engine always takes need not be looked up.
        always = "" if self.model else self.kind.canary_model
        self._choice = Choice(always, lasts=bool(always))


def _refusal(status: int, detail: str) -> tuple[str, str]:
    if status in (429, 503):
        return "busy", detail
    if status in (401, 403):
        return "rejected", f"{detail}; set --engine-key"
    return ("failed" if status >= 500 else "rejected"), detail
