"""The sidecar's own contact with the engine: its kind, metrics, canary, and whether it sleeps.

- The kind is recognised when the engine first responds, and again after each restart of its process. Until then there
  is nothing to read and nothing to send.
- An engine that cannot be recognised is `openai`, the kind that assumes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Final

import aiohttp

from sidecar.engines import metrics_parser, registry
from sidecar.engines.engine_type import MODELS, EngineKind
from sidecar.engines.registry import KINDS
from sidecar.readings import Absent, EngineIdentity, EngineSample, Reading, Value
from sidecar.settings import Settings
from sidecar.signals.canary import CanarySignal
from sidecar.signals.identify import MISSING_STATUS, ProbeAnswers, probe_engine, request_pages
from sidecar.signals.metrics_scrape import ScrapeSignal
from sidecar.signals.sleep_state import SleepSignal

# A running engine accepts a connection within this time; the second attempt comes after a second.
FIRST_CONNECT_TIMEOUT_S: Final = 0.5
PROBE_RETRY_INTERVAL_S: Final = 1.0
REQUEST_TIMEOUT_S: Final = 5.0
# Between questions for the models of an engine that names none; it doubles from PROBE_RETRY_INTERVAL_S.
MAX_IDENTITY_INTERVAL_S: Final = 60.0
# Responses that identify nothing, after which the kind is `openai`.
MAX_INCONCLUSIVE_ATTEMPTS: Final = 3

_log = logging.getLogger(__name__)


def open_session() -> aiohttp.ClientSession:
    """A session that never reuses a connection: a canary on one that the engine is closing would look like a hang."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True), cookie_jar=aiohttp.DummyCookieJar())


class EngineMonitor:
    """Watches one engine. `canary` is None until its kind is known."""

    def __init__(self, session: aiohttp.ClientSession, chosen: Settings) -> None:
        self._session = session
        self._settings = chosen
        self._headers = {"authorization": f"Bearer {chosen.engine_key}"} if chosen.engine_key else {}
        self._scrape: ScrapeSignal | None = None
        self._sleep: SleepSignal | None = None
        self._restarted = asyncio.Event()
        self.kind: EngineKind | None = None if chosen.engine_kind == "auto" else KINDS[chosen.engine_kind]
        self.canary: CanarySignal | None = None
        self.identity = EngineIdentity()
        self.processes = 0  # of the engine, as they followed each other
        self._missing: set[str] = set()  # paths that this process answered 404

    @property
    def kind_name(self) -> str:
        """The engine's kind; "auto" until it is known."""
        return self.kind.name if self.kind else "auto"

    def read(self) -> Reading[EngineSample]:
        """The last reading of the engine's metrics, without waiting."""
        return self._scrape.read() if self._scrape else Absent("the engine has not answered yet")

    @property
    def resting(self) -> str:
        """The reason code "engine_sleeping" or "engine_paused"; "" if the engine is awake or does not report it."""
        reading = self.read()
        if isinstance(reading, Value) and reading.value.sleeping:
            return "engine_sleeping"
        return self._sleep.read() if self._sleep else ""

    @property
    def unanswered(self) -> bool:
        """Whether the engine accepts connections and does not respond: its API or all of it hangs."""
        return self._scrape is not None and self._scrape.unanswered

    @property
    def canary_disturbs(self) -> bool:
        """Whether a canary costs this engine's users something: then only a suspicion is worth one."""
        kind = self.kind
        return kind is not None and (kind.canary_disturbs or (kind.slots_cache and self.identity.slots == 1))

    def page(self) -> str | None:
        """The engine's metrics page; None if there is none or it is stale."""
        return self._scrape.page() if self._scrape else None

    def last_page(self, max_bytes: int) -> tuple[float, str] | None:
        """(age in seconds, first `max_bytes`) of the engine's last metrics page, however old."""
        return self._scrape.last_page(max_bytes) if self._scrape else None

    def engine_restarted(self) -> None:
        """Recognise the engine again: a new process may differ in kind, model and accepted canaries."""
        if self.canary is not None:
            self.canary.forget_model()
        self.processes += 1
        self._restarted.set()

    async def run(self, opened: asyncio.Event) -> None:
        """Wait for the engine's port; then recognise each engine process and read from it, until cancelled."""
        try:
            await asyncio.wait_for(opened.wait(), FIRST_CONNECT_TIMEOUT_S)
        except TimeoutError:
            _log.info("engine %s: not reachable yet; retrying every second", self._settings.engine)
        await opened.wait()
        while True:
            self._restarted.clear()
            await self._set_up()
            async with asyncio.TaskGroup() as group:
                readers = [group.create_task(signal.run()) for signal in (self._scrape, self._sleep) if signal]
                readers.append(group.create_task(self._identify(self.kind)))
                await self._restarted.wait()
                for reader in readers:
                    reader.cancel()

    async def _set_up(self) -> None:
        """Recognise this engine process and create its signals."""
        self._missing.clear()
        if self._settings.engine_kind == "auto":
            name = await self._recognise()
            if name != self.kind_name:
                _log.info("engine %s: recognised as %s", self._settings.engine, name)
            self.kind = KINDS[name]
        assert self.kind is not None
        kind, url = self.kind, self._settings.engine
        sleep = self._sleep = SleepSignal(self._session, url, kind.signs, self._headers)
        self.canary = CanarySignal(
            self._session,
            url,
            kind,
            self._headers,
            model=self._settings.canary_model,
            priority=await self._priority(kind),
            asleep=partial(_is_asleep, sleep) if kind.wakes else None,
            is_idle=self._is_idle,
        )
        page = kind.metrics_path if kind.series else ""
        self._scrape = ScrapeSignal(
            url + (page or kind.contact_path),
            partial(_parse, kind) if page else None,
            headers=self._headers,
            contact=url + kind.contact_path if kind.page_hangs else "",
            sleep_state=sleep.read if kind.wakes else None,
        )

    def _is_idle(self) -> bool:
        reading = self.read()
        return isinstance(reading, Value) and reading.value.running == 0

    async def _identify(self, kind: EngineKind | None) -> None:
        """Request models, version and sizes until the models are known; what is not there is asked for once."""
        assert kind is not None
        interval = PROBE_RETRY_INTERVAL_S
        while True:
            pages: dict[str, bytes] = {}
            for path in kind.model_paths:
                if path not in self._missing and (pages := await self._request(path)):
                    break
            identity = registry.identity({**pages, **await self._request(*kind.identity_paths)})
            if identity.models:
                if not identity.prepared and self._settings.images != "off":
                    _log.info("engine %s: %s", self._settings.engine, registry.NO_PNM)
                self.identity = identity
                return
            await asyncio.sleep(interval)
            interval = min(2 * interval, MAX_IDENTITY_INTERVAL_S)

    async def _recognise(self) -> str:
        """The engine's kind; `openai` after MAX_INCONCLUSIVE_ATTEMPTS."""
        attempts = 0
        while True:
            url = self._settings.engine
            answers = await probe_engine(self._session, url, self._headers, REQUEST_TIMEOUT_S, self._missing)
            self._note_missing(answers)
            name = registry.recognise(answers.pages)
            status = answers.status[MODELS]
            attempts += status not in registry.LOADING_STATUSES
            is_last = attempts >= MAX_INCONCLUSIVE_ATTEMPTS or registry.is_foreign(answers.pages)
            if name == "openai" and is_last and status in (401, 403):
                _log.warning("engine %s requires an API key; set --engine-key", url)
            if name != "openai" or is_last:
                return name
            await asyncio.sleep(PROBE_RETRY_INTERVAL_S)

    async def _priority(self, kind: EngineKind) -> int | None:
        """The priority of canaries; requested from the engine if its settings decide it."""
        if kind.read_priority is None:
            return kind.priority
        for path in kind.info_paths:
            if (page := (await self._request(path)).get(path)) is not None:
                return kind.read_priority(page)
        return kind.priority

    async def _request(self, *paths: str) -> dict[str, bytes]:
        """The pages that are there, of these paths; those that were 404 before are not asked for again."""
        answers = ProbeAnswers()
        there = [path for path in paths if path not in self._missing]
        await request_pages(answers, self._session, self._settings.engine, there, self._headers, REQUEST_TIMEOUT_S)
        self._note_missing(answers)
        return answers.pages

    def _note_missing(self, answers: ProbeAnswers) -> None:
        self._missing |= {path for path, status in answers.status.items() if status == MISSING_STATUS}


async def _is_asleep(sleep: SleepSignal) -> bool:
    return bool(await sleep.poll())


def _parse(kind: EngineKind, page: bytes, at: float) -> EngineSample:
    return metrics_parser.parse(page, kind)
