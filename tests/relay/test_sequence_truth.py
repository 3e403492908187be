"""Settlements of many sequences, compared with an engine that knows the length of each."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web

from sidecar.events import RequestSize
from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.load.ledger import Ledger

CO = Coefficients()
RNG = random.Random(7)


def words(count: int) -> str:
    return " ".join(["word"] * count)


def size(text: Any) -> int:
    return len(str(text).split())


def prompts_of(body: dict[str, Any]) -> list[int]:
    """The words of each prompt, as an engine computes them."""
    if "messages" in body:
        return [sum(size(message["content"]) for message in messages) for messages in body["messages"]]
    if "documents" in body:
        return [size(body["query"]) + size(document) for document in body["documents"]]
    if "text_1" in body:
        return [size(body["text_1"]) + size(text) for text in body["text_2"]]
    return [size(text) for text in body.get("prompt") or body["input"]]


class TrueEngine:
    """It answers with a usage over all sequences, as engines do, and records the cost of each of them."""

    def __init__(self) -> None:
        self.ms = 0.0

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        body = json.loads(await request.read())
        prompts, answers = prompts_of(body), body.get("max_tokens", 0)
        each = [[RNG.randint(answers // 2, answers) for _ in range(body.get("n", 1))] for _ in prompts]
        # `n` answers to a prompt share its prefill
        for prompt, outputs in zip(prompts, each, strict=True):
            self.ms += cost_model.terms(RequestSize(prompt), CO).before_first_token
            self.ms += sum(cost_model.decode_ms(RequestSize(prompt), output, CO) for output in outputs)
        output = sum(itertools.chain(*each))
        return web.json_response({"usage": {"prompt_tokens": sum(prompts), "completion_tokens": output}})


def texts(*sizes: int) -> list[str]:
    return [words(size) for size in sizes]


def requests() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "/v1/embeddings", {"input": texts(*[512] * 200)}
    yield "/v1/embeddings", {"input": texts(6000, *[3] * 99)}  # one is nearly all of it
    yield "/v1/completions", {"prompt": texts(*[400] * 100), "max_tokens": 200}
    yield "/v1/completions", {"prompt": texts(3000), "n": 16, "max_tokens": 300}
    yield "/v1/completions", {"prompt": texts(*range(100, 2100, 100)), "n": 3, "max_tokens": 100}
    yield "/v1/chat/completions/batch", {"messages": [[{"content": words(900)}]] * 8, "max_tokens": 150}
    yield "/v1/rerank", {"query": words(64), "documents": texts(*range(40, 4040, 40))}
    yield "/v1/score", {"text_1": words(500), "text_2": texts(*range(10, 3010, 100))}


@pytest.mark.parametrize(("path", "body"), [*requests()], ids=lambda value: value if isinstance(value, str) else "")
async def test_the_books_agree_with_the_engine(rig: Any, serve: Any, path: str, body: dict[str, Any]) -> None:
    """Within two percent of the summed cost of the sequences, though a usage reports only totals."""
    engine = TrueEngine()
    r = await rig(await serve(engine))
    async with r.client.post(r.url + path, json=body) as got:
        await got.read()
    await r.emitted.settled()
    ledger = Ledger(CO)
    [settlement] = [settled for event in r.emitted.all if (settled := ledger.apply(0, event)) is not None]
    assert settlement.mu * cost_model.unit_ms(CO) == pytest.approx(engine.ms, rel=0.02)
