"""Slots of the image workers, shared fairly among tenants.

Rules: a slot that becomes free goes to the next tenant in turn that waits, whatever the number of its jobs. While
others use images, a tenant whose jobs take long holds fewer slots than there are workers, so that a short job of
another never waits for a long one; a tenant that is alone, or whose jobs are short, may use all. At most `max_waiting`
jobs wait; over it the tenant with most of them loses its newest one. What is known of a tenant is forgotten when it has
had no job for a minute.

A job's time counts from when a worker took it. One event loop only; `now` is a parameter for tests.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

# Five times what a 12-megapixel JPEG takes.
LONG_JOB_S: Final = 0.25
WEIGHT_OF_LAST: Final = 0.25  # of the last job in a tenant's mean time
REMEMBERED_S: Final = 60.0
MAX_REMEMBERED: Final = 1024


class SlotsFull(Exception):
    """Too many jobs wait, and this one is of the tenant with most of them."""


@dataclass(slots=True)
class TenantShare:
    """What one tenant holds, and how long its jobs take."""

    held: int = 0
    mean_s: float = 0.0
    last_used: float = 0.0


class FairSlots:
    """`slots` slots in front of `workers` workers."""

    def __init__(
        self,
        slots: int,
        workers: int,
        max_waiting: int,
        *,
        long_job_s: float = LONG_JOB_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._free = slots
        self._share_of_long = max(1, workers - 1)
        self._max_waiting = max_waiting
        self._long_job_s = long_job_s
        self._now = now
        self._shares: OrderedDict[str, TenantShare] = OrderedDict()  # the least recently used first
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # the next in turn first

    async def acquire(self, tenant: str) -> None:
        """Wait for a slot. Raises SlotsFull; a cancelled wait leaves nothing behind."""
        share = self._use(tenant)
        if self._free and tenant not in self._waiting and self._may_take(share):
            self._grant(share)
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(waiter)
        self._drop_over_limit()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.release(tenant, None)  # granted, and cancelled before it could run
            else:
                self._remove(tenant, waiter)
            raise

    def release(self, tenant: str, seconds: float | None) -> None:
        """Give a slot back, after a job of `seconds`; None if no worker took it."""
        share = self._use(tenant)
        share.held -= 1
        self._free += 1
        if seconds is not None:
            share.mean_s += WEIGHT_OF_LAST * (seconds - share.mean_s)
        self._hand_out()

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return sum(map(len, self._waiting.values()))

    def _use(self, tenant: str) -> TenantShare:
        """A tenant's share, as the most recently used; those that have been idle for long are forgotten."""
        share = self._shares.setdefault(tenant, TenantShare())
        share.last_used = self._now()
        self._shares.move_to_end(tenant)
        until, excess = share.last_used - REMEMBERED_S, len(self._shares) - MAX_REMEMBERED
        forgotten: list[str] = []
        for name, oldest in self._shares.items():
            if oldest.last_used >= until and len(forgotten) >= excess:
                break
            if not oldest.held and name not in self._waiting and name != tenant:
                forgotten.append(name)
        for name in forgotten:
            del self._shares[name]
        return share

    def _may_take(self, share: TenantShare) -> bool:
        alone = len(self._shares) == 1
        return alone or share.mean_s < self._long_job_s or share.held < self._share_of_long

    def _grant(self, share: TenantShare) -> None:
        self._free -= 1
        share.held += 1

    def _hand_out(self) -> None:
        """Give the free slots to those who wait, in turn."""
        while self._free and (tenant := self._next_in_turn()) is not None:
            self._waiting.move_to_end(tenant)
            waiter = self._waiting[tenant][0]
            self._remove(tenant, waiter)
            if not waiter.done():  # else it was cancelled, and has not run since
                self._grant(self._shares[tenant])
                waiter.set_result(None)

    def _next_in_turn(self) -> str | None:
        return next((tenant for tenant in self._waiting if self._may_take(self._shares[tenant])), None)

    def _remove(self, tenant: str, waiter: asyncio.Future[None]) -> None:
        waiters = self._waiting.get(tenant, ())
        if waiter in waiters:
            self._waiting[tenant].remove(waiter)
        if tenant in self._waiting and not self._waiting[tenant]:
            del self._waiting[tenant]

    def _drop_over_limit(self) -> None:
        if self.waiting > self._max_waiting:
            tenant, waiters = max(reversed(self._waiting.items()), key=lambda item: len(item[1]))
            newest = waiters[-1]
            self._remove(tenant, newest)
            if not newest.done():
                newest.set_exception(SlotsFull())
