"""Our own contact with the engine: which kind it is, its metrics, its canary, whether it rests.

The kind is found when the engine first answers, and anew when its process is another one; until then there is nothing to read
and nothing to send. What the engine refuses to say leaves it `openai`, the kind of which nothing is assumed.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Final

import aiohttp

from sidecar.engines import metrics_parser, registry
from sidecar.engines.engine_type import EngineKind
from sidecar.engines.registry import KINDS
from sidecar.readings import Absent, EngineIdentity, EngineSample, Reading, Value
from sidecar.settings import Settings
from sidecar.signals.canary import CanarySignal
from sidecar.signals.identify import LOADING_STATUS, ProbeAnswers, ask, probe_engine
from sidecar.signals.metrics_scrape import ScrapeSignal
from sidecar.signals.sleep_state import SleepSignal

FIRST_LOOK_S: Final = 0.5  # seconds in which the port of an engine that is there opens; the second look comes after one
PROBE_RETRY_S: Final = 1.0  # seconds between attempts to meet the engine
QUESTION_TIMEOUT_S: Final = 5.0  # seconds for the answer to one
IDENTITY_PATHS: Final = ("/v1/models", "/version", "/metrics")
MAX_SILENT_ANSWERS: Final = 3  # answers that say nothing, before the kind is `openai`

_log = logging.getLogger(__name__)


def open_session() -> aiohttp.ClientSession:
    """For Contact. No connection is used twice: a canary on one that the engine is closing would look like a hang."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True), cookie_jar=aiohttp.DummyCookieJar())


class EngineMonitor:
    """One engine. `canary` is None until its kind is known."""

    def __init__(self, session: aiohttp.ClientSession, chosen: Settings) -> None:
        self._session = session
        self._settings = chosen
        self._headers = {"authorization": f"Bearer {chosen.engine_key}"} if chosen.engine_key else {}
        self._scrape: ScrapeSignal | None = None
        self._rest: SleepSignal | None = None
        self._another = asyncio.Event()
        self.kind: EngineKind | None = None if chosen.engine_kind == "auto" else KINDS[chosen.engine_kind]
        self.canary: CanarySignal | None = None
        self.identity = EngineIdentity()
        self.processes = 0  # of the engine, as they followed each other

    @property
    def kind_name(self) -> str:
        """The engine's kind; "auto" until it is known."""
        return self.kind.name if self.kind else "auto"

    def read(self) -> Reading[EngineSample]:
        """The last reading of the engine's metrics."""
        return self._scrape.read() if self._scrape else Absent("the engine has not answered yet")

    @property
    def resting(self) -> str:
        """The reason code of the engine's rest, "engine_sleeping" or "engine_paused"; "" where it is awake or does not say."""
        reading = self.read()
        if isinstance(reading, Value) and reading.value.sleeping:
            return "engine_sleeping"
        return self._rest.read() if self._rest else ""

    @property
    def unanswered(self) -> bool:
        """Whether the engine takes connections and answers nothing on them: its API's loop is blocked, or all of it hangs."""
        return self._scrape is not None and self._scrape.unanswered

    def page(self) -> str | None:
        """The engine's own metrics page, if a fresh one was read."""
        return self._scrape.page() if self._scrape else None

    def last_page(self, most: int) -> tuple[float, str] | None:
        """(age in seconds, first `most` bytes) of the last metrics page of the engine, however old."""
        return self._scrape.last_page(most) if self._scrape else None

    def engine_restarted(self) -> None:
        """The engine is another process now: it may be of another kind, serve another model, take other canaries."""
        if self.canary is not None:
            self.canary.forget_model()
        self.processes += 1
        self._another.set()

    async def run(self, opened: asyncio.Event) -> None:
        """Wait until the engine's port is open; then meet it and read from it until cancelled, once for each engine process."""
        try:
            await asyncio.wait_for(opened.wait(), FIRST_LOOK_S)
        except TimeoutError:
            _log.info("engine %s: not there yet; trying again every second", self._settings.engine)
        await opened.wait()
        while True:
            self._another.clear()
            await self._meet()
            async with asyncio.TaskGroup() as group:
                readers = [group.create_task(signal.run()) for signal in (self._scrape, self._rest) if signal]
                readers.append(group.create_task(self._identify()))
                await self._another.wait()
                for reader in readers:
                    reader.cancel()

    async def _meet(self) -> None:
        """Learn what there is to learn of this engine process, and begin anew with it."""
        if self._settings.engine_kind == "auto":
            name = await self._recognise()
            if name != self.kind_name:
                _log.info("engine %s: recognised as %s", self._settings.engine, name)
            self.kind = KINDS[name]
        assert self.kind is not None
        kind, url = self.kind, self._settings.engine
        rest = self._rest = SleepSignal(self._session, url, kind.signs, self._headers)
        self.canary = CanarySignal(
            self._session, url, kind, self._headers, model=self._settings.canary_model,
            priority=await self._priority(kind), asleep=partial(_asleep, rest) if kind.wakes else None,
        )  # fmt: skip
        page = kind.metrics_path if kind.series else ""
        self._scrape = ScrapeSignal(
            url + (page or kind.contact_path), partial(_parse, kind) if page else None, headers=self._headers,
            contact=url + kind.contact_path if kind.page_hangs else "", rests=rest.read if kind.wakes else None,
        )  # fmt: skip

    async def _identify(self) -> None:
        """Ask for its models and version, until it tells the models; not every engine tells a version."""
        while True:
            met = ProbeAnswers()
            await ask(met, self._session, self._settings.engine, IDENTITY_PATHS, self._headers, QUESTION_TIMEOUT_S)
            found = registry.identity(met.pages)
            if found.models:
                if not found.prepared and self._settings.images != "off":
                    _log.info("engine %s: %s", self._settings.engine, registry.NO_PNM)
                self.identity = found
                return
            await asyncio.sleep(PROBE_RETRY_S)

    async def _recognise(self) -> str:
        """Ask until it says what it is; an engine that answers and says nothing is taken for `openai`."""
        silent = 0
        while True:
            met = await probe_engine(self._session, self._settings.engine, self._headers, QUESTION_TIMEOUT_S)
            name = registry.recognise(met.pages)
            silent += met.status["/v1/models"] not in LOADING_STATUS
            if name == "openai" and silent >= MAX_SILENT_ANSWERS and met.status["/v1/models"] in (401, 403):
                _log.warning("engine %s: it wants a key; give it with --engine-key", self._settings.engine)
            if name != "openai" or silent >= MAX_SILENT_ANSWERS:
                return name
            await asyncio.sleep(PROBE_RETRY_S)

    async def _priority(self, kind: EngineKind) -> int | None:
        """What puts a canary first; asked of the engine where its settings decide."""
        if kind.read_priority is None:
            return kind.priority
        met = ProbeAnswers()
        for path in kind.info_paths:
            await ask(met, self._session, self._settings.engine, (path,), self._headers, QUESTION_TIMEOUT_S)
            if path in met.pages:
                return kind.read_priority(met.pages[path])
        return kind.priority


async def _asleep(rest: SleepSignal) -> bool:
    return bool(await rest.poll())


def _parse(kind: EngineKind, page: bytes, at: float) -> EngineSample:
    return metrics_parser.parse(page, kind)
