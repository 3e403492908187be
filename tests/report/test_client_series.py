"""Series of clients: bounded, equal to the ledger's sums, and none ever falls, whichever names come and go."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sidecar.events import Admitted, Outcome, RequestSize, Settled
from sidecar.load import cost_model
from sidecar.load.client_labels import MAX_PAIRS_PER_TENANT, ClientLabels
from sidecar.load.ledger import Ledger
from sidecar.report.fan_out import FanOut
from sidecar.report.metrics import METRICS, Metrics
from sidecar.report.tracing import Tracing

CO = cost_model.Coefficients()
LIMIT = 3
PER_CLIENT = {metric.name for metric in METRICS if metric.labels[:2] == ("tenant", "model")}


class Books:
    """A ledger and its metrics, fed as in the control process."""

    def __init__(self) -> None:
        self.ledger, self.metrics = Ledger(CO, ClientLabels(LIMIT)), Metrics()
        unit_ms = cost_model.unit_ms(CO)
        self.fan_out = FanOut(self.metrics, Tracing("", "0"), None, self.ledger.labels, lambda work: (), unit_ms, 3.6)
        self.count = 0

    def request(self, tenant: str, model: str, outcome: Outcome, status: int, now: float) -> None:
        self.count += 1
        work = RequestSize(500, output=3)
        admitted = Admitted(str(self.count), now, tenant, model, "chat", True, work, 3, cost_model.mu(work, CO))
        settled = Settled(str(self.count), now, outcome, status, None, 3, 12, None, now, 0.001)
        for event in (admitted, settled):
            if (settlement := self.ledger.apply(0, event)) is not None:
                self.fan_out.on_settlement(settlement, 0.0)

    def series(self) -> dict[tuple[str, ...], float]:
        """(metric, label values) -> value of every series of a client."""
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in self.metrics.collect()
            for sample in family.samples
            if sample.name in PER_CLIENT
        }


def test_rejected_inventions_hide_no_name() -> None:
    """2,601 invented tenants and models that all get 404 are one series, and real ones have theirs afterwards."""
    books = Books()
    for n in range(2601):
        books.request(f"invented-{n}", f"made-up-{n}", "rejected", 404, n / 400)
    books.request("acme", "llama", "ok", 200, 7.0)
    requests = {key[1:]: value for key, value in books.series().items() if key[0] == "sidecar_requests_total"}
    assert requests == {("other", "other", "rejected"): 2601, ("acme", "llama", "ok"): 1}


names = st.integers(0, 12).map(str)
ends = st.sampled_from([("ok", 200), ("rejected", 404), ("engine_error", 500), ("client_cancelled", 200)])


@given(st.lists(st.tuples(names, names, ends, st.floats(0, 20_000)), max_size=60))
def test_no_series_falls_while_names_come_and_go(requests: list[tuple[str, str, tuple[Outcome, int], float]]) -> None:
    """Series end only by moving into `other`; the sum over all labels only grows; the page is bounded."""
    books, now, before = Books(), 0.0, dict[tuple[str, ...], float]()
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
