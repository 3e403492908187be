"""Whether the engine rests on purpose, read from real servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest

from sidecar.engines.registry import KINDS
from sidecar.signals import sleep_state
from sidecar.signals.sleep_state import SleepSignal

from ..engines.engine_faces import Shown, said
from ..waiting import PATIENCE


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def rest() -> AsyncIterator[Callable[..., SleepSignal]]:
    """A function: engine and kind -> its signal."""
    async with aiohttp.ClientSession() as session:
        yield lambda engine, kind="vllm", **more: SleepSignal(session, engine.url, KINDS[kind].signs, {}, **more)


@pytest.mark.parametrize(
    ("paused", "sleeping", "reason"),
    [
        (False, False, ""),
        (True, True, "engine_paused"),
        (False, True, "engine_sleeping"),
        (None, True, "engine_sleeping"),
    ],
)
async def test_the_first_sign_that_is_true_counts(
    rest: Callable[..., SleepSignal], paused: bool | None, sleeping: bool, reason: str
) -> None:
    """A paused vLLM also reports sleep, so the pause is polled first; a missing sign does not matter."""
    answers = {"/is_sleeping": said(is_sleeping=sleeping)} | (
        {} if paused is None else {"/is_paused": said(is_paused=paused)}
    )
    async with Shown(answers) as engine:
        assert await rest(engine).poll() == reason


async def test_a_sign_that_does_not_exist_is_not_asked_again(rest: Callable[..., SleepSignal]) -> None:
    """404 is remembered: without its development mode vLLM is polled only once."""
    async with Shown({}) as engine:
        signal = rest(engine, period=0.0)
        async with asyncio.timeout(PATIENCE):
            await signal.run()
        assert engine.asked == {"/is_paused": 1, "/is_sleeping": 1}


@pytest.mark.parametrize(
    ("paused", "denied"),
    [
        (said(is_paused=False), {"engine_paused": 100.0, "engine_sleeping": 100.0}),
        (said(is_paused=True), {}),
        (said(is_paused="no"), {"engine_sleeping": 100.0}),
        ((404, ""), {"engine_sleeping": 100.0}),
        ((500, ""), {}),
    ],
)
async def test_only_a_plain_no_to_its_own_sign_denies_a_rest(
    rest: Callable[..., SleepSignal], paused: tuple[int, str], denied: dict[str, float]
) -> None:
    """What is missing, broken or not asked any more denies nothing; the time is when the question was sent."""
    async with Shown({"/is_paused": paused, "/is_sleeping": said(is_sleeping=False)}) as engine:
        signal = rest(engine, clock=Clock())
        await signal.poll()
        assert signal.denied == denied


@pytest.mark.parametrize("answer", [(500, ""), (200, "no JSON"), (503, "")])
async def test_what_is_not_answered_is_unknown_after_a_while(
    rest: Callable[..., SleepSignal], answer: tuple[int, str]
) -> None:
    """A sleep survives a lost response, but expires: unknown is no exemption."""
    clock = Clock()
    async with Shown({"/props": said(is_sleeping=True)}) as engine:
        signal = rest(engine, "llamacpp", clock=clock)
        assert await signal.poll() == "engine_sleeping"
        engine.answers["/props"] = answer
        clock.now += sleep_state.SLEEP_STATE_STALE_S
        assert await signal.poll() == "engine_sleeping"
        clock.now += 0.1
        assert await signal.poll() == ""


@pytest.mark.parametrize("body", ["[]", "3", '{"is_sleeping": "yes"}', '{"is_sleeping": 1}', "{}"])
async def test_only_a_plain_true_is_rest(rest: Callable[..., SleepSignal], body: str) -> None:
    """JSON other than the published one is ignored."""
    async with Shown({"/props": (200, body)}) as engine:
        assert await rest(engine, "llamacpp").poll() == ""


async def test_an_engine_that_answers_nothing_ends_no_polling(
    rest: Callable[..., SleepSignal], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sign that hangs with the core costs its timeout, and is unknown."""
    monkeypatch.setattr(sleep_state, "SLEEP_POLL_TIMEOUT_S", 0.05)

    async def never(_: Any) -> Any:
        await asyncio.Event().wait()

    async with Shown({}) as engine:
        engine.handlers["/props"] = never
        assert await rest(engine, "llamacpp").poll() == ""
    assert await rest(engine, "llamacpp").poll() == ""
