"""A raw engine, and a relay in front of it that is known by its address alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from .compare import Sides, StartSides
from .raw_engine import RawEngine, Script, StartRaw, Talk, listening
from .wire import Address

StartRelay = Callable[..., Awaitable[Address]]


@pytest.fixture
async def relay(rig: Any) -> StartRelay:
    """A function: (address of an engine, settings) -> address of a relay. All that these tests know of it."""

    async def start(engine: Address, **settings: Any) -> Address:
        started = await rig(f"http://{engine[0]}:{engine[1]}", **settings)
        return started.host, started.port

    return start


@pytest.fixture
async def sides(relay: StartRelay) -> AsyncIterator[StartSides]:
    """A function: (script of a raw engine, settings of the relay) -> both ways to it."""
    async with AsyncExitStack() as stack:

        async def start(script: Script, *, closes: bool = False, **settings: Any) -> Sides:
            engine = RawEngine(script, closes=closes)
            direct = await stack.enter_async_context(listening(engine))
            return Sides(engine, direct, await relay(direct, **settings))

        yield start


@pytest.fixture
async def raw(relay: StartRelay) -> AsyncIterator[StartRaw]:
    """A function: what an engine does on each connection -> (its address, that of a relay)."""
    async with AsyncExitStack() as stack:

        async def start(talk: Talk) -> tuple[Address, Address]:
            direct = await stack.enter_async_context(listening(talk))
            return direct, await relay(direct)

        yield start
