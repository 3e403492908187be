"""Series of clients: bounded, equal to the ledger's sums, and none ever falls, whichever names come and go."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sidecar.events import Admitted, Delivered, Event, FirstToken, Outcome, RequestSize, Settled, Usage
from sidecar.load import cost_model
from sidecar.load.client_labels import MAX_PAIRS_PER_TENANT, ClientLabels
from sidecar.load.gpu_price import GpuPrice
from sidecar.load.ledger import Ledger, Settlement
from sidecar.report.fan_out import FanOut
from sidecar.report.metrics import METRICS, Metrics
from sidecar.report.tracing import Tracing
from sidecar.report.usage_query import read
from sidecar.report.usage_rows import UsageSums
from sidecar.report.usage_store import UsageStore

CO = cost_model.Coefficients()
LIMIT = 3
PRICED = CO.fingerprint, cost_model.unit_ms(CO)
PRICE = GpuPrice(8, 3.6)
PER_CLIENT = {metric.name for metric in METRICS if metric.labels[:2] == ("tenant", "model")}


class Books:
    """A ledger, its metrics and its usage records, fed as in the control process."""

    def __init__(self, usage: UsageStore) -> None:
        self.ledger, self.metrics, self.usage = Ledger(CO, ClientLabels(LIMIT)), Metrics(), usage
        tracing = Tracing("", "0")
        self.fan_out = FanOut(self.metrics, tracing, usage, self.ledger.labels, lambda work: (), *PRICED)
        self.count = 0

    def apply(self, relay: int, event: Event) -> Settlement | None:
        settlement = self.ledger.apply(relay, event)
        if settlement is not None:
            self.fan_out.on_settlement(settlement, PRICE, settlement.settled.at)
        return settlement

    def lose(self, relay: int, now: float) -> list[Settlement]:
        lost = self.ledger.lose(relay, now)
        for settlement in lost:
            self.fan_out.on_settlement(settlement, PRICE, now)
        return lost

    def request(self, tenant: str, model: str, outcome: Outcome, status: int, now: float) -> None:
        self.count += 1
        work = RequestSize(500, output=3)
        self.apply(0, Admitted(str(self.count), now, tenant, model, "chat", True, work, 3, cost_model.mu(work, CO)))
        self.apply(0, Settled(str(self.count), now, outcome, status, None, 3, 12, None, now, 0.001))

    def write(self) -> None:
        self.usage.write(self.usage.take(), 0.0)

    def series(self) -> dict[tuple[str, ...], float]:
        """(metric, label values) -> value of every series of a client."""
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in self.metrics.collect()
            for sample in family.samples
            if sample.name in PER_CLIENT
        }


def test_rejected_inventions_hide_no_name(tmp_path: Path) -> None:
    """2,601 invented tenants and models that all get 404 are one series, and real ones have theirs afterwards."""
    books = Books(UsageStore(tmp_path, 35, 1 << 20))
    for n in range(2601):
        books.request(f"invented-{n}", f"made-up-{n}", "rejected", 404, n / 400)
    books.request("acme", "llama", "ok", 200, 7.0)
    requests = {key[1:]: value for key, value in books.series().items() if key[0] == "sidecar_requests_total"}
    assert requests == {("other", "other", "rejected"): 2601, ("acme", "llama", "ok"): 1}


names = st.integers(0, 12).map(str)
ends = st.sampled_from([("ok", 200), ("rejected", 404), ("engine_error", 500), ("client_cancelled", 200)])
relays, picks = st.integers(0, 1), st.integers(0, 1000)
works = st.builds(RequestSize, st.integers(0, 900), output=st.integers(0, 50), image_tokens=st.integers(0, 900))
usages = st.none() | st.builds(Usage, st.integers(0, 900), st.integers(0, 60), st.integers(0, 1200))


@given(st.lists(st.tuples(names, names, ends, st.floats(0, 20_000)), max_size=60))
def test_no_series_falls_while_names_come_and_go(requests: list[tuple[str, str, tuple[Outcome, int], float]]) -> None:
    """Series end only by moving into `other`; the sum over all labels only grows; the page is bounded."""
    books, now, before = Books(UsageStore(Path("/nowhere"), 35, 1 << 20)), 0.0, dict[tuple[str, ...], float]()
    for tenant, model, (outcome, status), step in requests:
        now += step
        books.request(tenant, model, outcome, status, now)
        after = books.series()
        assert all(after[key] >= value - 1e-9 for key, value in before.items() if key in after)
        sums = [Counter[str](), Counter[str]()]
        for total, page in zip(sums, (before, after), strict=True):
            for key, value in page.items():
                total[key[0]] += value  # type: ignore[assignment]
        assert all(sums[1][name] >= value - 1e-9 for name, value in sums[0].items())
        clients = {key[1:3] for key in after}
        assert len(clients) <= MAX_PAIRS_PER_TENANT * LIMIT + 2 * LIMIT + 1
        before = after
    counted = {key[1:]: value for key, value in before.items() if key[0] == "sidecar_requests_total"}
    assert counted == {key: requests for key, (_, requests) in books.ledger.totals.items()}


class Bills(RuleBasedStateMachine):
    """Events of two relays in any order: duplicates, replays, usages that correct, deaths of relays and of control."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.disk = Path(self.folder.name)
        self.now, self.count = 0.0, 0
        self.sent: list[tuple[int, Admitted]] = []
        self.settled: list[tuple[int, Settled]] = []
        self.counted: dict[str, Settlement] = {}  # by request
        self.start()

    def teardown(self) -> None:
        self.folder.cleanup()

    def start(self) -> None:
        """A control process begins: its counters start at 0, its file is the one before."""
        self.books, self.shown, self.in_process = Books(UsageStore(self.disk, 35, 1 << 20)), {}, list[Settlement]()

    def apply(self, relay: int, event: Event) -> None:
        settlement = self.books.apply(relay, event)
        if settlement is not None:
            self.in_process.append(settlement)
            self.counted.setdefault(settlement.admitted.id, settlement)

    @rule(relay=relays, tenant=names, model=names, work=works)
    def admit(self, relay: int, tenant: str, model: str, work: RequestSize) -> None:
        self.count += 1
        id = str(self.count)
        self.sent.append((relay, Admitted(id, self.now, tenant, model, "chat", True, work, None, 1.0)))
        self.apply(*self.sent[-1])

    @rule(pick=picks, tokens=st.integers(0, 50), again=st.booleans())
    def deliver(self, pick: int, tokens: int, again: bool) -> None:
        self.now += 0.5
        if self.sent:
            relay, admitted = self.sent[pick % len(self.sent)]
            for _ in range(2 if again else 1):
                self.apply(relay, FirstToken(admitted.id, self.now))
                self.apply(relay, Delivered(admitted.id, self.now, tokens, 9))

    @rule(pick=picks, end=ends, usage=usages)
    def settle(self, pick: int, end: tuple[Outcome, int], usage: Usage | None) -> None:
        self.now += 0.5
        if self.sent:
            relay, admitted = self.sent[pick % len(self.sent)]
            done = Settled(admitted.id, self.now, end[0], end[1], usage, 7, 90, None, admitted.at, 0.0)
            self.settled.append((relay, done))
            self.apply(relay, done)

    @rule(pick=picks)
    def repeat(self, pick: int) -> None:
        """A relay repeats a Settled event."""
        if self.settled:
            self.apply(*self.settled[pick % len(self.settled)])

    @rule(relay=relays)
    def die(self, relay: int) -> None:
        for settlement in self.books.lose(relay, self.now):
            self.in_process.append(settlement)
            self.counted.setdefault(settlement.admitted.id, settlement)
        self.sent = [(owner, admitted) for owner, admitted in self.sent if owner != relay]

    @rule()
    def restart_control(self) -> None:
        """Written to disk, the process is killed before it could acknowledge: relays send everything again."""
        self.books.write()
        self.start()
        for relay, admitted in self.sent:
            self.apply(relay, admitted)
        for relay, done in self.settled[-5:]:
            self.apply(relay, done)

    @invariant()
    def no_counter_falls(self) -> None:
        after = self.books.series()
        assert all(after[key] >= value - 1e-9 for key, value in self.shown.items() if key in after)
        assert self.books.ledger.delivered_total >= self.shown.get(("delivered",), 0)
        self.shown = after | {("delivered",): float(self.books.ledger.delivered_total)}

    @invariant()
    def tokens_are_those_of_the_settlements(self) -> None:
        """Each token is of one kind; all of them together are what went in and out."""
        total = sum(value for key, value in self.shown.items() if key[0] == "sidecar_tokens_total")
        assert total == sum(s.work.uncached + s.work.cached + s.delivered for s in self.in_process)

    @invariant()
    def the_file_has_each_request_once(self) -> None:
        self.books.write()
        rows = read(self.books.usage.path, 0, 1e9, ()) if self.books.usage.path.exists() else []
        sums = rows[0][1] if rows else UsageSums()
        assert sums.requests == len(self.counted)
        assert sums.mu == pytest.approx(sum(s.mu for s in self.counted.values()))
        assert sums.output_tokens == sum(s.delivered for s in self.counted.values())


Bills.TestCase.settings = settings(max_examples=20, stateful_step_count=20)
TestBills = Bills.TestCase
