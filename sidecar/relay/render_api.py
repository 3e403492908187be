"""`/v1/chat/completions/render` and `/v1/completions/render`, answered here where the answer equals the engine's.

Rules: off unless --render on. Only for a vLLM whose own `/tokenize` agrees with the model's files (engine_check.py),
asked once for each process of the engine and each key of a client. What cannot be rendered exactly, what would be
refused and what comes while the workers are busy goes to the engine as it came. Templates and texts run in a worker
process, never here.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from sidecar.errors import RequestError, StartError
from sidecar.relay.engine_io import BodyPayload, EngineClient
from sidecar.relay.http.body import read_within
from sidecar.relay.http.client import Request
from sidecar.relay.http.engine import EngineError
from sidecar.relay.http.head import Fields
from sidecar.render.engine_check import EngineFacts, check
from sidecar.render.protocol import RenderCall
from sidecar.render.workers import RenderWorkers
from sidecar.runtime.limited_log import LimitedLog

_log = logging.getLogger(__name__)

MAX_ANSWER_BYTES: Final = 1 << 20
RECHECK_S: Final = 30.0  # after a check that failed
CHECK_TIMEOUT_S: Final = 10.0
MAX_CALLERS: Final = 64  # whose keys the engine was asked with; another one's check is repeated


@dataclass(frozen=True, slots=True)
class _Checked:
    """What a check found, and when; None: nothing may be rendered."""

    facts: EngineFacts | None
    at: float


class RenderApi:
    """Answers that the workers make."""

    def __init__(self, workers: RenderWorkers) -> None:
        self._workers = workers
        self.ready = asyncio.Event()  # while workers are there
        # By a digest of the client's authorization: who has none that the engine accepts is answered by the engine.
        self._checked: OrderedDict[bytes, _Checked] = OrderedDict()
        self._process = -1  # of the engine, whose facts these are
        self._checking = asyncio.Lock()
        self._limited_log = LimitedLog(_log)

    async def run(self) -> None:
        """Keep the workers alive until cancelled."""
        try:
            async with self._workers:
                self.ready.set()
                await asyncio.get_running_loop().create_future()
        except StartError as e:
            _log.error("--render is off: %s", e)
        finally:
            self.ready.clear()

    async def answer(
        self, request: Request, api: str, body: bytes, given_id: str, engine: EngineClient, process: int
    ) -> bytes | None:
        """The answer to a request whose body was read; None where the engine has to answer.

        `process`: the number of the engine's process, which grows with each.
        """
        if not self.ready.is_set():
            return None
        facts = await self._facts_of(request, engine, process)
        if facts is None:
            return None
        call = RenderCall(api, given_id, facts.model, facts.names, facts.max_model_len, whole=True)
        try:
            return await self._workers.render(call, body)
        except RequestError as e:
            self._limited_log.warning("passed", "a request to render goes to the engine: %s", e)
            return None

    async def _facts_of(self, request: Request, engine: EngineClient, process: int) -> EngineFacts | None:
        """The engine's facts; None if nothing may be rendered for it, or for this client."""
        caller = _digest(request)
        async with self._checking:
            if process != self._process:
                self._checked.clear()
                self._process = process
            known = self._checked.get(caller)
            if known is not None and (known.facts or time.monotonic() - known.at < RECHECK_S):
                self._checked.move_to_end(caller)
                return known.facts
            try:
                async with asyncio.timeout(CHECK_TIMEOUT_S):
                    found = await check(_asker(request, engine), self._workers.render)
            except (RequestError, EngineError, ValueError, ConnectionError, TimeoutError) as e:
                found = f"no answer ({type(e).__name__})"
            facts = found if isinstance(found, EngineFacts) else None
            self._checked[caller] = _Checked(facts, time.monotonic())
            if len(self._checked) > MAX_CALLERS:
                self._checked.popitem(last=False)
            if isinstance(found, str):
                self._limited_log.warning("check", "requests to render go to the engine: %s", found)
            return facts


def _authorization(request: Request) -> list[tuple[bytes, bytes]]:
    return [field for field in request.fields if field[0].lower() == b"authorization"]


def _digest(request: Request) -> bytes:
    """Stands for a client's authorization, which is a secret and not kept."""
    return hashlib.blake2b(b"\n".join(value for _, value in _authorization(request)), digest_size=16).digest()


def _asker(request: Request, engine: EngineClient) -> Callable[[str, Any], Awaitable[tuple[int, Any]]]:
    """What asks the engine a question of our own, with the client's authorization."""

    async def ask(path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        fields = _authorization(request)
        payload = None
        if body is not None:
            fields.append((b"content-type", b"application/json"))
            payload = BodyPayload([json.dumps(body).encode()])
        method = "GET" if body is None else "POST"
        question = Request(request.connection, method, path.encode(), "1.1", Fields(fields))
        with await engine.send(question, "render-check", payload, plain=True) as answer:
            text = await read_within(answer.body, MAX_ANSWER_BYTES) or b""
            return answer.status, json.loads(text)

    return ask
