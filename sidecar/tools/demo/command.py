"""A stall and its recovery on one machine: an engine serves, stalls, is killed and restarted, and serves again.

The URL of the live page is printed first, then one line per event with the seconds since the start. Whatever ends the
demo, the processes it started end with it. Their output goes to files, which are named on failure.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp

from sidecar.flags import address, existing_dir, flag, integer, number, one_of
from sidecar.tools.demo import processes
from sidecar.tools.demo.admin_client import AdminClient
from sidecar.tools.demo.kubelet import EventKind, Kubelet, KubeletEvent
from sidecar.tools.demo.processes import MODEL, DemoProcesses, url
from sidecar.tools.demo.scorecard import Scorecard, summary, summary_json
from sidecar.tools.demo.traffic import OUTCOMES, DemoTraffic, TrafficPlan, TrafficTally, load_pictures, make_pictures

WATCH_INTERVAL_S: Final = 0.25
PROGRESS_INTERVAL_S: Final = 5.0
RECOVERY_ROOM_S: Final = 20.0  # no stall without this time left to detect it, kill the engine and recover
STALLS: Final = ("freeze", "freeze_busy", "kv_deadlock", "livelock")  # faults that stop all tokens of the engine
SECONDS: Final = number(0, 86_400, "seconds")


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Settings of `sidecar demo`. Times are in seconds."""

    seconds: float = flag(0.0, SECONDS, "End after this many seconds, with a summary; 0: on Ctrl-C")
    images: str = flag("", existing_dir, "Directory of photographs to send; default: made ones")
    listen: tuple[str, int] = flag(("127.0.0.1", 8080), address, "Where the relay listens")
    admin: tuple[str, int] = flag(("127.0.0.1", 9400), address, "Where probes, load, metrics and the page are")
    stall_after: float = flag(15.0, SECONDS, "Seconds of service before each injected stall; 0: no stalls")
    fault: str = flag("freeze", one_of(*STALLS), "How the engine is made to stall")
    rate: float = flag(4.0, number(0.1, 1000), "Requests per second, on average")
    in_flight: int = flag(32, integer(1, 10_000), "Most requests under way")
    seed: int = flag(1, integer(0, 2**31), "Seed of the traffic")


def main(settings: DemoSettings, as_json: bool = False) -> int:
    """Run the demo to its end. Returns 0 if every stall was detected without a false alarm, otherwise 1."""
    return asyncio.run(_main(settings, as_json))


async def _main(settings: DemoSettings, as_json: bool) -> int:
    found = await asyncio.to_thread(load_pictures, Path(settings.images)) if settings.images else []
    stage = await asyncio.to_thread(processes.make, settings.listen, settings.admin)
    demo = Demo(settings, stage, found, as_json=as_json)
    failures = ["the demo itself failed"]
    try:
        demo.introduce()
        failures = await demo.run()
    finally:
        if failures:
            demo.say(f"logs: {stage.sidecar_log} and {stage.engine_log}")
        else:
            await asyncio.to_thread(shutil.rmtree, stage.directory, ignore_errors=True)
    return 1 if failures else 0


# The log line of each engine event.
ENGINE_LINES: Final[dict[EventKind, str]] = {
    "started": "engine started (pid {event.pid}, restarts: {event.restarts})",
    "probe_failed": "{event.probe} probe failed {event.run}/{event.threshold}: {event.detail}",
    "ready": "engine ready: it has served a token and its probes pass",
    "unready": "engine not ready: it would receive no traffic",
    "killing": "engine killed by the kubelet: its {event.probe} probe failed too often",
    "exited": "engine exited: {event.detail}",
    "backing_off": "engine restarts in {event.seconds:.0f} s (crash back-off)",
}


class Demo:
    """One run: the pod's two containers, the traffic, the stalls, and their scorecard."""

    def __init__(
        self, settings: DemoSettings, stage: DemoProcesses, found: list[str], *, as_json: bool = False
    ) -> None:
        self.settings: Final = settings
        self.stage: Final = stage
        self.card: Final = Scorecard()
        self._as_json = as_json
        self._pictures_found = found
        self._began = time.monotonic()
        self._stop = asyncio.Event()
        self._sidecar_up = asyncio.Event()
        self._ready = asyncio.Event()
        self._recovered = asyncio.Event()
        self._ending = False
        self._broken: list[str] = []
        self._traffic: DemoTraffic | None = None

    def say(self, line: str) -> None:
        """Print one line; where the result is JSON, as progress."""
        print(line, file=sys.stderr if self._as_json else sys.stdout, flush=True)

    def log(self, line: str) -> None:
        """Print one line, with the seconds since the start."""
        self.say(f"[{time.monotonic() - self._began:6.1f} s] {line}")

    def introduce(self) -> None:
        """Print the page's URL, and what the user should know before the start."""
        stage, settings = self.stage, self.settings
        self.say(f"page:   {url(stage.admin)}/")
        self.say(f'relay:  {url(stage.relay)}/v1 (OpenAI-compatible, model "{MODEL}")')
        stall = f"; stalls ({settings.fault}) after every {settings.stall_after:g} s of service"
        self.say(f"engine: scripted, behind the relay{stall if settings.stall_after else ''}")
        self.say(f"shortened settings: {processes.describe_quick_settings()}")
        for note in stage.notes:
            self.say(f"note:   {note}")
        end = f"The demo ends after {settings.seconds:g} s." if settings.seconds else "Press Ctrl-C to end."
        self.say(end)

    async def run(self) -> list[str]:
        """Run to the end and print the summary. Returns the failures, a line each."""
        for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # SIGHUP: a closed terminal
            asyncio.get_running_loop().add_signal_handler(signal_number, self._stop.set)
        sidecar = Kubelet(self.stage.sidecar(), self._on_sidecar)
        async with AdminClient(url(self.stage.admin)) as admin, sidecar as pod:
            await self._until_stopped(self._run_scene(admin), pod.failed(), self._stop.wait())
            return self._print_summary(await admin.model_units())

    async def _until_stopped(self, *work: Coroutine[Any, Any, object]) -> None:
        """Run the scene until the time is up, a signal arrives, or something fails."""
        tasks = [asyncio.create_task(part) for part in work]
        try:
            done, _ = await asyncio.wait(tasks, timeout=self._left(), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._ending = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    def _left(self) -> float:
        """Seconds until the end."""
        return max(0.0, self._began + (self.settings.seconds or math.inf) - time.monotonic())

    async def _run_scene(self, admin: AdminClient) -> None:
        """Run engine, traffic and stalls concurrently once the sidecar is up. Never returns."""
        settings, pictures = self.settings, self._pictures_found if self.stage.images else []
        if self.stage.images and not pictures:
            pictures = await asyncio.to_thread(make_pictures, settings.seed)
        await self._sidecar_up.wait()
        async with Kubelet(self.stage.engine_container(), self._on_engine) as kubelet, asyncio.TaskGroup() as group:
            group.create_task(kubelet.failed())
            group.create_task(self._watch_verdicts(admin))
            await self._ready.wait()
            plan = TrafficPlan(url(self.stage.relay), settings.rate, settings.in_flight, settings.seed, MODEL, pictures)
            self._traffic = DemoTraffic(plan)
            self.log(f"traffic: {settings.rate:g} requests/s on average, {len(pictures)} photographs available")
            group.create_task(self._traffic.run())
            group.create_task(self._progress(admin))
            group.create_task(self._stalls())

    def _on_sidecar(self, event: KubeletEvent) -> None:
        if self._ending:
            return
        if event.kind == "ready":
            self.log("sidecar up")
            self._sidecar_up.set()
        elif event.kind == "exited":
            self._broken.append(f"the sidecar exited ({event.detail})")
            self._stop.set()

    def _on_engine(self, event: KubeletEvent) -> None:
        if self._ending:
            return
        # start-up and readiness probes fail normally while it loads
        if event.kind != "probe_failed" or event.probe == "liveness":
            self.log(ENGINE_LINES[event.kind].format(event=event))
        if event.kind == "killing":
            self.card.killed(event.probe or "", event.at)
        elif event.kind == "exited":
            self.card.exited()
        elif event.kind == "ready":
            self.card.ready(event.at)
            self._ready.set()

    async def _watch_verdicts(self, admin: AdminClient) -> None:
        """Log verdict changes as they happen, and notice when a stall is detected and when it is over."""
        seen = time.time()
        while True:
            for change in await admin.changes(seen):
                seen = change["since"]
                self._log_change(change)
            if self._traffic and self.card.served(self._traffic.tally.last_ok):
                after = self._traffic.tally.last_ok - self.card.stalls[-1].injected
                self.log(f"RECOVERED: requests are served again, {after:.1f} s after the stall")
                self._recovered.set()
            await asyncio.sleep(WATCH_INTERVAL_S)

    def _log_change(self, change: dict[str, Any]) -> None:
        at = time.monotonic() - (time.time() - change["since"])
        self.log(f"verdict: {change['verdict']} ({change['reason']}) {change['detail']}".rstrip())
        if self.card.verdict(change["verdict"], change["reason"], at):
            self.log(f"DETECTED: {at - self.card.stalls[-1].injected:.1f} s after the stall was injected")

    async def _stalls(self) -> None:
        """Inject a stall after each `stall_after` seconds of service, while enough time remains to recover."""
        while self.settings.stall_after:
            self._recovered.clear()
            await asyncio.sleep(self.settings.stall_after)
            if self._left() < RECOVERY_ROOM_S:
                return
            self.log(f"STALL injected ({self.settings.fault}): the engine's port answers, but no tokens are generated")
            self.card.injected(time.monotonic())
            await self._inject()
            await self._recovered.wait()

    async def _inject(self) -> None:
        timeout = aiohttp.ClientTimeout(total=5)
        try:
            async with aiohttp.ClientSession(url(self.stage.engine), timeout=timeout, raise_for_status=True) as engine:
                await engine.post("/faults", json={"kind": self.settings.fault})
        except (aiohttp.ClientError, TimeoutError) as e:
            self._broken.append(f"the engine did not accept the fault ({type(e).__name__})")
            self._stop.set()

    async def _progress(self, admin: AdminClient) -> None:
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL_S)
            load = await admin.load()
            assert self._traffic
            tally = self._traffic.tally
            ok, others = tally.outcomes["ok"], sum(tally.outcomes.values()) - tally.outcomes["ok"]
            mu = "no /load"
            if load:
                mu = f"{load['mu']['in_flight']:.2f} MU in flight, {load['mu']['per_minute']:.0f} MU/min"
            self.log(f"{ok} requests ok, {others} not, {tally.open} in progress, {tally.pictures} images; {mu}")

    def _print_summary(self, mu: dict[str, float] | None) -> list[str]:
        tally = self._traffic.tally if self._traffic else TrafficTally()
        counts = {name: tally.outcomes[name] for name in OUTCOMES}
        failures = self._broken + self.card.failures()
        if self._traffic is None:
            failures.append("the engine never became ready")
        seconds = time.monotonic() - self._began
        if self._as_json:
            print(
                json.dumps(summary_json(self.card, counts, tally.pictures, mu, seconds, failures), indent=1), flush=True
            )
            return failures
        print("summary", *summary(self.card, counts, tally.pictures, mu, seconds), sep="\n")
        if self.settings.stall_after and not self.card.stalls:
            print(f"  no stall was injected: one needs {self.settings.stall_after + RECOVERY_ROOM_S:g} s of service")
        for line in failures:
            print(f"FAILED: {line}")
        praise = "all stalls detected, no false alarm" if self.card.stalls else "no false alarm"
        print("end" if failures else praise, flush=True)
        return failures
