"""A real vLLM serves text through the sidecar unchanged, with a correct verdict and correct charges."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from sidecar.events import RequestSize
from sidecar.load import cost_model

from . import client
from .client import Http
from .processes import Engine, Sidecar

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(400),
    pytest.mark.parametrize("engine", ["text"], indirect=True),
]

TEXT = "Describe what the sidecar does."
CHAT = ("/v1/chat/completions", client.chat(TEXT, logprobs=True, top_logprobs=3))
COMPLETION = ("/v1/completions", client.completion(TEXT, logprobs=3))
ASKED = {"stream_options": {"include_usage": True}}


@pytest.mark.parametrize(("path", "body"), [CHAT, COMPLETION])
async def test_a_stream_is_the_same(
    engine: Engine, sidecar: Sidecar, http: Http, path: str, body: dict[str, object]
) -> None:
    """A stream is the same with and without the sidecar, without the usage event that the sidecar requested."""
    without = client.said(await client.stream(http, engine.url + path, body))
    through = client.said(await client.stream(http, sidecar.url + path, body))
    assert through == without
    assert (through["usage"], through["end"], len(through["logprobs"])) == ([], ["data: [DONE]\n", "\n"], 48)


@pytest.mark.parametrize(("path", "body"), [CHAT, COMPLETION])
async def test_usage_that_the_client_asked_for_arrives(
    engine: Engine, sidecar: Sidecar, http: Http, path: str, body: dict[str, object]
) -> None:
    """A client that asks for usage gets vLLM's own usage event through the sidecar, in a stream that says the same."""
    without = client.said(await client.stream(http, engine.url + path, body | ASKED))
    through = client.said(await client.stream(http, sidecar.url + path, body | ASKED))
    assert through == without
    assert [usage["completion_tokens"] for usage in through["usage"]] == [48]


async def test_another_prompt_gives_another_stream(engine: Engine, http: Http) -> None:
    """The tiny model's answer depends on its prompt, so that equal streams say something."""
    answers = [await client.stream(http, engine.url + CHAT[0], client.chat(text)) for text in (TEXT, TEXT + "!")]
    assert client.said(answers[0])["text"] != client.said(answers[1])["text"]


@pytest.mark.parametrize("streams", [True, False])
async def test_it_is_settled_on_the_usage_that_vllm_reports(
    engine: Engine, sidecar: Sidecar, http: Http, streams: bool
) -> None:
    """A tenant is charged the model units of vLLM's own token counts, with outcome ok, streamed or not."""
    path, body = CHAT
    usage = (await client.ask(http, engine.url + path, body))["usage"]
    await (client.stream if streams else client.ask)(http, sidecar.url + path, body, tenant="acme")
    price = cost_model.mu(
        RequestSize(usage["prompt_tokens"], output=usage["completion_tokens"]), cost_model.Coefficients()
    )
    labels = {"tenant": "acme", "model": "tiny", "outcome": "ok"}

    async def settled() -> bool:
        return await client.sample(http, f"{sidecar.admin}/metrics", "sidecar_requests_total", **labels) == 1

    await client.until(settled, "one request of acme with outcome ok")
    charged = await client.sample(http, f"{sidecar.admin}/metrics", "sidecar_mu_total", **labels)
    assert charged == pytest.approx(price, rel=1e-6)


async def test_the_verdict_follows_the_work(sidecar: Sidecar, http: Http) -> None:
    """The verdict is progressing while streams deliver, and idle when nothing is outstanding.

    Streams follow one another: during one, a machine that is short of CPU can make the sidecar withhold its verdict.
    """

    async def verdict() -> str:
        return (await client.probe(http, f"{sidecar.admin}/livez"))[1]

    async def is_idle() -> bool:
        return await verdict() == "idle"

    async def is_progressing() -> bool:
        return await verdict() == "progressing"

    async def deliver() -> None:
        while True:
            await client.stream(http, f"{sidecar.url}/v1/completions", client.completion(TEXT, max_tokens=4000))

    await client.until(is_idle, "idle after the start")
    streams = asyncio.create_task(deliver())
    try:
        await client.until(is_progressing, "progressing while streams deliver")
    finally:
        streams.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await streams
    await client.until(is_idle, "idle after the streams")


async def test_a_client_that_leaves_frees_the_engine(engine: Engine, sidecar: Sidecar, http: Http) -> None:
    """When a client breaks a stream off, vLLM stops generating for it, and the tenant's request counts as cancelled."""

    async def running() -> float:
        return await client.sample(http, f"{engine.url}/metrics", "vllm:num_requests_running")

    async def runs() -> bool:
        return await running() == 1

    async def is_free() -> bool:
        return await running() == 0

    async def is_cancelled() -> bool:
        labels = {"tenant": "gone", "outcome": "client_cancelled"}
        return await client.sample(http, f"{sidecar.admin}/metrics", "sidecar_requests_total", **labels) == 1

    body = client.completion(TEXT, max_tokens=4000, stream=True)
    async with http.post(f"{sidecar.url}/v1/completions", json=body, headers={"x-tenant-id": "gone"}) as answer:
        await answer.content.readline()
        await client.until(runs, "the request running")
        answer.close()
    await client.until(is_free, "no request running")
    await client.until(is_cancelled, "one cancelled request")


async def test_the_relay_port_shows_one_complete_metrics_page(sidecar: Sidecar, http: Http) -> None:
    """The relay's /metrics carries vLLM's own series next to the sidecar's."""
    await client.ask(http, sidecar.url + CHAT[0], CHAT[1], tenant="acme")

    async def complete() -> bool:
        page = f"{sidecar.url}/metrics"
        theirs = await client.sample(http, page, "vllm:generation_tokens_total", model_name="tiny")
        return theirs >= 48 and await client.sample(http, page, "sidecar_requests_total", tenant="acme") == 1

    await client.until(complete, "both on one page")


async def test_load_of_vllm_reaches_an_orca_balancer_as_ours(sidecar: Sidecar, http: Http) -> None:
    """If a balancer asks for a load report, the sidecar's replaces vLLM's own, once there is one."""

    async def reported() -> bool:
        headers = {"endpoint-load-metrics-format": "JSON"}
        async with http.post(sidecar.url + CHAT[0], json=CHAT[1], headers=headers) as answer:
            reports = answer.headers.getall("endpoint-load-metrics")
        assert len(reports) == 1
        return "mu_utilization" in json.loads(reports[0].removeprefix("JSON "))["named_metrics"]

    await client.until(reported, "the sidecar's load report")


async def test_vllms_own_errors_pass(engine: Engine, sidecar: Sidecar, http: Http) -> None:
    """A request that vLLM refuses gets vLLM's own status and body."""
    answers = []
    for url in (engine.url, sidecar.url):
        async with http.post(url + CHAT[0], json=client.chat(TEXT, max_tokens=100_000)) as answer:
            answers.append((answer.status, await answer.json()))
    assert answers[0] == answers[1]
    assert answers[0][0] == 400


async def test_no_alarm_in_a_quiet_period(sidecar: Sidecar, http: Http) -> None:
    """Without any requests, canaries pass, and the verdict never leaves idle once it was there."""

    async def canaries() -> bool:
        return await client.sample(http, f"{sidecar.admin}/metrics", "sidecar_canaries_total", outcome="ok") >= 6

    await client.until(canaries, "six canaries passed")
    assert set(await client.states(http, sidecar.admin)) <= {"starting", "idle", "progressing", "quiet"}
    assert (await client.probe(http, f"{sidecar.admin}/readyz"))[:2] == (200, "idle")


async def test_no_alarm_under_twenty_long_prompts_at_once(sidecar: Sidecar, http: Http) -> None:
    """Twenty prompts near the model's limit at once are all served, and the verdict never turns against the engine."""
    prompts = [f"{n}: " + "The tokens come one by one. " * 480 for n in range(20)]
    url = f"{sidecar.url}/v1/completions"
    work = [client.stream(http, url, client.completion(prompt) | ASKED) for prompt in prompts]
    usages = [client.said(lines)["usage"][0] for lines in await asyncio.gather(*work)]
    assert all(usage["prompt_tokens"] > 3000 and usage["completion_tokens"] == 48 for usage in usages)
    assert set(await client.states(http, sidecar.admin)) <= {"starting", "idle", "progressing", "quiet"}
