"""More cases of each kind of error in names, money and time: one test each, named by its kind (docs/metering.md)."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from sidecar.control.state import ControlState
from sidecar.errors import UsageError
from sidecar.events import Admitted, Outcome, RequestSize, Settled, Usage
from sidecar.health.monitor import TickReadings
from sidecar.load.client_labels import ClientLabels
from sidecar.load.cost_model import Coefficients
from sidecar.load.ledger import Ledger, Settlement
from sidecar.readings import Absent, EngineIdentity, EngineSample, RankSample, Value
from sidecar.report.usage_query import hours, read
from sidecar.report.usage_rows import HOUR_S, PendingUsage, Rate, UsageKey, UsageSums
from sidecar.report.usage_store import USAGE_FILE, UsageStore
from sidecar.settings import Settings
from sidecar.tools.usage_export import ExportSettings, export_range

LIMIT = 50


class Books:
    """A ledger, and requests of clients to it."""

    def __init__(self) -> None:
        self.ledger, self.at = Ledger(Coefficients(), ClientLabels(LIMIT)), 0.0
        self.ledger.labels.give(models=("served",))

    def request(
        self, tenant: str, model: str = "served", *, tokens: int = 3500, outcome: Outcome = "ok", status: int = 200
    ) -> Settlement:
        self.at += 1.0
        id = str(self.at)
        work, usage = RequestSize(tokens, output=tokens // 10), Usage(tokens, tokens // 10)
        self.ledger.apply(0, Admitted(id, self.at, tenant, model, "chat", True, work, None, 1.0))
        done = Settled(id, self.at + 0.5, outcome, status, usage, tokens // 10, 40, self.at + 0.1, self.at, 0.0)
        settlement = self.ledger.apply(0, done)
        assert settlement is not None
        return settlement


@pytest.mark.parametrize("outcome", ["ok", "client_cancelled"])
def test_6_names_that_cost_little_hide_no_tenant(outcome: Outcome) -> None:
    """2,601 invented tenants with a cheap request each, served or left at once, then five real ones."""
    books = Books()
    for n in range(2601):
        books.request(f"invented-{n}", tokens=10, outcome=outcome)
    for _ in range(2):
        last = {books.request(f"real-{n}").tenant for n in range(5)}
    assert last == {f"real-{n}" for n in range(5)}
    assert len(books.ledger.tenant_totals) <= LIMIT + 2


def test_6_an_engine_that_takes_any_model_keeps_the_name_of_its_own() -> None:
    """llama.cpp answers 200 to every model: invented names take no place of the one that it lists, nor of tenants."""
    books = Books()
    for n in range(2601):
        books.request("t", f"invented-{n}")
    settlement = books.request("t")
    assert (settlement.tenant, settlement.model) == ("t", "served")
    assert len({model for _, model, _ in books.ledger.totals}) <= LIMIT + 2


def test_6_an_invisible_name_is_shown() -> None:
    """A line feed, a change of direction or a zero-width space makes no second name that looks like another's."""
    books = Books()
    assert [books.request(name).tenant for name in ("a\nb", "\u202ea", "a\u200bb", " a ")] == ["a?b", "?a", "a?b", "a"]


@pytest.mark.parametrize(("gpus", "assumed"), [(0, True), (8, False)])
def test_7_the_ranks_of_an_engine_are_no_count_of_its_gpus(gpus: int, assumed: bool) -> None:
    """Two ranks of four GPUs each, none of which the sidecar sees: two are billed, and that is said to be a guess."""
    control = ControlState(Settings(engine="http://e", dollars_per_gpu_hour=2.5, gpus=gpus), Coefficients(), 0.0, 0.0)
    nothing = Absent("not here")
    page = EngineSample(ranks=(RankSample(0), RankSample(1)))
    control.tick(
        TickReadings(Value(page, 1.0), nothing, nothing, (), None, "vllm", identity=EngineIdentity()), 1.0, 1.0
    )
    assert (control.gpu_count.gpus, control.is_gpu_count_assumed) == (gpus or 2, assumed)


KOLKATA = "Asia/Kolkata"  # +05:30
DAY = int(datetime.fromisoformat("2026-11-01T00:00+05:30").timestamp())


def rows_of_two_days(span: int) -> dict[UsageKey, UsageSums]:
    """60 requests in each hour of two days in Kolkata, in rows of `span` seconds of UTC."""
    first = DAY // HOUR_S * HOUR_S
    spans = range(first, first + 49 * HOUR_S, span)
    return {
        UsageKey(at, span, "a", "m", "ok", "told", Rate("f", 1, 2.0)): UsageSums(span // 60, 1.0, span / 60)
        for at in spans
    }


@pytest.mark.parametrize("span", [60, 900, HOUR_S])
def test_16_days_of_a_zone_between_the_hours_of_utc_can_be_exported(tmp_path: Path, span: int) -> None:
    """Each day in Kolkata has 24 rows of an hour; both together are what both days together are."""
    store = UsageStore(tmp_path, 3660, 1 << 20)
    store.write(PendingUsage(rows_of_two_days(span)), DAY)
    exported = []
    for first, last in (("2026-11-01", "2026-11-02"), ("2026-11-02", "2026-11-03"), ("2026-11-01", "2026-11-03")):
        since, until = export_range(ExportSettings(from_=first, until=last, tz=KOLKATA), 0, DAY + 30 * 86_400)
        found = hours(tmp_path / USAGE_FILE, since, until)
        assert [key.at for key, _ in sorted(found)] == list(range(since, until, HOUR_S))
        assert {(key.span, sums.requests) for key, sums in found} == {(HOUR_S, 60)}
        exported.append(sum(sums.requests for _, sums in found))
        [(_, sums)] = read(tmp_path / USAGE_FILE, since, until, ())
        assert sums.requests == exported[-1], "the export is the report"
    assert exported == [1440, 1440, 2880]


@pytest.mark.parametrize(
    ("first", "last", "zone"),
    [
        ("2026-11-01T00:10", "2026-11-02T00:10", "UTC"),
        ("2026-11-01", "2026-11-01T12:30", "UTC"),
        ("2026-11-01T00:00Z", "2026-11-02", KOLKATA),
    ],
)
def test_16_an_export_that_would_cut_an_hour_is_refused(first: str, last: str, zone: str) -> None:
    """Each row of an export is an hour: what is none is not rounded."""
    with pytest.raises(UsageError, match="full hours"):
        export_range(ExportSettings(from_=first, until=last, tz=zone), 0, DAY + 30 * 86_400)


def test_16_hours_that_follow_each_other_over_a_change_of_the_clock_add_up(tmp_path: Path) -> None:
    """The hour from 2 to 3 comes twice in Berlin: its parts, named with their offsets, are each an hour."""
    start = int(datetime.fromisoformat("2026-10-24T22:00+00:00").timestamp())
    rows = {UsageKey(start + 60 * n, 60, "a", "m", "ok", "told", Rate()): UsageSums(1, 1.0) for n in range(25 * 60)}
    UsageStore(tmp_path, 3660, 1 << 20).write(PendingUsage(rows), start)
    found = []
    for first, last in (
        ("2026-10-25", "2026-10-25T02:00+02:00"),
        ("2026-10-25T02:00+02:00", "2026-10-25T02:00+01:00"),
        ("2026-10-25T02:00+01:00", "2026-10-26"),
    ):
        since, until = export_range(ExportSettings(from_=first, until=last, tz="Europe/Berlin"), 0, start + 90 * 86_400)
        found.append(sum(sums.requests for _, sums in hours(tmp_path / USAGE_FILE, since, until)))
    assert found == [120, 60, 22 * 60]
