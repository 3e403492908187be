"""The scripted engine's other faces: priorities, adapters, several models, native routes, work that takes a time."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from .engine_client import Client, running_engine

LONG = 5000


async def order_of(client: Client, *bodies: dict[str, Any]) -> list[int]:
    """Send requests to a full engine of one slot, then free it. Returns in which order they were served."""
    holder = client.start(LONG)
    await client.running()
    ended: list[int] = []

    async def ask(number: int, body: dict[str, Any]) -> None:
        await client.chat(1, **body)
        ended.append(number)

    jobs = []
    waiting = client.engine.cores[0].scheduler.waiting
    for number, body in enumerate(bodies):
        jobs.append(client._task(ask(number, body)))
        await client.engine.until(lambda: len(waiting) == len(jobs))
    holder.cancel()
    await asyncio.gather(*jobs)
    return ended


@pytest.mark.parametrize(("policy", "order"), [("priority", [2, 0, 1]), ("fcfs", [0, 1, 2])])
async def test_priorities_decide_only_where_the_policy_says_so(policy: str, order: list[int]) -> None:
    """The lowest value goes first under `priority`, and equal ones in order of arrival; fcfs ignores it."""
    async with running_engine(max_batch=1, scheduling=policy) as client:
        assert await order_of(client, {"priority": 10}, {"priority": 10}, {"priority": -1}) == order


async def test_an_adapter_without_a_place_in_the_batch_waits_and_is_overtaken() -> None:
    """Adapters are listed with their base; a request for a second one waits while later ones are served."""
    async with running_engine(adapters=2, max_adapters=1) as client:
        cards = (await client.json("/v1/models"))[1]["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [
            ("scripted", None),
            ("adapter-1", "scripted"),
            ("adapter-2", "scripted"),
        ]
        holder = client.start(LONG, model="adapter-1")
        await client.running()
        waits = client.start(1, model="adapter-2")
        await client.engine.until(lambda: client.engine.open == 2)
        await client.chat(3)
        await client.chat(3, model="adapter-1")
        assert not waits.done()
        holder.cancel()
        await waits


@pytest.mark.parametrize("status", ["none", "listed"])
async def test_several_models_are_loaded_one_at_a_time(status: str) -> None:
    """A request for a model that is not loaded loads it and evicts the other; the list says so or not."""
    async with running_engine(models=2, model_load_seconds=0.05, model_status=status) as client:

        async def states() -> list[str]:
            cards = (await client.json("/v1/models"))[1]["data"]
            assert [card["id"] for card in cards] == ["scripted", "scripted-2"]
            return [card["status"]["value"] if "status" in card else "" for card in cards]

        says = status == "listed"
        assert await states() == (["unloaded", "unloaded"] if says else ["", ""])
        loading = client.start(1, model="scripted-2")
        await client.engine.until(lambda: client.engine.open == 1)
        await loading
        assert await states() == (["unloaded", "loaded"] if says else ["", ""])
        await client.chat(1, model="scripted-2")
        assert client.engine.models.loads == 1
        await client.chat(1, model="scripted")
        assert (client.engine.models.loads, client.engine.models.loaded) == (2, "scripted")


async def test_a_full_queue_refuses_with_the_chosen_status() -> None:
    """--full-status replaces the 503 of requests beyond the queue."""
    async with running_engine(max_batch=1, max_waiting=1, full_status=429) as client:
        client.start(LONG)
        await client.running()
        client.start(1)
        await client.engine.until(lambda: client.engine.open == 2)
        assert (await client.json("/v1/completions", {"prompt": "x"}))[0] == 429


async def test_the_length_of_an_answer_without_a_limit() -> None:
    """--answer-tokens sets it."""
    async with running_engine(answer_tokens=7) as client:
        assert (await client.json("/v1/completions", {"prompt": "x"}))[1]["usage"]["completion_tokens"] == 7


@pytest.mark.parametrize(
    ("path", "asked"),
    [("/api/chat", {"messages": [{"role": "user", "content": "hello"}]}), ("/api/generate", {"prompt": "hello"})],
)
async def test_native_routes_answer_in_lines(path: str, asked: dict[str, Any]) -> None:
    """They stream lines of JSON unless asked not to; the last one is done and has the counts."""
    async with running_engine() as client:
        body = {**asked, "options": {"num_predict": 4}}
        async with client.session.post(path, json=body) as response:
            assert response.headers["Content-Type"] == "application/x-ndjson"
            lines = [json.loads(line) async for line in response.content]
        _, whole = await client.json(path, {**body, "stream": False})
        async with client.session.post(path, data=b"[") as response:
            assert response.status == 400
    assert [line["done"] for line in lines] == [False] * 4 + [True]
    assert lines[-1]["eval_count"] == whole["eval_count"] == 4 and whole["done"] is True

    def text(line: dict[str, Any]) -> str:
        return str(line["response"] if "response" in line else line["message"]["content"])

    assert "".join(map(text, lines)) == text(whole) != ""


async def test_timed_work_takes_its_time_and_stands_still_with_the_core() -> None:
    """An image is one answer, speech comes in pieces; both stop while the core does, and no gauge shows them."""
    async with running_engine() as client:
        client.engine.faults.start("freeze")
        image = client._task(client.json("/v1/images/generations?seconds=0.01", {"prompt": "a tree"}))
        assert await client.silent(image) and client.engine.open == 0
        client.engine.faults.clear()
        assert (await image)[0] == 200
        async with client.session.post("/v1/audio/speech?seconds=0.2", json={"input": "a tree"}) as response:
            assert response.headers["Content-Type"] == "audio/pcm"
            pieces = [piece async for piece in response.content.iter_any()]
        assert len(pieces) == 2 and len(b"".join(pieces)) == 6400
        assert (await client.json("/v1/audio/speech?seconds=-1", {}))[0] == 400
