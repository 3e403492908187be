"""The worked day of docs/billing.md: the bill of three tenants adds up to the invoice, and holds what they sent.

The tables of the document are the results of these tests. UPDATE_DOCS=1 rewrites them.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from sidecar.__main__ import run
from sidecar.load.cost_model import unit_ms
from sidecar.report.request_log import LOG_FILE
from sidecar.report.usage_export import Exporter, focus, record
from sidecar.report.usage_query import hours, read
from sidecar.report.usage_rows import DAY_S, IDLE, UsageSums, tokens_by_kind
from sidecar.report.usage_store import USAGE_FILE

from .worked_day import ENGINES, INVOICE, MIDNIGHT, DayPod, simulate

PAGE: Final = Path(__file__).parents[2] / "docs" / "billing.md"
USED, FAILED = ("ok", "client_cancelled"), ("engine_error", "stalled")
TENANTS = ("shop", "search", "media")


@dataclass(frozen=True)
class Day:
    """What the day left: the pods, and the merged records."""

    pods: dict[str, DayPod]
    path: Path

    def sums(self, *by: str) -> dict[tuple[Any, ...], UsageSums]:
        return dict(read(self.path, MIDNIGHT, MIDNIGHT + DAY_S, by))

    def lines(self) -> list[dict[str, Any]]:
        """Of the logs of requests."""
        texts = [(pod.folder / LOG_FILE).read_text() for pod in self.pods.values()]
        return [json.loads(line) for text in texts for line in text.splitlines()]


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Day:
    folder = tmp_path_factory.mktemp("day")
    pods = simulate(folder)
    files = [str(pod.folder / USAGE_FILE) for pod in pods.values()]
    assert run(["usage", "merge", "--into", str(folder / "all"), *files]) == 0
    return Day(pods, folder / "all" / USAGE_FILE)


def dollars(day: Day, outcomes: Sequence[str], tenant: str = "") -> float:
    rows = day.sums("tenant", "outcome").items()
    return sum(s.dollars for (whose, outcome), s in rows if outcome in outcomes and tenant in ("", whose))


def test_the_rows_are_the_invoice(day: Day) -> None:
    """Used, failed and idle are the GPU hours times the price, within 1 %: of each engine, and of all."""
    for name, engine in ENGINES.items():
        rows = read(day.pods[name].folder / USAGE_FILE, MIDNIGHT, MIDNIGHT + DAY_S, ("outcome",))
        assert sum(s.gpu_seconds for _, s in rows) / 3600 == pytest.approx(24 * engine.price.gpus, rel=0.01)
    parts = [dollars(day, outcomes) for outcomes in (USED, FAILED, (IDLE,))]
    assert sum(parts) == pytest.approx(INVOICE, rel=0.01) and all(part > 0 for part in parts)
    assert sum(s.dollars for s in day.sums("outcome").values()) == pytest.approx(INVOICE, rel=0.01)


def test_each_request_is_billed_to_its_tenant(day: Day) -> None:
    """Requests of each tenant, and the tokens of those that ended well, are those that were sent."""
    sent, tokens = Counter[str](), defaultdict[str, Counter[str]](Counter)
    for pod in day.pods.values():
        for request in pod.sent:
            sent[request.tenant] += 1
    rows = day.sums("tenant", "outcome", "source")
    for line in day.lines():
        if line["outcome"] == "ok" and not line["estimated"]:
            tokens[line["tenant"]].update(line["tokens"])
    for tenant in TENANTS:
        mine = {key: s for key, s in rows.items() if key[0] == tenant}
        assert sum(s.requests for s in mine.values()) == sent[tenant]
        told = mine[tenant, "ok", "told"]
        assert tokens_by_kind(told) == dict(tokens[tenant])
    shop = [r for r in day.pods["chat"].sent if r.tenant == "shop" and r.outcome == "ok"]
    most = sum(r.size.cached for r in shop)
    assert 0.98 * most < rows["shop", "ok", "told"].cached_tokens <= most, "but those that the engine lost"


def test_the_log_of_requests_is_the_rows(day: Day) -> None:
    """Line by line, the same model units and dollars."""
    total = UsageSums()
    for (tenant,), sums in day.sums("tenant").items():
        if tenant:
            total.add(sums)
    lines = day.lines()
    assert len(lines) == total.requests == len({line["id"] for line in lines})
    for name in ("mu", "gpu_seconds", "dollars"):
        assert sum(line[name] for line in lines) == pytest.approx(getattr(total, name), rel=1e-4)


def test_focus_bills_the_invoice(day: Day) -> None:
    """The exported rows cost what the GPUs cost; each names coefficients and price."""
    by = Exporter("origin", "pod", "a", "p", "USD")
    rows = [focus(record(key, sums, by), by) for key, sums in hours(day.path, MIDNIGHT, MIDNIGHT + DAY_S)]
    assert sum(row["BilledCost"] for row in rows) == pytest.approx(INVOICE, rel=0.01)
    assert {row["x_Coefficients"] for row in rows} == {engine.co.fingerprint for engine in ENGINES.values()}
    assert {row["ListUnitPrice"] for row in rows} == {2.5, 0.9}


# --- the document ---


def test_the_document_shows_this_day(day: Day) -> None:
    """Its tables; and charging back what each tenant used, with the rest in proportion, gives the invoice."""
    charged = {tenant: dollars(day, USED, tenant) / dollars(day, USED) * INVOICE for tenant in TENANTS}
    assert sum(charged.values()) == pytest.approx(INVOICE, rel=1e-6)
    text = PAGE.read_text()
    tables = {
        "engines": engines(day),
        "outcomes": outcomes(day),
        "tenants": tenants(day),
        "kinds": kinds(day),
        "bills": bills(day, charged),
    }
    for name, rows in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        if os.environ.get("UPDATE_DOCS"):
            head, rest = text.split(begin)
            text = head + begin + "\n".join(rows) + "\n" + end + rest.split(end)[1]
            PAGE.write_text(text)
        shown = text.split(begin)[1].split(end)[0].splitlines()
        assert shown == rows, f"{PAGE.name} is stale: UPDATE_DOCS=1 pytest {Path(__file__).name}"


def engines(day: Day) -> list[str]:
    found = ["| engine | GPUs | $ an hour of each | a day | an MU | used |", "|---|---|---|---|---|---|"]
    for name, engine in ENGINES.items():
        rows = dict(read(day.pods[name].folder / USAGE_FILE, MIDNIGHT, MIDNIGHT + DAY_S, ("outcome",)))
        used = sum(s.gpu_seconds for (outcome,), s in rows.items() if outcome in USED) / 36 / 24 / engine.price.gpus
        mu = engine.price.dollars(engine.price.gpu_seconds(unit_ms(engine.co)))
        price, gpus = engine.price.dollars_per_gpu_hour, engine.price.gpus
        gpu = f"{gpus} x {engine.co.gpu}" if engine.co.gpu else str(gpus)
        found.append(f"| {engine.model} | {gpu} | {price:.2f} | ${24 * gpus * price:.2f} | ${mu:.6f} | {used:.1f} % |")
    return found


def outcomes(day: Day) -> list[str]:
    found = ["| outcome | requests | MU | GPU hours | dollars |", "|---|---|---|---|---|"]
    rows = day.sums("outcome")
    found += [_row(f"`{outcome}`", rows[outcome,]) for outcome in (*USED, "not_begun", *FAILED, IDLE)]
    total = UsageSums()
    for sums in rows.values():
        total.add(sums)
    return [*found, _row("**all**", total)]


def _row(name: str, s: UsageSums) -> str:
    return f"| {name} | {s.requests} | {s.mu:.1f} | {s.gpu_seconds / 3600:.2f} | {s.dollars:.2f} |"


def tenants(day: Day) -> list[str]:
    head = "| tenant | requests | new | cached | out | image | MU | of which estimated | MJ | dollars |"
    found = [head, "|" + "---|" * 10]
    for tenant in TENANTS:
        rows = {key: s for key, s in day.sums("tenant", "source").items() if key[0] == tenant}
        all_, estimated = UsageSums(), rows.get((tenant, "estimated"), UsageSums())
        for sums in rows.values():
            all_.add(sums)
        kinds, joules = tokens_by_kind(all_), (all_.joules or 0.0) / 1e6
        tokens = " | ".join(str(kinds[kind]) for kind in ("new", "cached", "out", "image"))
        cells = f"{all_.mu:.0f} | {estimated.mu / all_.mu:.1%} | {joules:.2f} | {all_.dollars:.2f}"
        found.append(f"| {tenant} | {all_.requests} | {tokens} | {cells} |")
    return found


def kinds(day: Day) -> list[str]:
    """By tenant and route, from the log of requests."""
    sums = defaultdict[tuple[str, str], Counter[str]](Counter)
    for line in day.lines():
        tokens = line["tokens"]
        sums[line["tenant"], line["route"]].update(
            {"requests": 1, "mu": line["mu"], "dollars": line["dollars"], "out": tokens["out"]}
        )
    found = ["| tenant | route | requests | MU a request | $ a thousand requests |", "|---|---|---|---|---|"]
    for (tenant, route), of in sorted(sums.items()):
        count = of["requests"]
        found.append(f"| {tenant} | {route} | {count} | {of['mu'] / count:.2f} | {1000 * of['dollars'] / count:.2f} |")
    return found


def bills(day: Day, charged: dict[str, float]) -> list[str]:
    found = ["| | showback | chargeback |", "|---|---|---|"]
    found += [f"| {whose} | ${dollars(day, USED, whose):.2f} | ${charged[whose]:.2f} |" for whose in TENANTS]
    rest = dollars(day, (*FAILED, IDLE))
    found.append(f"| the platform: idle and failed | ${rest:.2f} | |")
    return [*found, f"| **invoice** | ${dollars(day, USED) + rest:.2f} | ${sum(charged.values()):.2f} |"]
