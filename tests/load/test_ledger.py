"""The ledger: the load in flight is the sum of the holds, whatever the order of events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from msgspec import structs

from sidecar.events import Admitted, Delivered, FirstToken, Outcome, RequestBlocked, RequestSize, Settled, Usage
from sidecar.load import cost_model
from sidecar.load.client_labels import ClientLabels
from sidecar.load.ledger import Ledger, SlidingSum

CO = cost_model.Coefficients()
WORK = RequestSize(1000, output=100)


def admitted(id: str, at: float = 0.0, work: RequestSize = WORK, tenant: str = "acme") -> Admitted:
    return Admitted(id, at, tenant, "m", "chat", True, work, None, cost_model.mu(work, CO))


def settled(
    id: str,
    at: float,
    outcome: Outcome = "ok",
    *,
    usage: Usage | None = None,
    tokens: int = 0,
    first: float | None = None,
    sent: float | None = 0.0,
    size: int = 0,
) -> Settled:
    return Settled(id, at, outcome, 200, usage, tokens, size, first, sent, 0.0)


def test_a_request_holds_its_estimate_releases_its_prefill_and_settles_on_usage() -> None:
    """Hold, release, accrue, settle: the flow ends at the actual cost."""
    ledger = Ledger(CO)
    hold = admitted("a")
    ledger.apply(0, hold)
    assert ledger.in_flight().mu == hold.mu and ledger.in_flight().waiting == 1
    ledger.apply(0, FirstToken("a", 1.0))
    stock = ledger.in_flight()
    assert stock.mu < hold.mu and stock.prefill_tokens == 0 and stock.decode_tokens == 100
    ledger.apply(0, Delivered("a", 2.0, 40, 900))
    assert ledger.in_flight().decode_tokens == 60
    done = ledger.apply(0, settled("a", 3.0, usage=Usage(1000, 50, 400), first=1.0, tokens=50))
    assert done is not None and done.work == RequestSize(600, 400, 50)
    assert done.mu == cost_model.mu(RequestSize(600, 400, 50), CO)
    assert ledger.in_flight() == type(ledger.in_flight())(0.0, 0, 0, 0, 0)
    assert ledger.flow.sum(3.0) == pytest.approx(done.mu)
    assert ledger.delivered_total == 50


def test_a_request_that_outlasts_its_estimate_keeps_a_hold() -> None:
    """Beyond its estimate a hold follows the tail of the estimate, up to the client's limit."""
    ledger = Ledger(CO)
    ledger.apply(0, structs.replace(admitted("a"), tail=(60, 200, 300, 300), max_output=1000))
    left = []
    for at, tokens in enumerate((50, 50, 50, 50, 200, 400, 190), 1):
        ledger.apply(0, Delivered("a", at, tokens, 900))
        left.append(ledger.in_flight().decode_tokens)
        assert ledger.in_flight().mu > cost_model.mu(RequestSize(0, output=left[-1]), CO) / 2
    assert left == [80, 60, 130, 200, 300, 200, 10]


def test_a_second_settlement_changes_nothing() -> None:
    """Each admission is settled exactly once."""
    ledger = Ledger(CO)
    ledger.apply(0, admitted("a"))
    assert ledger.apply(0, settled("a", 1.0)) is not None
    assert ledger.apply(0, settled("a", 1.0)) is None
    assert ledger.apply(0, settled("never", 1.0)) is None
    assert ledger.tenant_totals["acme"].requests == 1


def test_a_blocked_request_is_held_and_its_silence_starts_anew_when_it_goes_on() -> None:
    """A blocked hold keeps its units; the silence of the engine counts from its unblocking."""
    ledger = Ledger(CO)
    ledger.apply(0, admitted("a", at=1.0))
    ledger.apply(0, RequestBlocked("a", 2.0, True))
    ledger.apply(0, RequestBlocked("never", 2.0, True))
    [hold] = ledger.holds()
    assert (hold.blocked, hold.since, ledger.in_flight().waiting) == (True, 1.0, 1)
    ledger.apply(0, RequestBlocked("a", 9.0, False))
    [hold] = ledger.holds()
    assert (hold.blocked, hold.since, hold.last_at) == (False, 9.0, 9.0)


def test_what_a_dead_relay_held_is_lost_and_only_that() -> None:
    """A relay that dies loses only its own holds."""
    ledger = Ledger(CO)
    ledger.apply(0, admitted("a"))
    ledger.apply(1, admitted("a"))
    lost = ledger.lose(0, 5.0)
    assert [s.settled.outcome for s in lost] == ["lost"]
    assert ledger.in_flight().requests == 1


@pytest.mark.parametrize(
    ("outcome", "sent", "free"),
    [
        ("rejected", 0.0, True),
        ("client_cancelled", None, True),
        ("client_cancelled", 0.0, False),
        ("engine_error", 0.0, True),
    ],
)
def test_only_what_reached_the_engine_costs(outcome: Outcome, sent: float | None, free: bool) -> None:
    """A request that was never sent or was rejected costs nothing; one cancelled during prefill costs its prefill."""
    ledger = Ledger(CO)
    ledger.apply(0, admitted("a"))
    done = ledger.apply(0, settled("a", 1.0, outcome, sent=sent))
    assert done is not None and (done.mu == 0.0) is free


def test_labels_are_bounded() -> None:
    """Tenants beyond the bound share one total; what a tenant used before it lost its label is part of it."""
    ledger = Ledger(CO, ClientLabels(2))
    for n in range(10):
        ledger.apply(0, admitted(str(n), tenant=f"t{n}"))
        ledger.apply(0, settled(str(n), 1.0))
    assert set(ledger.tenant_totals) == {"t0", "t1", "other"}
    assert ledger.tenant_totals["other"].requests == 8
    ledger.apply(0, admitted("big", tenant="t9", work=RequestSize(100_000)))
    done = ledger.apply(0, settled("big", 2.0))
    assert done is not None and done.relabelled and done.tenant == "t9"
    assert {tenant: sums.requests for tenant, sums in ledger.tenant_totals.items()} == {"t1": 1, "other": 9, "t9": 1}


@pytest.mark.parametrize(
    ("outcome", "status", "first", "named"),
    [
        ("ok", 200, None, True),
        ("client_cancelled", 200, None, True),
        ("client_cancelled", 0, None, False),
        ("rejected", 404, None, False),
        ("rejected", 0, None, False),
        ("engine_error", 500, None, False),
        ("engine_error", 200, None, False),
        ("engine_error", 200, 1.0, True),
        ("lost", 0, 1.0, True),
        ("lost", 0, None, False),
    ],
)
def test_only_what_the_engine_accepts_names_its_client(
    outcome: Outcome, status: int, first: float | None, named: bool
) -> None:
    """A name gets a label when the engine answered 2xx, or its first token was seen."""
    ledger = Ledger(CO)
    ledger.apply(0, admitted("a"))
    if first is not None:
        ledger.apply(0, FirstToken("a", first))
    done = ledger.apply(0, structs.replace(settled("a", 2.0, outcome, first=first), status=status))
    assert done is not None and (done.tenant, done.model) == (("acme", "m") if named else ("other", "other"))


def test_a_count_that_was_too_high_is_made_up_for() -> None:
    """A correction downward holds the counter until it is right again; it never falls."""
    ledger, shown = Ledger(CO), []
    for id in ("a", "b"):
        ledger.apply(0, admitted(id))
    for event in (
        Delivered("a", 1.0, 100, 900),
        settled("a", 2.0, usage=Usage(1000, 80)),
        Delivered("b", 3.0, 15, 90),
        Delivered("b", 4.0, 15, 90),
        settled("b", 5.0, "client_cancelled", tokens=30),
    ):
        ledger.apply(0, event)
        shown.append(ledger.delivered_total)
    assert shown == [100, 100, 100, 110, 110]


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 200)), max_size=50))
def test_a_rate_is_the_sum_of_its_window(events: list[tuple[float, float]]) -> None:
    """The sum covers the window, to within a bucket of one second."""
    rate, now = SlidingSum(60.0), 0.0
    for amount, step in events:
        now += step
        rate.add(amount, now)
    times, at = [], 0.0
    for amount, step in events:
        at += step
        times.append((at, amount))
    young = sum(a for t, a in times if t > now - 59)
    old = sum(a for t, a in times if t > now - 61)
    assert young - 1e-6 <= rate.sum(now) <= old + 1e-6


class Interleavings(RuleBasedStateMachine):
    """Any interleaving of admissions, deliveries, settlements and relay deaths, over two relays."""

    open_requests = Bundle("open_requests")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(CO)
        self.now = 0.0
        self.count = 0
        self.open: dict[tuple[int, str], float] = {}
        self.done = 0.0
        self.shown = 0

    @rule(target=open_requests, relay=st.integers(0, 1), u=st.integers(0, 5000), o=st.integers(0, 500))
    def admit(self, relay: int, u: int, o: int) -> tuple[int, str]:
        self.count += 1
        event = admitted(str(self.count), self.now, RequestSize(u, output=o))
        self.ledger.apply(relay, event)
        self.open[relay, event.id] = event.mu
        return relay, event.id

    @rule(key=open_requests, tokens=st.integers(1, 50))
    def deliver(self, key: tuple[int, str], tokens: int) -> None:
        self.now += 0.1
        self.ledger.apply(key[0], FirstToken(key[1], self.now))
        self.ledger.apply(key[0], Delivered(key[1], self.now, tokens, 10))

    @rule(
        key=consumes(open_requests),
        outcome=st.sampled_from(["ok", "engine_error", "client_cancelled", "rejected", "stalled"]),
        usage=st.none() | st.builds(Usage, st.integers(0, 5000), st.integers(0, 500), st.integers(0, 6000)),
    )
    def settle(self, key: tuple[int, str], outcome: Outcome, usage: Usage | None) -> None:
        done = self.ledger.apply(key[0], settled(key[1], self.now, outcome, usage=usage))
        assert (done is not None) == (key in self.open)
        self.open.pop(key, None)
        self.done += done.mu if done else 0.0

    @rule(relay=st.integers(0, 1))
    def die(self, relay: int) -> None:
        lost = self.ledger.lose(relay, self.now)
        gone = [key for key in self.open if key[0] == relay]
        assert len(lost) == len(gone)
        for key in gone:
            del self.open[key]
        self.done += sum(s.mu for s in lost)

    @invariant()
    def outstanding_is_what_is_open(self) -> None:
        stock = self.ledger.in_flight()
        assert stock.requests == len(self.open)
        assert stock.mu >= 0 and (stock.mu == 0) == (not self.open)
        assert stock.mu <= sum(self.open.values()) + 1e-3 * len(self.open)

    @invariant()
    def counters_never_fall(self) -> None:
        settled_tokens = sum(a.tokens for a in self.ledger.tenant_totals.values())
        assert self.ledger.delivered_total >= max(self.shown, settled_tokens)
        self.shown = self.ledger.delivered_total

    @invariant()
    def accounts_add_up(self) -> None:
        assert sum(a.mu for a in self.ledger.tenant_totals.values()) == pytest.approx(self.done)
        assert sum(a.requests for a in self.ledger.tenant_totals.values()) == self.count - len(self.open)


TestInterleavings = Interleavings.TestCase
