"""Shared by the tests of the live page: scripted snapshots, the site in a thread, and a browser."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from selenium import webdriver

from sidecar import events, readings, snapshot
from sidecar.health import probes
from sidecar.report import live_page

from ..waiting import PATIENCE
from .snapshots import GPU, SNAPSHOT

Script = Callable[..., Any]
WALL = 1_763_694_000.0  # when the scripted story begins

# --- scripted snapshots ---


def verdict(
    state: events.State = "progressing", reason: str = "progress", detail: str = "", since: float = 0.0, **evidence: Any
) -> events.Verdict:
    return events.Verdict(state, reason, detail or f"{state} in the script", since, WALL + since, evidence)


def moment(at: float = 600.0, **changed: Any) -> snapshot.Snapshot:
    """The shared snapshot at `at`, with all that the page shows, and with the given fields replaced."""
    cold = readings.Absent("not supported under MIG")
    gpu = replace(GPU, power=readings.Value(640.0, at), temperature=cold, xid_errors=((31, 2),))
    whole = replace(
        SNAPSHOT,
        at=at,
        at_wall=WALL + at,
        version="0.1.0",
        verdict=verdict(),
        tenants=(
            snapshot.TenantUse(
                "acme", 4, 2.2, 812.5, 1900, 820_000, (("ok", 1880), ("client_cancelled", 14), ("stalled", 6))
            ),
            snapshot.TenantUse("globex", 2, 0.9, 240.0, 700, 310_000, (("ok", 700),)),
            snapshot.TenantUse("", 1, 0.11, 31.0, 96, 41_000, (("ok", 95), ("rejected", 1))),
        ),
        images=snapshot.ImageUse(
            (("ok", 412), ("passed", 9), ("rejected", 3)),
            (("decode", 412, 2.48), ("resize", 412, 1.61), ("normalise", 412, 0.33), ("encode", 412, 0.9)),
            188_000_000,
            402_000_000,
        ),
        images_device="cpu",
        engine=readings.Value(
            readings.EngineSample(7.0, 2.0, 0.46, 9.1e6, 1.2e6, 2690.0, None, WALL - 86400, False), at, 0.012
        ),
        gpus=readings.Value((gpu,), at),
        own=readings.Value(readings.ProcessSample(17, 48 << 20, 21.5, 5), at),
        relays=(snapshot.RelayUse(0, 21, 0, 5, 0.0009, 0.4), snapshot.RelayUse(1, 22, 1, 4, 0.0013, 0.7)),
        canary=events.CanaryResult("ok", at - 61.0, at - 60.8, 8.0),
        changes=(verdict(), verdict("idle", "no_work", since=-30.0)),
        place=snapshot.PodNames("llm-7d9f6c5b8-x2k4p", "serving", "gpu-node-12"),
        models=("Qwen/Qwen2.5-VL-7B-Instruct",),
        engine_version="0.32.0",
        probes=(("live", True), ("ready", True), ("startup", True)),
        latencies=snapshot.RecentLatencies(
            snapshot.Percentiles(0.21, 0.64, 41), snapshot.Percentiles(0.018, 0.027, 38)
        ),
    )
    return replace(whole, **changed)


def passes_in(kind: Any, state: events.State) -> bool:
    return state not in probes.FAILS[kind]


ACTS: tuple[tuple[float, events.State, str, str], ...] = (
    (0, "idle", "no_work", "Nothing is outstanding."),
    (45, "progressing", "progress", "Tokens are delivered."),
    (190, "quiet", "within_allowed", "A prefill of 96k tokens is outstanding; silent within the 42 s it may take."),
    (214, "progressing", "progress", "Tokens are delivered."),
    (300, "quiet", "within_allowed", "9 requests are outstanding; silent within the 8 s allowed."),
    (306, "suspect", "silent", "9 requests are outstanding and nothing moved for longer than the 8 s allowed."),
    (
        322,
        "stalled",
        "no_progress",
        "9 requests are outstanding, nothing moved for 24 s, and the canary starved after 8 s.",
    ),
    (362, "starting", "engine_restarting", "The engine takes no connection; its restart is under way."),
    (434, "progressing", "progress", "Tokens are delivered."),
)


def story(until: int) -> Iterator[snapshot.Snapshot]:
    """Ten minutes, one snapshot a second: idle, work, a long prefill, a stall, the restart, recovery."""
    noise = random.Random(7)
    total, changes = 1_200_000, []
    for at in range(until):
        begun = [act for act in ACTS if act[0] <= at]
        start, state, reason, detail = begun[-1]
        if start == at:
            evidence = {
                "progress_age": 24.1,
                "silence_allowed": 8.0,
                "ruled_by": "floor",
                "outstanding": 9,
                "canary": "starved",
            }
            changes.insert(
                0, verdict(state, reason, detail, at, **(evidence if state in ("suspect", "stalled") else {}))
            )
        down = 298 <= at < 434
        live = at >= 45 and not down and state != "quiet"
        rate = noise.gauss(820, 60) * min(1.0, (at - 44) / 30 if at < 298 else (at - 433) / 45) if live else 0.0
        flying = (
            max(1, round(7 + 2 * math.sin(at / 23) + noise.gauss(0, 0.4)))
            if live
            else (9 if 298 <= at < 362 else 0 if at < 45 or down else 6)
        )
        age = at - 298.0 if 298 <= at < 362 else at - 190.0 + 0.1 if state == "quiet" else noise.uniform(0.02, 0.3)
        total += round(rate)
        base = moment(float(at))
        load = replace(
            base.load,
            tokens_per_second=rate,
            requests_in_flight=flying,
            mu_in_flight=flying * 0.48,
            tokens_delivered_total=total,
            requests_waiting=3 if 298 <= at < 362 else max(0, flying - 7),
            mu_per_minute=rate * 0.05,
            utilization=max(rate * 0.05 / 100, flying * 0.48 / 12),
            limited_by="stock" if not live else "flow",
        )
        # of the last minute: after a minute of silence there is none
        first = snapshot.Percentiles(*(scale * noise.uniform(0.9, 1.1) for scale in (0.21, 0.64)), 41)
        token = snapshot.Percentiles(*(scale * noise.uniform(0.95, 1.05) for scale in (0.018, 0.027)), 38)
        seen = 50 <= at < 358 or at >= 436
        gpu = base.gpus.value[0]  # type: ignore[union-attr]
        busy = 0.0 if 362 <= at < 410 else 1.0 if 298 <= at < 362 else noise.uniform(0.86, 0.97) if flying else 0.02
        yield replace(
            base,
            verdict=changes[0],
            changes=tuple(changes),
            load=load,
            latencies=snapshot.RecentLatencies(first, token) if seen else snapshot.RecentLatencies(),
            probes=tuple((kind, passes_in(kind, state)) for kind in ("live", "ready", "startup")),
            progress_age=None if flying == 0 else age,
            silence_allowed=42.0 if 190 <= at < 214 else 8.0,
            silence_ruled_by="predicted" if 190 <= at < 214 else "floor",
            gpus=readings.Value((replace(gpu, utilization=readings.Value(busy, float(at))),), float(at)),
            canary_outstanding_since=float(at - 3) if state == "suspect" else None,
            canary=events.CanaryResult("starved", 307.0, 315.0, 8.0, "no token") if at >= 315 else base.canary,
            diagnoses=(
                events.DiagnosisSummary(
                    "20251121-030522-stalled",
                    WALL + 322,
                    "no_progress",
                    182_044,
                    "VLLM::EngineCore (pid 12): stopped (T)",
                ),
            )
            if at > 325
            else (),
            engine=readings.Failed("no answer from /metrics within 2 s") if down else base.engine,
        )


@pytest.fixture(name="verdict")
def _verdict() -> Script:
    return verdict


@pytest.fixture(name="moment")
def _moment() -> Script:
    return moment


@pytest.fixture(name="story")
def _story() -> Script:
    return story


# --- the page in a real browser ---


class Site:
    """The real feed and page on their own port, in a thread with its own loop, because Selenium blocks."""

    def __init__(self) -> None:
        self.feed = live_page.PageFeed()
        self.refused = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._runner, self.url = self._call(self._start())

    def publish(self, *snapshots: snapshot.Snapshot) -> None:
        async def send() -> None:
            for one in snapshots:
                self.feed.publish(one)

        self._call(send())

    def end_streams(self) -> None:
        self._loop.call_soon_threadsafe(self.feed.close)

    def stop(self) -> None:
        async def end() -> None:
            self.feed.close()
            await self._runner.cleanup()

        self._call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    async def _start(self) -> tuple[web.AppRunner, str]:
        app = web.Application()
        app.router.add_get("/", live_page.index)
        app.router.add_get("/events", self._events)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, f"http://127.0.0.1:{runner.addresses[0][1]}/"

    async def _events(self, request: web.Request) -> web.StreamResponse:
        response = await self.feed.events(request)
        if response.status == 503:
            self.refused.set()
        return response


@pytest.fixture(scope="module")
def chromium(requires: Callable[[str], Path]) -> Iterator[webdriver.Chrome]:
    binary = requires("chromium")
    options = webdriver.ChromeOptions()
    options.binary_location = str(binary)
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "disable-background-networking",
        "force-color-profile=srgb",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(requires("chromedriver"))))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def site() -> Iterator[Site]:
    running = Site()
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def open_page(chromium: webdriver.Chrome, site: Site) -> Iterator[Callable[..., webdriver.Chrome]]:
    """Opens the page at a width and in a color scheme; afterwards the browser must have logged no errors."""

    def opened(width: int = 1280, height: int = 1500, scheme: str = "light") -> webdriver.Chrome:
        chromium.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        chromium.get(site.url)
        return chromium

    chromium.get_log("browser"), chromium.get_log("performance")  # what an earlier test left
    yield opened
    complaints = [entry["message"] for entry in chromium.get_log("browser")]
    chromium.get("about:blank")
    assert [text for text in complaints if "503" not in text] == []
