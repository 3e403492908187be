"""More cases of each kind of metering error: one line each, named by its kind (docs/metering.md).

An answer is what the engine writes, piece by piece; the client of a case that leaves reads all of it and goes.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import wave
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import pytest
from aiohttp import web

from sidecar.events import Admitted, Settled
from sidecar.load.cost_model import Coefficients
from sidecar.load.ledger import Ledger, Settlement

from ..waiting import PATIENCE
from .metered_apis import DONE, TEXT, Truth, data, openai, sglang

CHAT: Final = "/v1/chat/completions"
ASK: Final = {"model": "m", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 600, "stream": True}
TOLD: Final = Truth(1200, 800, 240)


@dataclass(frozen=True)
class Case:
    """An answer to a request, and what is to be booked: all of the prompt, what was cached, the output.

    None: any number, as it can only be estimated.
    """

    name: str
    path: str
    body: Any
    answer: list[bytes]
    booked: tuple[int | None, int | None, int | None]
    told: bool = True
    outcome: str = "ok"
    leaves: bool = False
    status: int = 200
    fields: dict[str, str] = field(default_factory=dict)
    media_type: str = "application/json"


def stream(name: str, events: list[bytes], *booked: Any, path: str = CHAT, body: Any = ASK, **options: Any) -> Case:
    return Case(name, path, body, events, booked, **{"media_type": "text/event-stream"} | options)


def whole(name: str, path: str, body: Any, answer: Any, *booked: Any, **options: Any) -> Case:
    raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return Case(name, path, body, [raw], booked, **options)


def pick(index: int, finish: str | None, usage: Truth | None = None) -> bytes:
    """An event of one of several choices."""
    event = {"choices": [{"index": index, "delta": {"content": "x"}, "finish_reason": finish}]}
    return data(event | ({} if usage is None else {"usage": openai(usage)}))


TWO: Final = ASK | {"n": 2, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
CLAUDE: Final = {"model": "m", "messages": ASK["messages"], "max_tokens": 600}

CASES: Final = (
    # 1. a provider's usage misread
    whole(
        "1 Cohere embed: image tokens are billed next to input tokens",
        "/v2/embed",
        {"model": "m", "texts": [TEXT]},
        {"embeddings": {}, "meta": {"billed_units": {"input_tokens": 1000, "image_tokens": 200}}},
        *(1200, 0, 0),
    ),
    whole(
        "1 Anthropic's names, whose total shows that the cached part is in them",
        "/v1/messages",
        CLAUDE,
        {"usage": {"input_tokens": 1200, "cache_read_input_tokens": 800, "output_tokens": 240, "total_tokens": 1440}},
        *(1200, 800, 240),
    ),
    stream(
        "1 SSE of a transcription",
        [
            data({"type": "transcript.text.delta", "delta": "x"}),
            data(
                {
                    "type": "transcript.text.done",
                    "usage": {"type": "tokens", "input_tokens": 1200, "output_tokens": 240},
                }
            ),
        ],
        *(1200, 0, 240),
        path="/v1/audio/transcriptions",
    ),
    # 2. an opening usage taken for the final one
    stream(
        "2 the usage next to the end of one of two choices",
        [*[pick(n % 2, None, Truth(1200, 800, n)) for n in range(100)], pick(0, "stop", Truth(1200, 800, 51))],
        *(1200, 800, 101),
        body=TWO,
        told=False,
        leaves=True,
        outcome="client_cancelled",
    ),
    stream(
        "2 one of two prompts has ended, the other has not begun",
        [data(sglang(Truth(600, 0, 50), 50, {"type": "stop"}) | {"index": 0})],
        *(None, 0, 50),
        path="/generate",
        body={"text": [TEXT, TEXT], "stream": True},
        told=False,
        leaves=True,
        outcome="client_cancelled",
    ),
    # 4. an engine's own API
    whole(
        "4 TGI: the best of two answers",
        "/generate",
        {"inputs": TEXT, "parameters": {"best_of": 2, "do_sample": True, "max_new_tokens": 600, "details": True}},
        {
            "generated_text": "x",
            "details": {
                "generated_tokens": 120,
                "best_of_sequences": [{"generated_text": "y", "generated_tokens": 100}],
            },
        },
        *(1200, 0, 240),
        told=False,
        fields={"x-prompt-tokens": "1200", "x-generated-tokens": "120"},
    ),
    whole(
        "4 vLLM: vectors as bytes, whose usage is in a header field",
        "/v1/embeddings",
        {"model": "m", "input": [TEXT], "encoding_format": "bytes"},
        b"\x00\x01" * 2000,
        *(1200, 0, 0),
        fields={
            "metadata": json.dumps({"id": "1", "data": [], "usage": {"prompt_tokens": 1200, "total_tokens": 1200}})
        },
        media_type="application/octet-stream",
    ),
    whole(
        "4 Ollama: a model is loaded",
        "/api/generate",
        {"model": "m", "keep_alive": -1},
        {"model": "m", "response": "", "done": True, "done_reason": "load"},
        *(None, 0, 0),
        told=False,
    ),
    # 8. success by status
    whole(
        "8 an object of type error",
        CHAT,
        ASK | {"stream": False},
        {"object": "error", "message": "x", "code": 500},
        *(0, 0, 0),
        outcome="engine_error",
        told=False,
    ),
    stream(
        "8 a choice ends by an error",
        [*[pick(0, None)] * 40, pick(0, "error"), DONE],
        *(None, None, None),
        outcome="engine_error",
        told=False,
    ),
    stream(
        "8 a choice is aborted by the engine",
        [*[pick(0, None)] * 40, pick(0, "abort", Truth(1200, 800, 40)), DONE],
        *(1200, 800, 40),
        outcome="engine_error",
    ),
    stream(
        "8 a stream ends in its middle", [*[pick(0, None)] * 40], *(None, None, 40), outcome="engine_error", told=False
    ),
    whole(
        "8 a whole answer ends by an error",
        CHAT,
        ASK | {"stream": False},
        {"choices": [{"message": {"content": "x"}, "finish_reason": "error"}], "usage": openai(TOLD)},
        *(1200, 800, 240),
        outcome="engine_error",
    ),
    # 9. the engine's failures and waiting billed
    whole(
        "9 a redirection",
        CHAT + "/",
        ASK | {"stream": False},
        b"",
        *(0, 0, 0),
        status=307,
        fields={"location": CHAT},
        outcome="rejected",
        told=False,
    ),
    stream(
        "9 an answer of 200 fails before its first token",
        [data({"error": {"message": "the scheduler is not ready", "code": 503}}), DONE],
        *(0, 0, 0),
        outcome="engine_error",
        told=False,
    ),
    # 12. usage found by searching bytes
    stream(
        "12 an event whose data is in several lines",
        [
            pick(0, "stop"),
            b'data: {\ndata:  "choices": [],\ndata:  "usage":\ndata: %b}\n\n' % json.dumps(openai(TOLD)).encode(),
            DONE,
        ],
        *(1200, 800, 240),
    ),
    stream(
        "12 the usage of a response behind two megabytes of its text",
        [
            data({"type": "response.output_text.delta", "delta": "x"}, "response.output_text.delta"),
            data(
                {
                    "type": "response.completed",
                    "response": {
                        "output": [{"text": '"usage":{"input_tokens":1}' * 90_000}],
                        "usage": {
                            "input_tokens": 1200,
                            "input_tokens_details": {"cached_tokens": 800},
                            "output_tokens": 240,
                        },
                    },
                },
                "response.completed",
            ),
        ],
        *(1200, 800, 240),
        path="/v1/responses",
        body={"model": "m", "input": TEXT, "stream": True},
    ),
)


async def settlement_of(rig: Any, serve: Any, case: Case) -> Settlement:
    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(status=case.status, headers={"content-type": case.media_type} | case.fields)
        await response.prepare(request)
        for piece in case.answer:
            if piece:
                await response.write(piece)
        if case.leaves:
            await asyncio.Event().wait()
        return response

    r = await rig(await serve(engine))
    size = sum(map(len, case.answer))
    async with (
        asyncio.timeout(PATIENCE),
        r.client.post(r.url + case.path, json=case.body, allow_redirects=False) as got,
    ):
        if case.leaves:
            await got.content.readexactly(size)
            got.close()
        else:
            await got.read()
    await r.emitted.settled()
    ledger = Ledger(Coefficients())
    [found] = [done for event in r.emitted.all if (done := ledger.apply(0, event))]
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_what_is_booked_is_what_the_engine_did(rig: Any, serve: Any, case: Case) -> None:
    """The tokens and the outcome are the engine's, or marked as an estimate."""
    found = await settlement_of(rig, serve, case)
    work = found.work
    booked = work.uncached + work.cached, work.cached, work.output
    assert (found.settled.outcome, found.told) == (case.outcome, case.told), booked
    assert all(right is None or value == right for value, right in zip(booked, case.booked, strict=True)), booked
    if case.booked == (0, 0, 0):
        assert found.mu == 0


def audio(seconds: int) -> str:
    """A recording in base64."""
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(32_000 * seconds))
    return base64.b64encode(made.getvalue()).decode()


def heard(part: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}]}


WORDS: Final = "word and " * 400  # 900 tokens at 4 bytes each
BINARY: Final = base64.b64encode(bytes(120_000)).decode()
MEDIA: Final = {"prompt_string": WORDS + "<__media__>", "multimodal_data": [BINARY]}

ONE: Final = (1, 900, 0)
B: Final = (20, 18_000, 0)  # a batch
TEXTS: Final = [{"type": "text", "text": WORDS}] * 20
SEALED: Final = {"type": "reasoning", "encrypted_content": BINARY}
THOUGHT: Final = {"type": "thinking", "thinking": WORDS, "signature": BINARY}
LIKE_MEDIA: Final = json.dumps({"multimodal_data": ["data:image/png;base64,AAAA"], "prompt_string": WORDS})


def spoken(seconds: int) -> dict[str, Any]:
    return heard({"type": "input_audio", "input_audio": {"data": audio(seconds), "format": "wav"}})


def linked(seconds: int) -> dict[str, Any]:
    return heard({"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64," + audio(seconds)}})


# A path, a body, and what is to be expected of it: prompts, tokens of all prompts, images.
PRICED: Final[tuple[tuple[str, str, Any, tuple[int, int, int]], ...]] = (
    (
        "3 TEI: sentences in an object",
        "/similarity",
        {"inputs": {"source_sentence": "a", "sentences": [WORDS] * 20}},
        B,
    ),
    ("3 vLLM: documents in an object", "/v1/rerank", {"query": "q", "documents": {"content": TEXTS}}, B),
    ("3 vLLM: texts of a score in an object", "/v1/score", {"text_1": "a", "text_2": {"content": TEXTS}}, B),
    ("3 Vertex: instances to classify", "/v1/predict", {"instances": [{"inputs": WORDS}] * 20}, B),
    ("3 speech of several texts", "/v1/audio/speech/batch", {"items": [{"input": WORDS}] * 20}, B),
    ("4 Triton", "/v2/models/ensemble/generate", {"text_input": WORDS, "max_tokens": 9}, ONE),
    ("4 SGLang: prompts as vectors", "/generate", {"input_embeds": [[0.25] * 64] * 900}, ONE),
    ("4 vLLM: prompts as tensors", "/v1/completions", {"prompt_embeds": "A" * (900 * 8192 * 4 // 3)}, ONE),
    ("4 a minute of speech in a chat", CHAT, spoken(60), (1, 1500, 0)),
    ("4 two seconds of speech in a chat", CHAT, linked(2), (1, 50, 0)),
    ("17 llama.cpp: media of a prompt", "/completion", {"prompt": MEDIA}, (1, 1900, 1)),
    ("17 llama.cpp: media of several prompts", "/completion", {"prompt": [MEDIA] * 3}, (3, 5700, 3)),
    ("17 sealed thoughts that come back", "/v1/responses", {"input": [SEALED, {"content": WORDS}]}, ONE),
    ("17 the signature of a thought", "/v1/messages", {"messages": [{"content": [THOUGHT]}]}, ONE),
    ("17 a document that has a signature", CHAT, {"documents": [{"signature": WORDS}], "messages": []}, ONE),
    ("17 a text that reads like media of a prompt", "/v1/completions", {"prompt": LIKE_MEDIA}, ONE),
)


@pytest.mark.parametrize(("name", "path", "body", "expected"), PRICED, ids=[case[0] for case in PRICED])
async def test_what_is_expected_is_what_the_engine_has_to_do(
    rig: Any, serve: Any, name: str, path: str, body: Any, expected: tuple[int, int, int]
) -> None:
    """Sequences and images exactly, tokens within what an estimate by bytes can be."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        return web.json_response({})

    r = await rig(await serve(engine, client_max_size=1 << 25))
    async with r.client.post(r.url + path, data=io.BytesIO(json.dumps(body).encode())) as got:
        await got.read()
    [admitted] = r.emitted.of(Admitted)
    prompts, tokens, images = expected
    work = admitted.expected
    assert (work.prompts, work.sequences, work.images) == (prompts, prompts, images)
    assert work.uncached == pytest.approx(tokens, rel=0.05, abs=20)


GREEDY: Final = {"model": "m", "messages": [{"role": "user", "content": WORDS}], "n": 64, "max_tokens": 1000}


@pytest.mark.parametrize(
    "coding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
async def test_5_no_coding_of_a_body_leads_round_a_limit(rig: Any, serve: Any, coding: str) -> None:
    """Python's engines read UTF-16 and UTF-32, so these are priced as what they say, and forwarded as they came."""
    sent = json.dumps(GREEDY | {"stream": True}).encode(coding)
    seen: list[bytes] = []

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(await request.read())
        assert json.loads(seen[0])["n"] == 64
        return web.json_response({})

    r = await rig(await serve(engine))
    async with r.client.post(r.url + CHAT, data=sent) as got:
        await got.read()
    [admitted] = r.emitted.of(Admitted)
    assert (admitted.model, admitted.stream, admitted.expected.sequences) == ("m", True, 64)
    assert admitted.expected.uncached == pytest.approx(900, abs=20)
    assert seen == [sent] or coding.startswith("utf-8")


async def test_5_a_body_next_to_an_upgrade_is_priced(rig: Any, serve: Any) -> None:
    """An engine that makes no WebSocket of it takes it as an ordinary request; so does the price."""
    seen: list[bytes] = []

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(await request.read())
        return web.json_response({})

    r = await rig(await serve(engine))
    body = json.dumps({"text": WORDS, "sampling_params": {"n": 64, "max_new_tokens": 1000}}).encode()
    head = "GET /generate HTTP/1.1\r\nhost: x\r\nconnection: upgrade, close\r\nupgrade: websocket\r\n"
    answer = await r.raw(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    assert answer.startswith(b"HTTP/1.1 200 ")
    [admitted] = r.emitted.of(Admitted)
    assert (admitted.expected.sequences, seen) == (64, [body])


AGENT: Final = {"text": WORDS, "stream": True, "sampling_params": {"max_new_tokens": 600}}
TURN: Final = Truth(900, 850, 40)
CONTINUOUS: Final = ASK | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}

# Streams of agents, whose clients leave each of them before its end.
AGENTS: Final = (
    ("10 SGLang", "/generate", AGENT, [data(sglang(TURN, n, None)) for n in range(1, 41)]),
    ("10 running usage of a chat", CHAT, CONTINUOUS, [pick(0, None, Truth(900, 850, n)) for n in range(1, 41)]),
)


@pytest.mark.parametrize(("name", "path", "body", "events"), AGENTS, ids=[agent[0] for agent in AGENTS])
async def test_10_streams_that_are_left_teach_what_is_cached(
    rig: Any, serve: Any, name: str, path: str, body: Any, events: list[bytes]
) -> None:
    """The engine reports it before the end, so the next turns are expected to find it in the cache."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"".join(events))
        await asyncio.Event().wait()
        return response

    r = await rig(await serve(engine))
    for turn in range(1, 9):
        async with asyncio.timeout(PATIENCE), r.client.post(r.url + path, json=body) as got:
            await got.content.readexactly(sum(map(len, events)))
            got.close()
        await r.emitted.wait(Settled, turn)
    first, *_, last = r.emitted.of(Admitted)
    assert first.expected.cached == 0
    assert last.expected.cached > 0.7 * (last.expected.uncached + last.expected.cached)


PAINT: Final = {"model": "m", "prompt": "a cat"}


@pytest.mark.parametrize(
    ("named", "times"),
    [
        ({}, 1.0),
        ({"size": "auto"}, 1.0),
        ({"size": "1024x1024", "num_inference_steps": 30}, 1.0),
        ({"size": "2048x2048"}, 4.0),
        ({"size": "512X512", "num_inference_steps": 60}, 0.5),
        ({"num_inference_steps": 4, "n": 3}, 0.4),
        ({"size": "99999x99999", "num_inference_steps": 10**9}, 64.0),
        ({"size": 7, "num_inference_steps": "30"}, 1.0),
    ],
)
async def test_4_a_picture_costs_its_pixels_and_steps(
    rig: Any, serve: Any, named: dict[str, Any], times: float
) -> None:
    """As JSON and as a form; what is not named is as usual, and what is odd is bounded."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        return web.json_response({})

    r = await rig(await serve(engine))
    form = aiohttp.FormData({name: str(value) for name, value in (PAINT | named).items()})
    form.add_field("image", b"a picture", filename="a.png")
    for path, body in (("/v1/images/generations", {"json": PAINT | named}), ("/v1/images/edits", {"data": form})):
        async with r.client.post(r.url + path, **body) as got:
            await got.read()
    usual = 4160 * times
    generated, edited = (admitted.expected.output for admitted in r.emitted.of(Admitted))
    assert generated == pytest.approx(usual, rel=0.01)
    assert edited == pytest.approx(usual, rel=0.01)
