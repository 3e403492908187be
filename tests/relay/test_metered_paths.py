"""Limits cannot be bypassed: every path and method an engine serves is charged, or counted as not metered."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from sidecar.events import Admitted, Settled, UnreadRequest
from sidecar.load.cost_model import Coefficients
from sidecar.load.estimator import Estimator
from sidecar.relay.pricing.charge import Pricing
from sidecar.relay.pricing.quota import Quota
from sidecar.relay.pricing.tenant_accounts import TenantAccounts
from sidecar.report.metrics import Metrics
from sidecar.signals.limits_file import read_limits

BODY = json.dumps({"prompt": "a long prompt", "messages": [{"content": "a long prompt"}], "n": 5}).encode()


@pytest.fixture
def spent(tmp_path: Path) -> Iterator[Pricing]:
    """Prices with a limit that admits nothing."""
    file = tmp_path / "limits.toml"
    file.write_text("default = {mu_per_minute = 0}")
    quota = Quota(str(file), TenantAccounts("", 1, 0), 1, read_limits(str(file)))
    yield Pricing(Estimator(Coefficients()), quota)
    quota.close()


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/chat/%63ompletions"),
        ("POST", "/v1/chat%2Fcompletions"),
        ("POST", "/v1/chat/%u0063ompletions"),
        ("POST", "/v1/chat/completions%0A"),
        ("POST", "/v1/chat/completions#x"),
        ("POST", "/v1/chat/completions?x=/tokenize"),
        ("POST", "//v1//chat/completions/"),
        ("POST", "/V1/Chat/Completions"),
        ("POST", "/v1/chat/completions;v=1"),
        ("POST", "http://x/v1/chat/completions"),
        ("PUT", "/generate"),
        ("PATCH", "/generate"),
        ("DELETE", "/generate"),
        ("GET", "/generate"),
        ("POST", "/"),
        ("POST", "/completion"),
        ("POST", "/api/chat"),
        ("POST", "/invocations"),
        ("POST", "/v1/systemone"),
        ("POST", "/v1/audio/transcriptions"),
        ("POST", "/v1/images/generations"),
    ],
)
async def test_no_path_leads_round_a_limit(rig: Any, serve: Any, spent: Pricing, method: str, target: str) -> None:
    """Each is refused as its limit asks, and does not reach the engine."""
    seen: list[str] = []

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(request.path)
        return web.Response()

    r = await rig(await serve(engine), pricing=spent)
    head = f"{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(BODY)}\r\n\r\n"
    assert (await r.raw(head.encode() + BODY)).startswith(b"HTTP/1.1 429 ")
    assert [end.error for end in r.emitted.of(Settled)] == ["rate_limit_exceeded"]
    assert not seen


async def test_a_compressed_body_is_read(rig: Any, serve: Any) -> None:
    """Bodies that an engine may decompress are priced by their decompressed text, and forwarded unchanged."""
    got: list[bytes] = []

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        got.append(await request.read())
        return web.json_response({})

    r = await rig(await serve(engine))
    plain = json.dumps({"prompt": ["x" * 4000] * 3, "n": 2, "stream": True}).encode()
    packed = gzip.compress(plain)
    headers = {"content-encoding": "gzip"}
    for data, fields in ((plain, {}), (packed, headers), (packed[:-20] + bytes(20), headers)):
        async with r.client.post(r.url + "/v1/completions", data=data, headers=fields) as answer:
            await answer.read()
    whole, read, broken = r.emitted.of(Admitted)
    assert read.expected == whole.expected
    assert whole.expected.sequences == 6
    assert broken.expected.uncached > 0
    assert len(got) >= 2


async def test_what_is_not_metered_is_counted_and_logged_once(
    rig: Any, serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """By its class, with one line for a minute's calls of unknown paths; read-only calls are not counted."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({})

    r, page = await rig(await serve(engine)), Metrics()
    caplog.set_level(logging.WARNING, "sidecar.relay.open_requests")
    calls = [
        ("POST", "/v9/new/secret-key?token=secret"),
        ("PUT", "/v9/new\u00e4\x01"),
        ("PUT", "/v9/newer"),
        ("POST", "/tokenize"),
    ]
    calls += [("POST", "/v1/files"), ("POST", "/v1/load_lora_adapter"), ("GET", "/v1/models"), ("POST", "/sleep")]
    for method, path in calls:
        async with r.client.request(method, r.url + path) as answer:
            await answer.read()
    begun = [event for event in r.emitted.of(UnreadRequest) if event.on]
    for event in r.emitted.of(UnreadRequest):
        page.observe(event)
    assert [event.path_class for event in begun] == ["other", "other", "other", "tokenizer", "files", "control"]
    counted = {
        sample.labels["path_class"]: sample.value
        for family in page.collect()
        for sample in family.samples
        if sample.name == "sidecar_unmetered_requests_total"
    }
    assert counted == {"other": 3, "tokenizer": 1, "files": 1, "control": 1}
    [line] = [record.getMessage() for record in caplog.records if "not metered" in record.getMessage()]
    assert "POST /v9/new/... " in line
    assert "secret" not in line
