"""Predicted latencies, against the scripted engine's own scheduler in simulated time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.events import Admitted, Delivered, Event, FirstToken, RequestBlocked, RequestSize, Settled
from sidecar.load.cost_model import Coefficients
from sidecar.load.latency_prediction import LatencyPredictor
from sidecar.load.ledger import Ledger
from sidecar.load.summary import ttft_share
from sidecar.readings import EngineSample
from sidecar.snapshot import LatencyForecast

from .work import history

# The speeds of `sidecar engine`: 20,000 prompt tokens per second, steps of 10 ms.
SCRIPTED = Coefficients(k=1e-4, a=0.05, b=1e-9, d=10 / 8, f=1e-9, g=0, h=0, batch=8, source="file")
TICK_S = 0.5


@dataclass
class Watched:
    """A predictor with its ledger, fed with events; `errors` are shares of the actual times to first token."""

    predictor: LatencyPredictor
    ledger: Ledger
    sample: EngineSample = field(default_factory=EngineSample)
    errors: list[float] = field(default_factory=list)
    ticked: float = 0.0

    def feed(self, events: Iterable[tuple[float, Event]]) -> Watched:
        for at, event in events:
            while self.ticked + TICK_S <= at:
                self.ticked += TICK_S
                self.predictor.tick(self.sample, self.ticked)
            settlement = self.ledger.apply(0, event)
            key = 0, getattr(event, "id", "")
            if isinstance(event, FirstToken) and (hold := self.ledger.hold(key)) is not None:
                took = at - hold.admitted.at
                self.errors.append(abs(self.predictor.predicted(key) / took - 1))
            self.predictor.apply(key, event, self.ledger.hold(key))
            if settlement is not None:
                self.predictor.end(key, at)
        return self


def watch(co: Coefficients = SCRIPTED, slots: int = 0) -> Watched:
    return Watched(LatencyPredictor(co, slots), Ledger(co))


@pytest.mark.parametrize("rate", [0.5, 3.0, 6.0])
@pytest.mark.parametrize(("co", "slow"), [(SCRIPTED, 1.0), (Coefficients(), 4.0)])
def test_first_tokens_come_as_predicted(co: Coefficients, slow: float, rate: float) -> None:
    """After a minute, with measured coefficients or the default on an engine four times slower: half within 20 %."""
    watched = watch(co).feed(history(co, 300.0, 1, rate=rate / slow, slow=slow))
    assert median(watched.errors[len(watched.errors) // 5 :]) < 0.2


def test_tokens_come_at_the_predicted_pace() -> None:
    """Steps of 10 and of 40 ms are known after a minute, from an idle engine as well."""
    for slow in (1.0, 4.0):
        watched = watch().feed(history(SCRIPTED, 120.0, 2, rate=1.0 / slow, slow=slow))
        step = watched.predictor.forecast(121.0).tpot_seconds
        assert step == pytest.approx(0.010 * slow, rel=0.25)


def admitted(id: str, at: float, *, prompt: int = 2000, output: int = 100, stream: bool = True) -> Admitted:
    return Admitted(id, at, "t", "m", "chat", stream, RequestSize(prompt, output=output), None, 1.0)


def test_the_wait_is_the_prefill_before_it() -> None:
    """Five prompts of 2,000 tokens wait: the next one waits 0.5 s, and less as the first of them is computed."""
    watched = watch().feed((0.0, admitted(f"r{n}", 0.0)) for n in range(5))
    assert watched.predictor.forecast(0.0).wait_seconds == pytest.approx(0.5, rel=0.05)
    assert watched.predictor.forecast(0.05).wait_seconds == pytest.approx(0.45, rel=0.05)
    assert watched.predictor.forecast(9.0).wait_seconds == pytest.approx(0.4, rel=0.05)  # the first should be done
    watched.feed([(0.1, FirstToken("r0", 0.1))])
    assert watched.predictor.forecast(0.1).wait_seconds == pytest.approx(0.4, rel=0.1)


def test_full_places_are_waited_for() -> None:
    """Four sequences run and no more may: the next waits until the first of them should have ended."""
    events: list[tuple[float, Event]] = []
    for n in range(4):
        events += [(0.0, admitted(f"r{n}", 0.0, output=100 * (n + 1))), (0.1, FirstToken(f"r{n}", 0.1))]
    for slots, least, most in ((4, 0.9, 1.5), (8, 0.0, 0.1)):
        wait = watch(slots=slots).feed(events).predictor.forecast(0.2).wait_seconds
        assert least <= wait <= most, slots


def test_a_full_cache_is_waited_for() -> None:
    """A KV cache of 10,000 tokens holds four prompts of 2,400: the next one waits until one of them has ended."""
    events: list[tuple[float, Event]] = []
    for n in range(4):
        events += [(0.0, admitted(f"r{n}", 0.0, prompt=2400)), (0.1, FirstToken(f"r{n}", 0.1))]
    for size, is_waiting in ((10_000.0, True), (100_000.0, False)):
        watched = watch()
        watched.sample = EngineSample(running=4, waiting=0, kv_capacity_tokens=size)
        watched.feed([*events, (0.6, Delivered("r0", 0.6, 1, 1))])
        assert (watched.predictor.forecast(0.6).wait_seconds > 0.5) is is_waiting


def test_an_answer_in_one_piece_waits_no_longer_than_its_prefill() -> None:
    """Without a stream there is no first token: after the time of its prefill it no longer delays the next."""
    watched = watch().feed([(0.0, admitted("whole", 0.0, stream=False))])
    assert watched.predictor.forecast(0.01).wait_seconds > 0.05
    assert watched.predictor.forecast(1.0).wait_seconds < 0.02


def test_waits_that_are_not_the_engines_teach_nothing() -> None:
    """A request that waited in the sidecar's own queue is neither learned from nor counted as an error."""
    blocked = [
        (0.0, admitted("r", 0.0)),
        (0.0, RequestBlocked("r", 0.0, True)),
        (9.0, RequestBlocked("r", 9.0, False)),
        (9.1, FirstToken("r", 9.1)),
    ]
    forecast = watch().feed(blocked).predictor.forecast(9.2)
    assert (forecast.first_tokens, forecast.error_median) == (0, None)


def test_requests_past_the_relay_are_waited_for() -> None:
    """Requests in the engine's queue that are unknown to the sidecar count as a typical prefill each."""
    watched = watch()
    watched.sample = EngineSample(running=8, waiting=5)
    for n in range(40):
        watched.predictor.tick(watched.sample, n * TICK_S)
    assert watched.predictor.forecast(20.0).wait_seconds == pytest.approx(5 * 0.175, rel=0.1)


def test_before_anything_is_learned_the_measured_speed_counts() -> None:
    """An engine without streams shows no first token: predictions follow its slowness."""
    predictor = watch().predictor
    before = predictor.forecast(0.0)
    predictor.slowness = 4.0
    after = predictor.forecast(0.0)
    assert after.reference_seconds == pytest.approx(4 * before.reference_seconds)
    assert after.tpot_seconds == pytest.approx(4 * before.tpot_seconds)


FORECAST = LatencyForecast(0.0, 1.0, 0.0, 0.0, 0.01, 0.0, 0.5, 0.5)


@pytest.mark.parametrize(
    ("typical", "idle", "objective", "share"),
    [
        (0.5, 0.5, 2.0, 0.0),  # nothing is added
        (2.0, 0.5, 2.0, 1.0),  # the objective is just kept
        (3.5, 0.5, 2.0, 2.0),
        (3.0, 3.0, 2.0, 0.0),  # even an idle engine misses it: more replicas would not help
        (3.2, 3.0, 2.0, 1.0),
    ],
)
def test_the_share_of_the_first_token_is_what_load_adds(
    typical: float, idle: float, objective: float, share: float
) -> None:
    """1 where the objective is missed, 0 without load, whatever the time on an idle engine."""
    forecast = replace(FORECAST, typical_seconds=typical, idle_seconds=idle)
    assert ttft_share(forecast, objective) == pytest.approx(share)


events = st.lists(
    st.tuples(
        st.sampled_from(["admit", "whole", "first", "deliver", "block", "settle", "tick"]),
        st.integers(0, 5),
        st.floats(0.0, 3.0),
        st.integers(1, 100_000),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(events)
def test_any_sequence_of_events_leaves_nothing_behind(sequence: list[tuple[str, int, float, int]]) -> None:
    """Predictions are finite and at least 0 at any time; once all requests have ended, nothing waits or runs."""
    watched, now = watch(slots=2), 0.0
    watched.sample = EngineSample(running=1, waiting=0, kv_usage=0.5)
    for kind, n, passed, size in sequence:
        now += passed
        id = f"r{n}"
        made: dict[str, Event] = {
            "admit": admitted(id, now, prompt=size),
            "whole": admitted(id, now, prompt=size, stream=False),
            "first": FirstToken(id, now),
            "deliver": Delivered(id, now, size % 100, 1),
            "block": RequestBlocked(id, now, True),
            "settle": Settled(id, now, "ok", 200, None, 1, 1, None, now, 0.0),
        }
        if kind == "tick":
            watched.predictor.tick(watched.sample, now)
        else:
            feed_quietly(watched, now, made[kind])
        forecast = watched.predictor.forecast(now)
        assert 0 <= forecast.wait_seconds < 1e6 and 0 <= forecast.reference_seconds < 1e6 and forecast.tpot_seconds > 0
    for n in range(6):
        feed_quietly(watched, now, Settled(f"r{n}", now, "ok", 200, None, 1, 1, None, now, 0.0))
    assert watched.predictor.forecast(now).wait_seconds == pytest.approx(0.0, abs=1e-6)


def feed_quietly(watched: Watched, now: float, event: Event) -> None:
    """Feed an event without looking at errors: its order may be one that no relay sends."""
    settlement = watched.ledger.apply(0, event)
    key = 0, getattr(event, "id", "")
    watched.predictor.apply(key, event, watched.ledger.hold(key))
    if settlement is not None:
        watched.predictor.end(key, now)
