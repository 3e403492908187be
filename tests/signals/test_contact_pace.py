"""How often an engine is asked that has nothing to do."""

from __future__ import annotations

import asyncio
import math

import pytest

from sidecar.signals.contact_pace import IDLE_AFTER_S, IDLE_INTERVAL_S, ContactPace

from ..waiting import PATIENCE


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_an_idle_engine_is_asked_less_often_until_work_comes(clock: Clock) -> None:
    """After a minute without work a rest lasts longer; work ends it at once, and the usual pace is back."""
    pace = ContactPace(clock=clock, idle_interval=math.inf)
    async with asyncio.timeout(PATIENCE):
        await pace.rest(0.0)
        clock.now += IDLE_AFTER_S
        resting = asyncio.create_task(pace.rest(0.0))
        done, _ = await asyncio.wait((resting,), timeout=0.05)
        assert not done
        pace.busy.set()
        await resting
        await pace.rest(0.0)
        pace.busy.clear()
        await pace.rest(0.0)
    assert not pace.is_idle, "a minute counts from the last work"


async def test_work_that_is_seen_on_the_page_counts(clock: Clock) -> None:
    """Work of other clients keeps the usual pace, too."""
    pace = ContactPace(clock=clock)
    clock.now += IDLE_AFTER_S
    assert pace.is_idle
    pace.worked()
    assert not pace.is_idle


async def test_a_long_rest_ends_by_itself(clock: Clock) -> None:
    """Work that comes past the relay is found by the next request, a few seconds later."""
    pace = ContactPace(clock=clock, idle_interval=0.05)
    clock.now += IDLE_AFTER_S
    async with asyncio.timeout(PATIENCE):
        await pace.rest(0.0)
    assert pace.is_idle and IDLE_INTERVAL_S <= 5.0
