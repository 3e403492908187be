"""The control object as a whole: what events, pages and orders make of the verdict, and what it asks of relays."""

from __future__ import annotations

import pytest

from sidecar.control.state import ControlState
from sidecar.events import (
    AbortRequests,
    Admitted,
    CanaryResult,
    Delivered,
    FirstToken,
    RequestSize,
    Settled,
    UnreadRequest,
)
from sidecar.health.monitor import TICK_S, TickReadings
from sidecar.load.cost_model import Coefficients
from sidecar.readings import EngineSample, GpuSample, Reading, Value
from sidecar.settings import Settings

from .judged_pod import NOTHING, WALL, Pod


def test_a_stuck_stream_is_ended_through_its_own_relay_while_the_verdict_stays() -> None:
    """One End order, once, with its code; others go on and nothing is withdrawn."""
    pod = Pod()
    stuck, other = pod.decoding(), pod.decoding()
    pod.tick(200, other)
    assert pod.ends == [(0, AbortRequests((stuck,), "stream_stuck"))]
    assert pod.state == "progressing"


def test_a_prompt_larger_than_the_cache_is_ended_before_anything_is_suspected() -> None:
    """The page shows that nothing runs and requests wait; the head can never enter."""
    pod = Pod()
    pod.page = EngineSample(running=0, waiting=2, kv_usage=0.0, kv_capacity_tokens=100_000)
    big = pod.admit(200_000)
    pod.admit()
    pod.tick(10)
    assert pod.ends == [(0, AbortRequests((big,), "prompt_exceeds_kv_cache"))]
    assert pod.state == "quiet"
    pod.control.on_event(0, Settled(big, pod.now, "rejected", 0, None, 0, 0, None, pod.now, 0.0))
    pod.tick(TICK_S, "2")
    assert pod.state == "progressing"


@pytest.mark.parametrize("what", ["engine_sleeping", "engine_paused", "weight_update", "engine_profiling"])
def test_an_order_that_stops_the_engine_exempts_its_silence_and_the_silence_starts_again_after_it(what: str) -> None:
    """As long as it holds nothing is judged, whatever canaries would say; once it is off, a full window begins."""
    pod = Pod()
    pod.decoding()
    pod.direct(what, True)
    pod.canaries = "starved"
    pod.tick(300)
    assert (pod.state, pod.reason) == ("exempt", what)
    pod.direct(what, False)
    pod.tick(10)
    assert pod.state == "quiet"
    assert 75 < 10 + pod.until("stalled") < 90


def test_an_order_whose_end_was_lost_exempts_no_longer_than_the_cap() -> None:
    """A relay that died with the `off` must not hide a hang forever."""
    pod = Pod()
    pod.decoding()
    pod.direct("engine_paused", True)
    pod.canaries = "starved"
    pod.tick(899)
    assert pod.state == "exempt"
    pod.until("stalled", 240)
    assert pod.sent is None, "no canary is sent into an engine whose memory may be released"


def test_tokens_that_flow_next_to_an_order_are_progress() -> None:
    """A profiler runs next to work: readiness stays while tokens come."""
    pod = Pod()
    id = pod.decoding()
    pod.direct("engine_profiling", True)
    pod.tick(30, id)
    assert pod.state == "progressing"
    pod.tick(10)
    assert pod.state == "exempt"


def silent() -> Pod:
    """With a stream of which nothing comes any more, and canaries that get nothing."""
    pod = Pod()
    pod.decoding()
    pod.canaries = "starved"
    return pod


HANG = silent().until("stalled")  # seconds to a verdict where nothing excuses the silence


def test_a_call_that_stops_the_engine_while_it_lasts_is_no_hang() -> None:
    """Nothing is judged while it is with the engine; once that took it, a full window begins."""
    pod = silent()
    pod.call(True)
    pod.tick(300)
    assert (pod.state, pod.reason) == ("exempt", "weight_update")
    pod.call(False, taken=True)
    pod.tick(10)
    assert pod.state == "quiet"
    assert HANG - 11 < pod.until("stalled") <= HANG


def test_short_calls_that_the_engine_takes_one_after_the_other_are_no_hang() -> None:
    """Weights that come in many pieces, none of which takes long, without a stop around them."""
    pod = silent()
    for id in range(100):
        pod.call(True, id=id)
        pod.tick()
        pod.call(False, id=id, taken=True)
    assert pod.state == "quiet"


def test_a_call_that_the_engine_did_not_take_excuses_nothing_once_it_is_over() -> None:
    """Refused after a while, or left by its client: the silence counts from where it began, and a canary decides."""
    pod = silent()
    pod.call(True)
    pod.tick(60)
    assert pod.state == "exempt"
    pod.call(False)
    pod.tick()
    assert pod.state == "suspect"
    assert pod.until("stalled") < HANG


def test_calls_that_are_refused_at_once_neither_withdraw_readiness_nor_hide_a_hang() -> None:
    """An engine without the path, asked again and again: no exemption, and the same verdict at the same time."""
    pod, seen, id = silent(), set(), 0
    began = pod.now
    while pod.state != "stalled":
        id += 1
        pod.call(True, id=id)
        pod.tick()
        pod.call(False, id=id)
        seen.add(pod.state)
    assert "exempt" not in seen
    assert pod.now - began == HANG


def test_calls_that_never_end_hide_a_hang_no_longer_than_the_cap() -> None:
    """One after the other, overlapping, each left by its client before the engine answers."""
    pod, id = silent(), 0
    began = pod.now
    while pod.state != "stalled":
        id += 1
        pod.call(True, id=id)
        pod.tick(5)
        pod.call(False, id=id - 1)
    assert pod.now - began < 900 + 2 * HANG


def test_a_call_now_and_then_does_not_hide_a_hang() -> None:
    """Each is left by its client after a few seconds; no end of one begins a new silence."""
    pod, id = silent(), 0
    began = pod.now
    while pod.state != "stalled":
        id += 1
        pod.call(True, id=id)
        pod.tick(5)
        pod.call(False, id=id)
        pod.tick(5)
    assert pod.now - began < 2 * HANG


def test_a_call_to_an_engine_that_is_thought_to_hang_averts_nothing() -> None:
    """It came after the doubt: the canary decides, and a stall that was found stays one."""
    pod = silent()
    pod.until("suspect")
    pod.tick()
    pod.call(True)
    assert pod.until("stalled") < HANG
    pod.tick(60)
    assert pod.state == "stalled"


def test_a_call_is_over_when_its_relay_dies() -> None:
    """No one else would report it; a new silence begins, because deliveries were lost with it."""
    pod = silent()
    pod.call(True)
    pod.tick(60)
    pod.control.relay_lost(0, pod.now)
    pod.decoding()
    assert pod.until("stalled") <= HANG + 3


def test_a_start_up_without_any_sign_is_named_once_the_cap_has_passed() -> None:
    """Its state stays `starting`, its reason changes, and that is news."""
    control = ControlState(Settings(engine="http://engine"), Coefficients(), 1000.0, WALL)
    now, reported = 1000.0, []
    while now < 2000.0:
        now += TICK_S
        readings = TickReadings(NOTHING, NOTHING, NOTHING, (), None, "vllm")
        control.tick(readings, now, WALL + now - 1000.0)
        if control.health.has_changed:
            reported.append((now - 1000.0, control.health.verdict.state, control.health.verdict.reason))
    assert reported == [(900.0, "starting", "startup_stuck")]


def test_an_xid_seen_with_the_silence_names_it() -> None:
    """The driver's report explains more than the silence."""

    def gpu(count: int) -> Reading[tuple[GpuSample, ...]]:
        sample = GpuSample(0, "GPU", "u", NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, ((31, count),))
        return Value((sample,), 0.0)

    pod = Pod()
    pod.gpus = gpu(1)
    pod.decoding()
    pod.tick(2)
    pod.gpus, pod.canaries = gpu(2), "starved"
    assert pod.until("stalled") <= 80
    assert pod.reason == "gpu_fault"


def test_an_api_that_answers_nothing_has_its_patience_once_and_its_own_reason() -> None:
    """Idle: 90 s more than the floor, not 90 s for each canary; readiness goes long before."""
    pod = Pod()
    pod.tick(40)
    pod.unanswered, pod.canaries = True, "starved"
    assert pod.until("suspect") <= 16
    assert 80 <= pod.until("stalled", 300) <= 105
    assert pod.reason == "api_blocked"


def test_what_is_left_of_our_own_work_is_judged_by_canaries_like_an_idle_engine() -> None:
    """A client hung up and the engine wedged: its gauge stays at 1, and no one else ever used it."""
    pod = Pod()
    pod.tick(60)
    pod.page = EngineSample(running=0, waiting=0, generation_tokens=5)
    pod.tick(12)
    pod.page = EngineSample(running=1, waiting=0, generation_tokens=5)
    id = pod.admit()
    pod.tick(1)
    pod.control.on_event(0, Settled(id, pod.now, "client_cancelled", 0, None, 0, 0, None, pod.now, 0.0))
    pod.canaries = "starved"
    assert pod.until("suspect") <= 16
    assert pod.until("stalled") <= 80


def test_every_verdict_names_the_term_that_ruled_and_explains_itself_in_one_line() -> None:
    """The evidence names the term; the detail is one line in words."""
    pod = Pod()
    pod.decoding()
    pod.canaries = "starved"
    pod.until("stalled")
    assert pod.control.health.verdict.evidence["ruled_by"] == "floor"
    assert "without progress" in pod.control.health.verdict.detail and "\n" not in pod.control.health.verdict.detail


def test_the_model_that_users_were_served_with_last_is_known_until_the_engine_is_another_process() -> None:
    """A refused one does not count; what a new process has loaded is not known."""
    pod = Pod()
    assert pod.control.health.used_model == ""
    for model, outcome in (("a", "ok"), ("b", "rejected")):
        id = pod.admit(model=model)
        end = Settled(id, pod.now, outcome, 200, None, 1, 4, None, pod.now, 0.0)  # type: ignore[arg-type]
        pod.control.on_event(0, end)
        assert pod.control.health.used_model == "a"
    pod.page = EngineSample(generation_tokens=5, started_wall=100.0)
    pod.tick(2)
    pod.watch()
    pod.page = EngineSample(generation_tokens=0, started_wall=WALL + pod.now)
    pod.tick(1)
    assert "starting" in pod.states and pod.control.health.used_model == ""


def test_what_is_served_unread_ends_refusals() -> None:
    """An image server that takes no canary answers its own route, while a client of another one gets 500 each time."""
    pod = Pod()
    pod.canaries, pod.control.health.canaries.passes = "rejected", False
    pod.watch()
    for n in range(60):
        pod.control.on_event(0, UnreadRequest(f"i{n}", pod.now, on=True))
        pod.tick(6)
        pod.control.on_event(0, UnreadRequest(f"i{n}", pod.now, on=False, status=200))
        id = pod.admit()
        pod.control.on_event(0, Settled(id, pod.now, "engine_error", 500, None, 0, 0, None, pod.now, 0.0))
        pod.tick(4)
    assert not pod.states & {"suspect", "stalled"}


def test_the_unread_requests_of_a_relay_end_with_it() -> None:
    """Nothing of them is left to be timed."""
    pod = Pod()
    pod.control.on_event(0, UnreadRequest("a", pod.now, on=True))
    pod.control.relay_lost(0, pod.now)
    pod.tick(1)
    assert pod.control.health.evidence.outstanding == 0
    assert not pod.control.health.progress._timed


def test_a_start_that_ends_without_a_canary_is_as_long_as_it_was() -> None:
    """The first user may come hours later: that is no start of hours, which would be allowed to the next process."""
    control = ControlState(Settings(engine="http://engine"), Coefficients(), 0.0, 0.0)
    readings = TickReadings(NOTHING, NOTHING, NOTHING, (), None, "openai")
    now = 0.0
    for _ in range(4):
        control.canary_ended(CanaryResult("rejected", now, now + 0.1, 900.0))
        now += 0.5
        control.tick(readings, now, now)
    for _ in range(40):
        now += 0.5
        control.tick(readings, now, now)
    control.on_event(0, Admitted("a", now, "t", "m", "chat", True, RequestSize(10, output=5), 5, 1.0))
    control.on_event(0, FirstToken("a", now))
    control.on_event(0, Delivered("a", now, 3, 12))
    control.tick(readings, now + 0.5, now + 0.5)
    assert control.health.state.served and control.health.progress.learned.start_seconds < 10


def test_where_no_canary_passes_users_silence_decides_later() -> None:
    """When idle, nothing can be known. Work that is silent for long fails readiness first, and liveness later."""
    pod = Pod()
    pod.watch()
    pod.canaries, pod.control.health.canaries.passes = "rejected", None
    pod.tick(240)
    assert pod.states <= {"idle", "unknown"} and pod.state == "unknown"
    pod.decoding()
    assert 20 < pod.until("suspect") < 30
    assert 180 < pod.until("stalled", 300) < 230


def test_the_cached_share_of_a_page_without_lookups_is_known() -> None:
    """llama.cpp counts prompt tokens that it computed, and those that it had cached: 60,000 of 80,000 here."""
    control, shares = ControlState(Settings(), Coefficients(), 0.0, WALL), []
    for at, computed, cached in ((1.0, 1000, 500), (2.0, 21_000, 60_500)):
        page = Value(EngineSample(0, 0, prompt_tokens=computed, cached_tokens=cached), at)
        readings = TickReadings(page, NOTHING, NOTHING, (), None, "llamacpp")
        shares.append(control.tick(readings, at, WALL + at).load.cached_share)
    assert shares == [None, 0.75]
