"""The budget that replicas share: at most N of them are restarted at once. Its places are N Leases, NAME-0, NAME-1 and so on.

Rules:
- A place is asked for when nothing but the budget holds a kill back, kept until the engine serves again, and given back then.
- Clocks of nodes differ, so a holder's time stamps are never compared with ours: a Lease counts as abandoned when *we* have seen it
  unchanged for its duration (as the authors of the API ask: github.com/kubernetes/kubernetes/pull/64246).
- Two that grab at once: the API server takes one and answers the other 409, because each names the version that it has read.
- Nobody waits for the API server: it is asked in a task of its own, which says `unreachable` where it gets no answer; then fleet.py
  waits for a bounded time and decides alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import aiohttp

from sidecar.control.k8s_lease import ANSWER, DURATION, LIBRARY, Leases, connect, facts_of, told
from sidecar.errors import StartError
from sidecar.health.kill_policy import Budget, share

RENEW: Final = 15.0  # seconds between signs
RETRY: Final = 3.0  # seconds between looks of one who waits
LEAVING: Final = 2.0  # seconds for giving a place back at the end
MAX_DURATION: Final = 600  # a foreign Lease is not believed to last longer
UNASKED: Final = Budget("unreachable", detail="not asked yet")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """Where the places are: Leases NAME-0 to NAME-(places - 1) of a namespace."""

    namespace: str
    name: str
    places: int


@dataclass(frozen=True, slots=True)
class Seen:
    """A Lease, and since when it has looked like that, on our own clock."""

    holder: str
    version: str
    duration: float
    since: float


def target(text: str) -> Target:
    """NAMESPACE/NAME:N, as the settings have checked it."""
    namespace, _, rest = text.partition("/")
    name, _, places = rest.rpartition(":")
    return Target(namespace, name, int(places))


def look(before: Seen | None, holder: str, version: str, duration: int | None, now: float) -> Seen:
    """A Lease as it is read now, compared with the last look."""
    seen = Seen(holder, version, float(min(duration or DURATION, MAX_DURATION)), now)
    unchanged = before is not None and replace(before, since=now) == seen
    return before if before is not None and unchanged else seen


def free(seen: Seen, me: str, now: float) -> bool:
    """Whether the place may be taken: nobody's, ours, or abandoned."""
    return seen.holder in ("", me) or now - seen.since >= seen.duration


class SharedBudget:
    """One pod's view of the budget. `want` and `read` return at once; `run` does the talking."""

    def __init__(self, where: Target, me: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._where, self._me, self._clock = where, me, clock
        self._wanted = False
        self._changed = asyncio.Event()
        self._held: str | None = None
        self._renewed_at = 0.0
        self._seen: dict[str, Seen] = {}
        self._answer = UNASKED
        first = int(share(me) * where.places)  # so that not all begin with the same place
        self._names = [f"{where.name}-{(first + n) % where.places}" for n in range(where.places)]

    def want(self, wanted: bool) -> None:
        """Ask for a place, or give it back."""
        if wanted != self._wanted:
            self._wanted = wanted
            self._answer = UNASKED
            self._changed.set()

    def read(self) -> Budget:
        """What is known now; a place that could not be renewed for its duration is ours no more."""
        if self._held is not None and self._clock() - self._renewed_at < DURATION:
            return Budget("granted", detail=self._held)
        return self._answer

    async def run(self) -> None:
        """Keep what `want` says, until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._wanted:
                try:
                    async with await connect() as client:
                        await self._serve(Leases(client, self._where.namespace))
                except Exception as e:  # noqa: BLE001  a library's error must not end the sidecar
                    self._lost(told(e, self._where.namespace))
                    await self._pause(RETRY)

    async def _serve(self, leases: Leases) -> None:
        try:
            while self._wanted or self._held is not None:
                await self.step(leases)
                await self._pause(RETRY if self._held is None or not self._wanted else RENEW)
        finally:
            if self._held is not None:
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(LEAVING):
                        await self._release(leases)

    async def step(self, leases: Leases) -> None:
        """One round: take a place, renew it, or give it back. Never raises for the API server's sake."""
        try:
            async with asyncio.timeout(ANSWER * (self._where.places + 1)):
                if not self._wanted:
                    await self._release(leases)
                elif self._held is not None:
                    await self._renew(leases)
                else:
                    await self._take(leases)
        except (aiohttp.ClientError, OSError, TimeoutError, leases.errors) as e:
            self._lost(told(e, self._where.namespace))
            if self._held is not None and self._clock() - self._renewed_at >= DURATION:
                self._held = None  # others may have it by now

    async def _take(self, leases: Leases) -> None:
        holders = []
        for name in self._names:
            lease = await leases.read(name)
            now = self._clock()
            if lease is None:
                taken = await leases.create(name, self._me)
            else:
                self._seen[name] = seen = look(self._seen.get(name), *facts_of(lease), now)
                taken = free(seen, self._me, now) and await leases.replace(lease, self._me)
                holders.append(seen.holder)
            if taken:
                self._held, self._renewed_at = name, now
                _log.info("restart budget: holding %s/%s", self._where.namespace, name)
                return
        self._answer = Budget("taken", detail="held by " + ", ".join(sorted({h for h in holders if h}) or ["others"]))

    async def _renew(self, leases: Leases) -> None:
        assert self._held is not None
        lease, now = await leases.read(self._held), self._clock()
        if lease is None or facts_of(lease)[0] != self._me:
            self._held = None  # abandoned by our silence, and taken by another
        elif await leases.replace(lease, self._me):
            self._renewed_at = now

    async def _release(self, leases: Leases) -> None:
        if self._held is None:
            return
        lease = await leases.read(self._held)
        if lease is not None and facts_of(lease)[0] == self._me and not await leases.replace(lease, None):
            return  # somebody wrote in between: the next round looks again
        _log.info("restart budget: gave back %s/%s", self._where.namespace, self._held)
        self._held = None

    def _lost(self, detail: str) -> None:
        if self._answer.state != "unreachable" or self._answer is UNASKED:
            _log.warning("restart budget: no answer of the API server (%s)", detail)
            self._answer = Budget("unreachable", self._clock(), detail)

    async def _pause(self, seconds: float) -> None:
        """Wait, but not beyond a change of mind."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        self._changed.clear()


def shared(text: str, me: str) -> SharedBudget | None:
    """The budget that the settings name; None where they name none. Raises StartError where the library is missing."""
    if not text:
        return None
    if importlib.util.find_spec(LIBRARY) is None:
        raise StartError("--restart-budget: the extra is not installed; pip install 'inference-sidecar[fleet]'")
    return SharedBudget(target(text), me)
