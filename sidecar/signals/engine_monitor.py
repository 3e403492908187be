"""The sidecar's own contact with the engine: its kind, metrics, canary, and whether it sleeps.

- The kind is recognised when the engine first responds, and again after each restart of its process. Until then there
  is nothing to read and nothing to send.
- An engine that cannot be recognised is `openai`, the kind that assumes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from functools import partial
from typing import Final

import aiohttp

from sidecar.engines import metrics_parser, registry
from sidecar.engines.engine_type import MODELS, EngineKind
from sidecar.engines.registry import KINDS
from sidecar.readings import EngineIdentity, EngineSample, Reading, Value
from sidecar.settings import Settings
from sidecar.signals.canary import CanarySignal
from sidecar.signals.contact_pace import ContactPace
from sidecar.signals.engine_address import EngineAddress
from sidecar.signals.identify import MISSING_STATUS, ProbeAnswers, probe_engine, request_pages
from sidecar.signals.image_support import ImageSupport
from sidecar.signals.metrics_scrape import BATCH_TIMEOUT_S, PAGE_TIMEOUT_S, ScrapeSignal
from sidecar.signals.sleep_state import SleepSignal

# A running engine accepts a connection within this time; the second attempt comes after a second.
FIRST_CONNECT_TIMEOUT_S: Final = 0.5
PROBE_RETRY_INTERVAL_S: Final = 1.0
REQUEST_TIMEOUT_S: Final = 5.0
MAX_INCONCLUSIVE_ATTEMPTS: Final = 3
# Between requests to an engine that names no model.
MAX_IDENTITY_INTERVAL_S: Final = 30.0

_log = logging.getLogger(__name__)


def open_session(address: EngineAddress) -> aiohttp.ClientSession:
    """A session that never reuses a connection: a canary on one that the engine is closing would look like a hang."""
    return aiohttp.ClientSession(connector=address.connector(force_close=True), cookie_jar=aiohttp.DummyCookieJar())


class EngineMonitor:
    """Watches one engine. `canary` is None until its kind is known."""

    def __init__(self, session: aiohttp.ClientSession, chosen: Settings) -> None:
        self._session = session
        self._settings = chosen
        self._address = EngineAddress(chosen.engine, chosen.engine_ca)
        self._pace = ContactPace()
        self._trouble = ""
        self._headers = {"authorization": f"Bearer {chosen.engine_key}"} if chosen.engine_key else {}
        self.scrape = ScrapeSignal("", None, absent="the engine has not answered yet")
        self._sleep = SleepSignal(session, "", (), {})
        self._silent = False  # it takes connections and does not answer what would recognise it
        self._restarted = asyncio.Event()
        self.kind: EngineKind | None = None if chosen.engine_kind == "auto" else KINDS[chosen.engine_kind]
        self.canary: CanarySignal | None = None
        self.identity = EngineIdentity()
        self._identified = asyncio.Event()  # of this process of the engine
        self._images = ImageSupport(chosen.model) if chosen.images != "off" and chosen.model else None
        self.processes = 0  # of the engine, as they followed each other
        self._missing: set[str] = set()  # paths that this process answered 404

    @property
    def kind_name(self) -> str:
        """The engine's kind; "auto" until it is known."""
        return self.kind.name if self.kind else "auto"

    def read(self) -> Reading[EngineSample]:
        """The last reading of the engine's metrics, without waiting."""
        return self.scrape.read()

    @property
    def resting(self) -> str:
        """The reason code "engine_sleeping" or "engine_paused"; "" if the engine is awake or does not report it."""
        reading = self.read()
        if isinstance(reading, Value) and reading.value.sleeping:
            return "engine_sleeping"
        return self._sleep.read()

    @property
    def denied_rests(self) -> Mapping[str, float]:
        """The reasons of a rest that the engine denies, and when it was asked."""
        return self._sleep.denied

    @property
    def unanswered(self) -> bool:
        """Whether the engine accepts connections and does not respond: its API or all of it hangs."""
        return self._silent or self.scrape.unanswered

    @property
    def canary_disturbs(self) -> bool:
        """Whether a canary costs this engine's users something: then only a suspicion is worth one.

        A page that hangs with the engine, and is late while nothing else is known to be outstanding, is one.
        """
        kind = self.kind
        if kind is None or (kind.page_hangs and self.scrape.is_late and not self._pace.busy.is_set()):
            return False
        return kind.canary_disturbs or (kind.slots_cache and self.identity.slots == 1)

    @property
    def wakes(self) -> bool:
        """Whether the engine sleeps when it has been idle, if it sleeps at all, and any request wakes it."""
        return self.kind is not None and self.kind.wakes

    @property
    def trouble(self) -> str:
        """Why no connection to the engine can be made: what is wrong, a colon, what to do; "" if none is known."""
        return self.scrape.trouble or self._trouble

    @property
    def images_pass(self) -> str:
        """Why images pass unprepared to this engine: a code of engines.image_loading; "" if they are prepared."""
        return self._images.reason if self._images is not None else ""

    def set_busy(self, busy: bool) -> None:
        """Whether there is work for the engine, or a doubt about it; otherwise it is soon asked less often."""
        (self._pace.busy.set if busy else self._pace.busy.clear)()

    def engine_restarted(self) -> None:
        """Recognise the engine again: a new process may differ in kind, model and accepted canaries."""
        if self.canary is not None:
            self.canary.forget_model()
        if self._images is not None:
            self._images.forget()
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
                work = (
                    self.scrape.run(self._session),
                    self._sleep.run(),
                    self._identify(self.kind),
                    self._check_images(),
                )
                readers = [group.create_task(reading) for reading in work]
                await self._restarted.wait()
                for reader in readers:
                    reader.cancel()

    async def _set_up(self) -> None:
        """Recognise this engine process and create its signals."""
        self._missing.clear()
        self._identified.clear()
        self.scrape.unanswered = False  # that was the process before
        if self._settings.engine_kind == "auto":
            name = await self._recognise()
            if name != self.kind_name:
                _log.info("engine %s: recognised as %s", self._settings.engine, name)
            self.kind = KINDS[name]
        assert self.kind is not None
        kind, url, model = self.kind, self._address.base, self._settings.canary_model
        sleep = self._sleep = SleepSignal(self._session, url, kind.signs, self._headers, pace=self._pace)
        priority, asleep = await self._priority(kind), sleep.poll if kind.wakes else None
        self.canary = CanarySignal(self._session, url, kind, self._headers, model, priority, asleep, self._is_idle)
        self.scrape = ScrapeSignal(
            url + (kind.metrics_path if kind.series else kind.contact_path),
            partial(metrics_parser.parse, kind=kind) if kind.series else None,
            headers=self._headers,
            contact=url + kind.contact_path,
            timeout=BATCH_TIMEOUT_S if kind.page_hangs else PAGE_TIMEOUT_S,
            sleep_state=sleep.read if kind.wakes else None,
            explain=self._address.explain,
            pace=self._pace,
        )

    def _is_idle(self) -> bool:
        reading = self.read()
        return isinstance(reading, Value) and reading.value.running == 0

    async def _identify(self, kind: EngineKind | None) -> None:
        """Request models, version and sizes until the models are known; what is not there is asked for once.

        The settings are those of the first page that is scraped, so that no second page is requested.
        """
        assert kind is not None
        interval, paths = PROBE_RETRY_INTERVAL_S, [path for path in kind.identity_paths if path != kind.metrics_path]
        while True:
            pages: dict[str, bytes] = {}
            for path in kind.model_paths:
                if path not in self._missing and not pages:
                    found = await self._request(path)
                    await self._note_trouble(found)
                    pages = found.pages
            pages = {**pages, **(await self._request(*paths)).pages}
            identity = registry.identity(pages)
            if identity.models:
                self.identity = identity
                self._identified.set()
                break
            self._missing -= set(kind.model_paths)  # a front may have none until its models are there
            await asyncio.sleep(interval)
            interval = min(2 * interval, MAX_IDENTITY_INTERVAL_S)
        pages["/metrics"] = await self.scrape.first_page()
        self.identity = registry.identity(pages)

    async def _check_images(self) -> None:
        """Find out whether this engine process gets prepared images."""
        await self._identified.wait()
        if self._images is not None:
            url, model = self._address.base, self._settings.canary_model
            about = self.kind_name, self.identity, lambda: self.resting
            await self._images.run(self._session, url, self._headers, model, *about)

    async def _recognise(self) -> str:
        """The engine's kind; `openai` after MAX_INCONCLUSIVE_ATTEMPTS."""
        url, attempts = self._settings.engine, 0
        while True:
            answers = await probe_engine(
                self._session, self._address.base, self._headers, REQUEST_TIMEOUT_S, self._missing
            )
            self._note_missing(answers)
            await self._note_trouble(answers)
            self._silent = answers.unanswered
            name, status = registry.recognise(answers.pages), answers.status[MODELS]
            attempts += status not in registry.LOADING_STATUSES
            if name != "openai" or registry.is_foreign(answers.pages):
                self._silent = False
                return name
            if attempts >= MAX_INCONCLUSIVE_ATTEMPTS:
                self._silent = False
                if status in (401, 403):
                    _log.warning("engine %s requires an API key; set --engine-key", url)
                return name
            await asyncio.sleep(PROBE_RETRY_INTERVAL_S)

    async def _priority(self, kind: EngineKind) -> int | None:
        """The priority of canaries; requested from the engine if its settings decide it."""
        if kind.read_priority is None:
            return kind.priority
        for path in kind.info_paths:
            if (page := (await self._request(path)).pages.get(path)) is not None:
                return kind.read_priority(page)
        return kind.priority

    async def _request(self, *paths: str) -> ProbeAnswers:
        """The pages that are there, of these paths; those that were 404 before are not asked for again."""
        answers = ProbeAnswers()
        there = [path for path in paths if path not in self._missing]
        await request_pages(answers, self._session, self._address.base, there, self._headers, REQUEST_TIMEOUT_S)
        self._note_missing(answers)
        return answers

    def _note_missing(self, answers: ProbeAnswers) -> None:
        self._missing |= {path for path, status in answers.status.items() if status == MISSING_STATUS}

    async def _note_trouble(self, answers: ProbeAnswers) -> None:
        """Find out why nothing can be read, where that is so, and log each new reason."""
        before, self._trouble = self._trouble, await self._address.explain_answers(self._session, answers)
        if self._trouble not in ("", before):
            _log.warning("engine %s: %s", self._settings.engine, self._trouble)
