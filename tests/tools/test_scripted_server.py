"""The scripted engine as a server: the shapes of its answers, its batching, its metrics page, its start and end."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as prometheus

from sidecar.engines import canary_request
from sidecar.engines.registry import KINDS, recognise
from sidecar.errors import StartError
from sidecar.tools.scripted_engine.requests import UNKNOWN_IMAGE_TOKENS, parse_request
from sidecar.tools.scripted_engine.server import ScriptedEngine, bind_socket

from .engine_client import events, quick, running_engine, text

ROOT = Path(__file__).resolve().parents[2]


def bmp(width: int, height: int) -> bytes:
    return b"BM" + b"\0" * 12 + struct.pack("<Iii", 40, width, height) + b"\0" * 28


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", width, height) + b"\x08\x02\0\0\0"


def jpeg(width: int, height: int, fill: bytes = b"") -> bytes:
    exif = fill + b"\xff\xe1" + struct.pack(">H", 2 + 30_000) + b"e" * 30_000
    return b"\xff\xd8" + exif + b"\xff\xc2\0\x11\x08" + struct.pack(">HH", height, width) + b"\0" * 9


def webp(width: int, height: int) -> bytes:
    sides = b"".join((side - 1).to_bytes(3, "little") for side in (width, height))
    return b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + sides


def image_part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:image/x;base64," + base64.b64encode(data).decode()}}


async def test_a_chat_stream_has_the_engines_shape() -> None:
    """A role chunk, one chunk per token, finish_reason only on the last, usage with empty choices, then [DONE]."""
    async with running_engine() as client:
        chunks = await client.chat(4, stream_options={"include_usage": True})
    first, *pieces, last, usage = chunks
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(c["choices"][0]["finish_reason"] is None for c in (first, *pieces))
    assert last["choices"][0]["finish_reason"] == "length" and last["choices"][0]["stop_reason"] is None
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 4
    assert usage["usage"]["total_tokens"] == 4 + usage["usage"]["prompt_tokens"]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1


async def test_a_completions_stream_has_the_engines_shape() -> None:
    """Text completions carry `text`, no role chunk, and no usage chunk unless asked for."""
    async with (
        running_engine() as client,
        client.session.post("/v1/completions", json={"prompt": "1", "max_tokens": 3, "stream": True}) as response,
    ):
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        chunks = [event async for event in events(response)]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, "length"]
    assert all(c["object"] == "text_completion" and c["choices"][0]["text"] for c in chunks)


async def test_whole_answers_equal_streamed_ones() -> None:
    """The same request gives the same text with and without streaming, and its own request id in the answer's id."""
    async with running_engine() as client:
        chunks = await client.chat(6, "same")
        body = {"messages": [{"role": "user", "content": "same"}], "max_tokens": 6}
        async with client.session.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "abc"}) as response:
            whole = await response.json()
        other = await client.chat(6, "other")
    assert whole["choices"][0]["message"]["content"] == text(chunks) != text(other)
    assert whole["id"] == "chatcmpl-abc" and whole["usage"]["completion_tokens"] == 6


async def test_continuous_usage() -> None:
    """With continuous_usage_stats every chunk has the number of tokens so far."""
    async with running_engine() as client:
        chunks = await client.chat(3, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 3


async def test_an_unlimited_answer_has_a_seeded_length() -> None:
    """Without max_tokens the length follows from seed and prompt, and the reason is stop."""
    lengths = []
    for _ in range(2):
        async with running_engine(seed=7) as client:
            _, whole = await client.json("/v1/completions", {"prompt": "how long"})
            assert whole["choices"][0]["finish_reason"] == "stop"
            lengths.append(whole["usage"]["completion_tokens"])
    assert lengths[0] == lengths[1] >= 16


async def test_a_repeated_prompt_reports_cached_tokens() -> None:
    """usage.prompt_tokens_details.cached_tokens is 0 the first time and whole blocks the second."""
    async with running_engine() as client:
        body = {"prompt": "x" * 400, "max_tokens": 1}
        used = [(await client.json("/v1/completions", body))[1]["usage"] for _ in range(2)]
    assert [u["prompt_tokens_details"]["cached_tokens"] for u in used] == [0, 96]
    assert used[0]["prompt_tokens"] == 100


async def test_embeddings() -> None:
    """An embeddings request is prefill only, and floats and base64 hold the same vector."""
    async with running_engine() as client:
        _, floats = await client.json("/v1/embeddings", {"input": "abc"})
        _, packed = await client.json("/v1/embeddings", {"input": "abc", "encoding_format": "base64"})
        sample = await client.sample()
    vector = struct.unpack("<16f", base64.b64decode(packed["data"][0]["embedding"]))
    assert vector == pytest.approx(floats["data"][0]["embedding"])
    assert sample.generation_tokens == 0 and sample.finished == 2 and sample.prompt_tokens == 2


@pytest.mark.parametrize(
    "data", [bmp(280, 560), bmp(280, -560), png(280, 560), jpeg(280, 560), jpeg(280, 560, b"\xff\xff"), webp(280, 560)]
)
async def test_an_image_counts_by_its_header(data: bytes) -> None:
    """BMP, PNG, WebP, and JPEG behind fill bytes and a long EXIF block count width/28 x height/28 tokens."""
    async with running_engine() as client:
        message = {"role": "user", "content": [{"type": "text", "text": ""}, image_part(data)]}
        _, whole = await client.json("/v1/chat/completions", {"messages": [message], "max_tokens": 1})
    assert whole["usage"]["prompt_tokens"] == 200 + 3  # and the role, 9 bytes


@pytest.mark.parametrize(
    "head", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n\0\0", b"\xff\xd8\xff\xe1\0\1", b"\xff\xd8" * 50, bmp(0, 5)]
)
def test_an_unreadable_header_counts_as_an_image_of_unknown_size(head: bytes) -> None:
    """Torn headers and empty pictures count 256 tokens and no preprocessing, and the scan of markers ends."""
    body = {"messages": [{"role": "user", "content": [image_part(head)]}]}
    asked = parse_request("chat", json.dumps(body).encode(), ("scripted",), 0, None)
    assert (asked.prompt, asked.pixels) == (UNKNOWN_IMAGE_TOKENS + 3, 0)  # and the role, 9 bytes


async def test_own_preprocessing_delays_photographs_but_not_bitmaps() -> None:
    """A picture costs image_ms per megapixel before it is queued, except a BMP."""
    async with running_engine(image_ms=500.0) as client:

        def ask(data: bytes) -> asyncio.Task[Any]:
            message = {"role": "user", "content": [image_part(data)]}
            return client._task(client.json("/v1/chat/completions", {"messages": [message], "max_tokens": 1}))

        photo, bitmap = ask(png(1000, 1000)), ask(bmp(1000, 1000))
        done, _ = await asyncio.wait({photo, bitmap}, return_when=asyncio.FIRST_COMPLETED)
        assert done == {bitmap}
        assert (await photo)[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"prompt": "x", "model": "other"}, 404, "NotFoundError"),
        ({"prompt": "x", "max_tokens": 0}, 400, "BadRequestError"),
        ({"prompt": "x", "max_tokens": True}, 400, "BadRequestError"),
        ({"prompt": "x", "n": 2}, 400, "BadRequestError"),
        ({"prompt": {}}, 400, "BadRequestError"),
        ({"prompt": "x", "max_tokens": 10**9}, 400, "BadRequestError"),
        ({"prompt": "x", "stream_options": 3}, 400, "BadRequestError"),
        ({}, 400, "BadRequestError"),
    ],
)
async def test_bad_requests_get_openai_errors(body: dict[str, Any], status: int, kind: str) -> None:
    """A request that cannot be served gets an error in OpenAI's format."""
    async with running_engine() as client:
        answered, error = await client.json("/v1/completions", body)
    assert (answered, error["error"]["type"], error["error"]["code"]) == (status, kind, status)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[",
        b"[]",
        b"\xff",
        b'{"messages": [1]}',
        b'{"messages": []}',
        b"[" * 100_000,
        b'{"messages":[{"role":"u","content":[{"type":"image_url","image_url":"http://x"}]}]}',
        b'{"messages":[{"role":"u","content":[{"type":"image_url","image_url":"data:,a"}]}]}',
    ],
)
async def test_bytes_that_are_no_request(body: bytes) -> None:
    """Broken JSON, other JSON, remote images and broken base64 are 400, never 500."""
    async with running_engine() as client, client.session.post("/v1/chat/completions", data=body) as response:
        assert response.status == 400


async def test_concurrent_streams_share_steps() -> None:
    """Two concurrent streams end within about the steps of one, because decoding is batched."""
    async with running_engine() as client:
        await client.chat(100)
        alone = client.engine.cores[0].steps
        await asyncio.gather(client.chat(100), client.chat(100, "other"))
        assert client.engine.cores[0].steps - alone < 1.5 * alone


async def test_a_client_that_goes_away_frees_its_sequence() -> None:
    """Closing a stream early aborts it: nothing runs, nothing is held, and no success is counted."""
    async with running_engine() as client:
        async with client.stream(100_000) as stream:
            await anext(stream)
        await client.engine.until(lambda: client.engine.open == 0)
        sample = await client.sample()
    assert (sample.running, sample.waiting, sample.kv_usage, sample.finished) == (0, 0, 0, 0)


async def test_a_client_that_goes_away_before_its_first_token() -> None:
    """A request that still waits for its prefill is aborted too, streaming or not."""
    async with running_engine(prefill_tokens_per_second=1.0) as client:
        jobs = [client.start(5), client._task(client.json("/v1/completions", {"prompt": "x" * 80, "max_tokens": 5}))]
        await client.engine.until(lambda: client.engine.open == 2)
        for job in jobs:
            job.cancel()
        await client.engine.until(lambda: client.engine.open == 0)
        assert (await client.sample()).running == 0


async def test_a_partial_prefill_moves_no_counter() -> None:
    """During a chunked prefill prompt, generation and iteration counters stand still while KV use grows, as in vLLM."""
    async with running_engine(prefill_tokens_per_second=20_000, chunked_prefill_tokens=100) as client:
        task = client.start(1, "y" * 40_000)
        before = await client.sample()
        await client.steps(3)
        during = await client.sample()
        assert not task.done()
        assert during.kv_usage > before.kv_usage == 0
        for field in ("prompt_tokens", "generation_tokens", "iterations", "finished"):
            assert getattr(during, field) == getattr(before, field) == 0
        await task
        after = await client.sample()
    assert (after.generation_tokens, after.iterations, after.finished) == (1, 1, 1)
    assert after.prompt_tokens >= 10_000


async def test_a_full_queue_refuses() -> None:
    """Beyond max_waiting a request gets 503 in OpenAI's format, and the others continue."""
    async with running_engine(max_batch=1, max_waiting=1) as client:
        inside = [client.start(100_000)]
        await client.running()
        inside.append(client.start(5))
        await client.engine.until(lambda: client.engine.open == 2)
        status, error = await client.json("/v1/completions", {"prompt": "x", "max_tokens": 1})
    assert status == 503 and "queue" in error["error"]["message"]


async def test_ranks_share_the_requests() -> None:
    """With data parallelism each rank has its own labels, and the sample sums them."""
    async with running_engine(data_parallel=2) as client:
        jobs = [client.start(100_000), client.start(100_000)]
        await client.running(2)
        assert [len(c.scheduler.running) for c in client.engine.cores] == [1, 1]
        await client.steps(1, 0)
        await client.steps(1, 1)
        assert (await client.sample()).running == 2
        assert not any(job.done() for job in jobs)


@pytest.mark.parametrize(
    ("accept", "parser"), [("text/plain", prometheus), ("application/openmetrics-text", openmetrics)]
)
async def test_the_metrics_page_is_valid(accept: str, parser: Any) -> None:
    """prometheus_client reads the page in both formats and agrees with our reader."""
    async with running_engine() as client:
        await client.chat(5)
        async with client.session.get(
            "/metrics", headers={"Accept": f"{accept}; version=1.0.0; escaping=allow-utf-8"}
        ) as response:
            families = {family.name: family for family in parser(await response.text())}
        sample = await client.sample()
    total = {s.name.replace(":", "_"): s.value for f in families.values() for s in f.samples}
    assert total["vllm_generation_tokens_total"] == sample.generation_tokens == 5
    assert total["vllm_iteration_tokens_total_count"] == sample.iterations == 5
    assert total["process_start_time_seconds"] == pytest.approx(sample.started_wall)


async def test_it_is_recognised_and_takes_its_canary() -> None:
    """Its pages identify it as the kind `scripted`, whose canary ends with one token."""
    async with running_engine() as client:
        pages = {}
        for path in ("/v1/models", "/version", "/metrics"):
            async with client.session.get(path) as response:
                pages[path] = await response.read()
        assert recognise(pages) == "scripted"
        kind = KINDS["scripted"]
        form = canary_request.CanaryForms(kind, kind.priority).next_form()
        assert form is not None
        async with client.session.post(form.path, json=canary_request.body(kind, form, "scripted")) as response:
            assert response.status == 200
            assert canary_request.read(await response.read(), form.row).token


async def test_start_up_with_an_open_port() -> None:
    """While it loads, /health, the models and completions return 503; then it serves."""
    async with running_engine(load_seconds=0.2) as client:
        early = [await client.json("/v1/completions", {"prompt": "x", "max_tokens": 1}), await client.json("/health")]
        assert [status for status, _ in early] == [503, 503]
        await client.engine.faults.until(lambda how: not how.loading)
        assert len(await client.chat(2)) == 3


async def test_start_up_with_a_refused_port() -> None:
    """While it loads with --load-port refused, connections are refused; then it serves on the same port."""
    async with running_engine(load_seconds=0.2, load_port="refused") as client:
        with pytest.raises(aiohttp.ClientConnectorError):
            await client.json("/health")
        await client.engine.until(lambda: client.engine.listening)
        assert (await client.json("/health"))[0] == 200


def test_a_taken_port_is_one_clear_error() -> None:
    """A port that is in use ends the start with an error that names the flag and the port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(StartError, match=f"--listen: cannot listen on 127.0.0.1:{taken.getsockname()[1]}"):
            bind_socket(("127.0.0.1", taken.getsockname()[1]))


async def test_leaving_ends_open_streams() -> None:
    """Leaving the engine's block cuts streams that are still open, and leaves no task behind."""
    before = asyncio.all_tasks()
    async with aiohttp.ClientSession() as session:
        async with ScriptedEngine(quick()) as engine:
            body = {"prompt": "x", "max_tokens": 100_000, "stream": True}
            response = await session.post(engine.url + "/v1/completions", json=body)
            await response.content.readline()
        with pytest.raises(aiohttp.ClientError):
            await response.content.read()
        response.close()
    assert asyncio.all_tasks() == before


async def test_the_command_serves_crashes_and_stops() -> None:
    """`sidecar engine` prints its URL, serves, exits 1 on the crash fault, and exits 0 on SIGTERM."""
    for crash in (True, False):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "sidecar",
            "engine",
            "--listen",
            "127.0.0.1:0",
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
        assert process.stdout
        line = (await process.stdout.readline()).decode()
        async with aiohttp.ClientSession(line.split()[3]) as session:
            async with session.get("/health") as response:
                assert response.status == 200
            if crash:
                with suppress(aiohttp.ClientError):  # the process may end before it answers
                    async with session.post("/faults", json={"kind": "crash"}):
                        pass
            else:
                process.terminate()
        assert await process.wait() == (1 if crash else 0)
