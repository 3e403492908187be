"""Clients, kubelet and Prometheus of these tests: send requests, read streams, probe, scrape, wait for a state."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

Http = aiohttp.ClientSession
Event = dict[str, Any]

OWN = ("id", "created")  # new in each of vLLM's responses; everything else must be equal
WAIT = 60.0  # seconds until a state that must come counts as missing


def chat(text: str, **more: Any) -> dict[str, Any]:
    """The body of a greedy chat request."""
    return completion(**more) | {"messages": [{"role": "user", "content": text}]}


def completion(prompt: str = "", **more: Any) -> dict[str, Any]:
    """The body of a greedy completion request, which goes on to `max_tokens` whatever it says."""
    body = {"model": "tiny", "max_tokens": 48, "temperature": 0, "ignore_eos": True, **more}
    return body | {"prompt": prompt} if prompt else body


async def ask(http: Http, url: str, body: dict[str, Any], tenant: str = "") -> Event:
    """The whole answer of a request that does not stream. Raises on another status than 200."""
    async with _post(http, url, body, tenant) as answer:
        assert answer.status == 200, await answer.text()
        whole = await answer.json()
    return {name: value for name, value in whole.items() if name not in OWN}


async def stream(http: Http, url: str, body: dict[str, Any], tenant: str = "") -> list[str]:
    """The lines of a stream, its end included."""
    async with _post(http, url, body | {"stream": True}, tenant) as answer:
        assert answer.status == 200, await answer.text()
        return [line.decode() async for line in answer.content]


def said(lines: list[str]) -> dict[str, Any]:
    """What a stream says, token by token, however vLLM cut it: tokens that wait for a slow reader come in one event."""
    all_events = events(lines)
    choices = [choice for event in all_events for choice in event["choices"]]
    return {
        "text": "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices),
        "logprobs": [place for choice in choices for place in _places(choice.get("logprobs") or {})],
        "finish_reason": [choice["finish_reason"] for choice in choices if choice.get("finish_reason")],
        "usage": [event["usage"] for event in all_events if event.get("usage")],
        "fields": {name for event in all_events for name in event},
        "end": lines[-2:],
    }


def _places(logprobs: dict[str, Any]) -> list[Any]:
    """One entry for each token: of chat's form, or of completions'."""
    return logprobs["content"] if "content" in logprobs else logprobs.get("token_logprobs", [])


def events(lines: list[str]) -> list[Event]:
    """The JSON events among the lines of a stream."""
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


async def status(http: Http, url: str) -> int:
    async with http.get(url) as answer:
        return answer.status


async def probe(http: Http, url: str) -> tuple[int, str, str]:
    """A probe endpoint's HTTP status, verdict and reason."""
    async with http.get(url) as answer:
        body = await answer.json()
        return answer.status, body["verdict"], body["reason"]


async def states(http: Http, admin: str) -> list[str]:
    """The verdicts since the sidecar started, oldest first."""
    async with http.get(f"{admin}/verdicts") as answer:
        return [change["verdict"] for change in reversed((await answer.json())["verdicts"])]


async def sample(http: Http, url: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that carry these labels, on the page at `url`; 0 where there are none."""
    async with http.get(url) as answer:
        families = text_string_to_metric_families(await answer.text())
        found = [s for family in families for s in family.samples if s.name == name]
    return sum(s.value for s in found if labels.items() <= s.labels.items())


async def until(holds: Callable[[], Awaitable[Any]], what: str, seconds: float = WAIT) -> None:
    """Wait for a state of another process. Fails with `what` when it does not come."""
    deadline = time.monotonic() + seconds
    while not await holds():
        assert time.monotonic() < deadline, f"after {seconds:.0f} s still not: {what}"
        await asyncio.sleep(0.1)


def _post(http: Http, url: str, body: dict[str, Any], tenant: str) -> Any:
    headers = {"content-type": "application/json"} | ({"x-tenant-id": tenant} if tenant else {})
    return http.post(url, data=io.BytesIO(json.dumps(body).encode()), headers=headers)  # aiohttp wants no large bytes
