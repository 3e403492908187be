"""Limits of tenants on the data path: 429 in OpenAI's shape, corrected by settlements, spilling over, reloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.errors import TenantLimited, UsageError
from sidecar.events import LoadReport, Settled
from sidecar.load.cost_model import Coefficients
from sidecar.load.estimator import Estimator
from sidecar.load.request_shape import RequestShape
from sidecar.relay.pricing.charge import Pricing
from sidecar.relay.pricing.quota import Quota
from sidecar.relay.pricing.tenant_accounts import TenantAccounts
from sidecar.signals.limits_file import read_limits
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine
from tests.relay.work import CHAT, FAST

ONE = (1.0, 1.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "limits.toml"


@pytest.fixture
def quota(file: Path) -> Iterator[Callable[[str], Quota]]:
    """A function: text of the file -> Quota."""
    opened: list[Quota] = []

    def open_(text: str) -> Quota:
        file.write_text(text)
        opened.append(Quota(str(file), TenantAccounts("", 1, 0), 1, read_limits(str(file))))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


async def test_a_tenant_over_its_limit_is_told_when_to_come_again(rig: Any, quota: Any) -> None:
    """429 in OpenAI's shape with the true wait, settled as rejected and without units; others are served."""
    limits = quota("[tenants.acme]\nmu_per_minute = 0.6\nburst_mu = 0.0001")
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url, pricing=Pricing(Estimator(Coefficients()), limits))
        statuses = []
        for tenant in ("acme", "acme", "else"):
            async with r.client.post(r.url + "/v1/chat/completions", json=CHAT, headers={"x-tenant-id": tenant}) as got:
                statuses.append(got.status)
                if got.status == 429:
                    body, headers = await got.json(), got.headers
    assert statuses == [200, 429, 200]
    assert body["error"]["code"] == "rate_limit_exceeded" and body["error"]["type"] == "tokens"
    assert "0.6 model units per minute" in body["error"]["message"]
    milliseconds = int(headers["retry-after-ms"])
    assert 0 < milliseconds / 1000 <= int(headers["retry-after"]) < milliseconds / 1000 + 1
    ends = r.emitted.of(Settled)
    assert [e.outcome for e in ends] == ["ok", "rejected", "ok"] and ends[1].error == "rate_limit_exceeded"


async def test_a_settlement_corrects_the_charge(rig: Any, quota: Any) -> None:
    """A request that was estimated at hundreds of tokens and had one gives the rest back: the next one is admitted."""
    price, shape = Estimator(Coefficients()), RequestShape("scripted", max_output=400, text_bytes=1)
    burst = 1.5 * price.estimate("t", shape, []).mu
    limits = quota(f"default = {{mu_per_minute = 0.0001, burst_mu = {burst}}}")
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url, pricing=Pricing(price, limits))
        for _ in range(3):
            ask = {"model": "scripted", "prompt": "x", "max_tokens": 400, "stop": None}
            async with r.client.post(r.url + "/v1/completions", json={**ask, "model": "none"}) as got:
                await got.read()
        async with r.client.post(r.url + "/v1/completions", json=ask) as got:
            assert got.status == 200
            await got.read()
    assert [e.outcome for e in r.emitted.of(Settled)] == ["rejected"] * 3 + ["ok"]


def test_spill_over_gives_what_is_idle_until_the_next_report(quota: Any) -> None:
    """A tenant over its limit gets what is idle below the threshold, once per load report, and nothing without one."""
    limits = quota("spill_over_below = 0.5\n[default]\nmu_per_minute = 0.6\nburst_mu = 1\nspill_over = true")
    limits.take("a", *ONE)
    with pytest.raises(TenantLimited):
        limits.take("a", *ONE)
    limits.on_load_report(LoadReport("", "", "progressing", utilization=0.3, mu_max_in_flight=10.0))
    leases = [limits.take("a", *ONE), limits.take("a", *ONE)]
    with pytest.raises(TenantLimited):
        limits.take("a", *ONE)
    for lease in leases:
        limits.settle(lease, 50.0)
    limits.on_load_report(LoadReport("", "", "progressing", utilization=0.6, mu_max_in_flight=10.0))
    with pytest.raises(TenantLimited, match="rate limit") as caught:
        limits.take("a", *ONE)
    assert caught.value.retry_after is not None and 90 < caught.value.retry_after <= 100  # no debt of what was spilled


def test_a_tenant_that_may_not_spill_over_does_not(quota: Any) -> None:
    """Its own share is all it gets, however idle the engine is."""
    limits = quota("[default]\nmu_in_flight = 1")
    limits.on_load_report(LoadReport("", "", "idle", utilization=0.0, mu_max_in_flight=10.0))
    lease = limits.take("a", *ONE)
    with pytest.raises(TenantLimited, match="in flight") as caught:
        limits.take("a", *ONE)
    assert caught.value.type == "requests" and caught.value.retry_after == 1.0
    limits.settle(lease, 1.0)
    limits.take("a", *ONE)


def test_a_changed_file_is_read_and_a_bad_one_changes_nothing(
    quota: Any, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a ConfigMap changes: by another file behind the same name. An error is logged once."""
    limits = quota("[default]\nmu_in_flight = 1")
    lease = limits.take("a", *ONE)
    for text, logged in (("[default]\nmu_in_flight = 9", "reloaded"), ("[default]\nmu = 1", "unknown key 'mu'")):
        (tmp_path / "next").write_text(text)
        (tmp_path / "next").replace(file)
        caplog.set_level("INFO")
        limits.check_file()
        limits.check_file()
        assert sum(logged in line for line in caplog.messages) == 1
        limits.take("a", *ONE)
    file.unlink()
    limits.check_file()
    limits.settle(lease, 1.0)
    limits.take("a", *ONE)


def test_a_limit_that_is_new_finds_a_full_bucket(quota: Any, file: Path) -> None:
    """A tenant that had none of that kind has saved up all of it, also where requests of it are open."""
    limits = quota("[default]\nmu_in_flight = 9")
    limits.take("a", *ONE)
    file.write_text("[default]\nmu_in_flight = 9\nmu_per_minute = 0.6\nburst_mu = 2")
    limits.check_file()
    for _ in range(2):
        limits.take("a", *ONE)
    with pytest.raises(TenantLimited, match="rate limit"):
        limits.take("a", *ONE)


@pytest.mark.parametrize("now", [None, "[default]\nmu = 1"], ids=["gone", "bad"])
def test_a_relay_that_is_started_again_beside_a_bad_file_serves(quota: Any, file: Path, now: str | None) -> None:
    """Its limits are those of the sidecar's start, until the file is good again."""
    quota("[default]\nmu_in_flight = 1")
    known = read_limits(str(file))
    file.unlink()
    if now is not None:
        file.write_text(now)
    limits = Quota(str(file), TenantAccounts("", 1, 0), 1, known)
    limits.take("a", *ONE)
    with pytest.raises(TenantLimited):
        limits.take("a", *ONE)
    file.write_text("[default]\nmu_in_flight = 9")
    limits.check_file()
    limits.take("a", *ONE)
    limits.close()


def test_a_file_that_cannot_be_used_ends_the_start(quota: Any) -> None:
    """Before anything runs, and with its name."""
    with pytest.raises(UsageError, match=r"--tenant-limits .*limits\.toml: default\.mu_in_flight"):
        quota("[default]\nmu_in_flight = -1")
