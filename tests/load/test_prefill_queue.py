"""What an engine can have computed of prompts that never got a first token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.events import Admitted, Delivered, FirstToken, Outcome, RequestBlocked, RequestSize, Settled, Usage
from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.load.ledger import Ledger, Settlement
from sidecar.load.prefill_queue import LeftPrompts, PrefillQueue

CO = Coefficients()
TOKENS = 3370  # of each prompt
PREFILL_S = cost_model.terms(RequestSize(TOKENS), CO).before_first_token / 1000


def admitted(id: str, at: float, *, stream: bool = True) -> Admitted:
    return Admitted(id, at, "acme", "m", "chat", stream, RequestSize(TOKENS, output=100), 200, 1.0)


def left(id: str, at: float, sent: float, outcome: Outcome = "client_cancelled", status: int = 200) -> Settled:
    return Settled(id, at, outcome, status, None, 0, 0, None, sent, 0.0)


class FirstComeFirstServed:
    """An engine that computes one prompt after the other, `slowness` times slower than the cost model predicts."""

    def __init__(self, slowness: float = 1.0) -> None:
        self.ledger, self.each, self.free_at = Ledger(CO), PREFILL_S * slowness, 0.0
        self.first_at: dict[str, float] = {}

    def send(self, ids: list[str], at: float) -> None:
        for id in ids:
            self.ledger.apply(0, admitted(id, at))
            self.free_at = max(self.free_at, at) + self.each
            self.first_at[id] = self.free_at

    def run(self, until: float) -> None:
        for id, at in sorted(self.first_at.items(), key=lambda item: item[1]):
            if at <= until:
                self.ledger.apply(0, FirstToken(id, at))
                del self.first_at[id]

    def leave(self, at: float, sent: float) -> list[Settlement]:
        done = [self.ledger.apply(0, left(id, at, sent)) for id in [*self.first_at]]
        return [one for one in done if one is not None]


@pytest.mark.parametrize("slowness", [1.0, 3.0, 0.5])
def test_those_that_left_the_queue_cost_what_was_begun(slowness: float) -> None:
    """300 prompts at once, all left while a third is done: the rest costs no more than the one that was under way."""
    engine = FirstComeFirstServed(slowness)
    ids = [str(n) for n in range(300)]
    engine.send(ids, 0.0)
    until = 104.4 * engine.each
    engine.run(until)
    waiting = engine.leave(until, 0.0)
    charged = sum(one.work.uncached for one in waiting)
    outcomes = [one.settled.outcome for one in waiting]
    assert len(waiting) == 196
    assert charged <= 3 * TOKENS
    assert outcomes.count("not_begun") >= 193
    assert all((one.mu == 0) is (one.settled.outcome == "not_begun") for one in waiting)


def test_without_a_first_token_the_cost_model_bounds_it() -> None:
    """None of 300 got a token in the modelled time of 104 prompts: at most these can be done."""
    ledger = Ledger(CO)
    for n in range(300):
        ledger.apply(0, admitted(str(n), 0.0))
    done = [ledger.apply(0, left(str(n), 104 * PREFILL_S, 0.0)) for n in range(300)]
    charged = [one.work.uncached for one in done if one is not None]
    assert sum(charged) == pytest.approx(104 * TOKENS, rel=0.01)
    assert charged[:103] == [TOKENS] * 103 and charged[105:] == [0] * 195


def test_a_long_prompt_that_was_worked_on_is_charged() -> None:
    """A request alone, left in the middle of its prefill: the half of it. Left after its time: all of it."""
    for share in (0.25, 0.5, 2.0):
        ledger = Ledger(CO)
        ledger.apply(0, admitted("a", 10.0))
        done = ledger.apply(0, left("a", 10.0 + share * PREFILL_S, 10.0))
        assert done is not None and done.settled.outcome == "client_cancelled"
        assert done.work.uncached == pytest.approx(min(1, share) * TOKENS, rel=0.02)
        assert not done.told


def test_what_waited_in_the_sidecar_was_not_begun() -> None:
    """A request that the engine never had, and one that it got a moment ago."""
    ledger = Ledger(CO)
    for id in ("a", "b"):
        ledger.apply(0, admitted(id, 0.0))
        ledger.apply(0, RequestBlocked(id, 0.0, True))
    ledger.apply(0, RequestBlocked("b", 60.0, False))
    never = ledger.apply(0, Settled("a", 60.0, "client_cancelled", 0, None, 0, 0, None, None, 0.0))
    lately = ledger.apply(0, left("b", 60.0 + PREFILL_S / 100_000, 60.0))
    assert [one and (one.settled.outcome, one.mu) for one in (never, lately)] == [("not_begun", 0.0)] * 2


def test_an_answer_in_one_piece_that_was_left_had_tokens() -> None:
    """At the pace of answers before it, for the time after its prefill, and never more than were expected."""
    ledger = Ledger(CO)
    ledger.apply(0, admitted("a", 0.0, stream=False))
    usage = Usage(TOKENS, 100)
    ledger.apply(0, Settled("a", PREFILL_S + 5.0, "ok", 200, usage, 100, 900, None, 0.0, 0.0))  # 20 tokens a second
    for seconds, output in ((1.0, 20), (4.0, 80), (60.0, 100)):
        ledger.apply(0, admitted("b", 10.0, stream=False))
        done = ledger.apply(0, left("b", 10.0 + PREFILL_S + seconds, 10.0, status=0))
        assert done is not None and not done.told
        assert (done.work.uncached, done.work.output) == (TOKENS, pytest.approx(output, abs=1))


@pytest.mark.parametrize(("outcome", "status"), [("engine_error", 500), ("engine_error", 501), ("rejected", 429)])
@pytest.mark.parametrize("size", [0, 120])
def test_a_refusal_is_no_prefill(outcome: Outcome, status: int, size: int) -> None:
    """4xx and 5xx cost nothing, with a body or without, whatever their duration."""
    ledger = Ledger(CO)
    ledger.apply(0, admitted("a", 0.0, stream=False))
    done = ledger.apply(0, Settled("a", 30.0, outcome, status, None, 0, size, None, 0.0, 0.0))
    assert done is not None and (done.mu, done.settled.outcome) == (0.0, outcome)


def test_an_answer_in_one_piece_was_computed_before_later_ones() -> None:
    """It shows no first token, but a stream that came later does: left after that, it costs its whole prompt."""
    queue = PrefillQueue()
    queue.enter("whole", 1.0, 0.0, shows=False)
    queue.enter("stream", 1.0, 0.0, shows=True)
    queue.begin("stream", 2.0)
    assert queue.drop("whole", 2.0) == 1
    queue.enter("later", 1.0, 2.0, shows=False)
    assert queue.drop("later", 2.0) == 0


@given(
    st.lists(
        st.tuples(st.sampled_from("sbdfn"), st.integers(0, 9), st.floats(0, 3), st.floats(0, 5)),
        min_size=1,
        max_size=60,
    )
)
def test_no_more_is_charged_than_time_passed(steps: list[tuple[str, int, float, float]]) -> None:
    """For any order of arrivals, starts and leaves, the charge of those that left fits in the time."""
    queue, now, charged, fastest, prefill = PrefillQueue(), 0.0, 0.0, 1.0, {}
    for kind, key, passed, size in steps:
        now += passed
        if kind in "sn" and key not in prefill:
            prefill[key] = size
            queue.enter(key, size, now, shows=kind == "s")
        elif kind == "b" and prefill.pop(key, None) is not None:
            queue.begin(key, now)
        elif kind == "f":
            prefill.pop(key, None)
            queue.forget(key, now)
        elif kind == "d" and (whole := prefill.pop(key, None)) is not None:
            share = queue.drop(key, now)
            assert 0 <= share <= 1
            charged += share * whole
        fastest = max(fastest, queue.speed)
    assert charged <= now * fastest + 1e-6


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 20), st.floats(0, 5)), max_size=40))
def test_what_left_fits_in_the_time_of_a_relay(requests: list[tuple[float, float, float]]) -> None:
    """For any overlap and order of ends: together no more than the engine's time, and each no more than its own."""
    left_prompts, charged = LeftPrompts(), 0.0
    for sent_at, lasted, prefill in sorted(requests, key=lambda request: request[0] + request[1]):
        share = left_prompts.share(prefill, sent_at, sent_at + lasted)
        assert (0 <= share <= 1 and share * prefill <= lasted + 1e-9) or prefill == 0
        charged += share * prefill
    ends = [sent_at + lasted for sent_at, lasted, _ in requests]
    assert charged <= max(ends, default=0.0) - min((sent_at for sent_at, _, _ in requests), default=0.0) + 1e-9


KINDS = ("admit", "first", "deliver", "block", "settle", "lose")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(KINDS),
            st.integers(0, 3),
            st.integers(0, 40),
            st.sampled_from(["ok", "engine_error", "client_cancelled", "rejected", "stalled", "lost"]),
            st.none() | st.builds(Usage, st.integers(0, 9000), st.integers(0, 60), st.integers(0, 9000)),
            st.booleans(),
        ),
        max_size=60,
    )
)
def test_counters_never_fall(steps: list[tuple[str, int, int, Outcome, Usage | None, bool]]) -> None:
    """For any interleaving of events, ends and leaves, with usage over- or under-reported: totals only grow."""
    ledger, now = Ledger(CO), 0.0
    shown: dict[object, float] = {}
    for kind, number, tokens, outcome, usage, flag in steps:
        now, id = now + 0.25, str(number)
        if kind == "admit":
            ledger.apply(0, admitted(id, now, stream=flag))
        elif kind == "first":
            ledger.apply(0, FirstToken(id, now))
        elif kind == "deliver":
            ledger.apply(0, Delivered(id, now, tokens, 9 * tokens))
        elif kind == "block":
            ledger.apply(0, RequestBlocked(id, now, flag))
        elif kind == "settle":
            sent = now if flag else None
            end = Settled(id, now, outcome, 200, usage, tokens, tokens, None, sent, 0.0, estimated=number == 1)
            ledger.apply(0, end)
        else:
            ledger.lose(0, now)
        counters: dict[object, float] = {"delivered": ledger.delivered_total}
        for key, (mu, requests) in ledger.totals.items():
            counters |= {(key, "mu"): mu, (key, "requests"): requests}
        for tenant, totals in ledger.tenant_totals.items():
            counters |= {
                (tenant, "mu"): totals.mu,
                (tenant, "requests"): totals.requests,
                (tenant, "tokens"): totals.tokens,
            }
        assert all(counters.get(name, 0) >= value >= 0 for name, value in shown.items())
        assert ledger.in_flight().mu >= 0
        shown = counters
