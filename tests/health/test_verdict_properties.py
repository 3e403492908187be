"""Invariants of the verdict over random histories, on the whole production control object."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sidecar.health.monitor import TICK_S
from sidecar.health.verdict import UNASKED_KILLS
from sidecar.readings import EngineSample, Failed, Value

from .verdict_pod import CAP, DOWN, FLOOR, NOTHING, SEARCH, WALL, Pod


def act(pod: Pod, action: str) -> None:
    """One thing that may happen to a pod."""
    match action:
        case "request":
            pod.request()
        case "long request":
            pod.request(60_000)
        case "whole answer":
            pod.request(500, streams=False)
        case "deliver":
            pod.deliver()
        case "settle":
            pod.settle()
        case "hang up":
            pod.settle("client_cancelled")
        case "no page":
            pod.page = NOTHING
        case "broken page":
            pod.page = Failed("garbage")
        case "stale page":
            pod.page = Value(
                EngineSample(running=2, waiting=1, kv_usage=0.5, generation_tokens=9, iterations=3), pod.now
            )
        case "idle page":
            pod.page = Value(
                EngineSample(running=0, waiting=0, kv_usage=0.0, generation_tokens=9, iterations=3), pod.now
            )
        case "relay dies":
            pod.relay_dies()
        case "pause":
            pod.now += 7.0
        case "jump":
            pod.wall += 3600.0
        case _:
            pod.canaries = action.removeprefix("canary ")


def silent(ticks: int, canary: str) -> Pod:
    """A pod with one request of which nothing came for so many ticks, or since it was given up."""
    pod = Pod().served()
    pod.request()
    pod.deliver()
    pod.canaries = canary.removeprefix("canary ")
    for _ in range(ticks):
        if pod.tick() in DOWN:
            break
    return pod


USERS = ("request", "long request", "whole answer", "deliver", "settle", "hang up")
PAGES = ("no page", "broken page", "stale page", "idle page")
OURS = ("relay dies", "pause", "jump")
NEUTRAL = ("canary ok", "canary busy", "canary refused", "canary moot", "canary ")
INNOCENT = (*NEUTRAL, "canary rejected")
GUILTY = ("canary starved", "canary failed")


def scripts(*actions: str, most: int = 25) -> st.SearchStrategy[list[tuple[str, int]]]:
    """Actions, each followed by some ticks."""
    return st.lists(st.tuples(st.sampled_from(actions), st.integers(0, 30)), max_size=most)


@SEARCH
@given(scripts(*USERS, *PAGES, *INNOCENT, *GUILTY, "jump"), st.integers(1, int(FLOOR / TICK_S) - 1))
def test_never_stalled_or_suspect_while_deliveries_come_within_the_allowed_silence(
    script: list[tuple[str, int]], every: int
) -> None:
    """Whatever else happens: with one request that gets a token within the floor, nothing is suspected."""
    pod, ticks = Pod().served(), 0
    pod.request()
    pod.deliver()
    for action, n in script:
        if not (action in ("settle", "hang up") and len(pod.open) == 1):
            act(pod, action)
        for _ in range(n):
            ticks += 1
            if ticks % every == 0:
                pod.deliver()
            assert pod.tick() not in ("suspect", *DOWN)


@SEARCH
@given(scripts(*USERS, *PAGES, *OURS, *INNOCENT, *GUILTY, most=40))
def test_never_stalled_before_the_silence_of_a_kill_or_without_confirmation(script: list[tuple[str, int]]) -> None:
    """Stalled is entered only from suspect, after the silence of a kill.

    A canary that failed in it confirms, or counters that stand still, or that everything is refused, or three times
    that silence.
    """
    pod = Pod().served()
    for action, n in script:
        act(pod, action)
        for _ in range(n):
            before = pod.control.health.state
            if pod.tick() in DOWN and before.state not in DOWN:
                canary, e = pod.control.health.canaries.last, pod.control.health.evidence
                assert pod.state == "stalled"
                assert before.state == "suspect"
                if pod.control.health.state.reason == "refuses_work":
                    assert e.outstanding == 0
                    continue
                assert e.age is None or e.age > e.kill_after
                assert canary is not None
                is_told = canary.outcome in ("failed", "starved") and canary.started >= (e.progress_at or 0.0)
                assert is_told or e.frozen or (e.age or 0.0) > UNASKED_KILLS * e.kill_after


@SEARCH
@given(scripts(*USERS, *PAGES, *OURS, *(x for x in INNOCENT if x != "canary busy"), most=40))
def test_unknown_never_kills(script: list[tuple[str, int]]) -> None:
    """Pages that cannot be read, canaries without a verdict, own pauses, any silence: none of it fails liveness.

    A busy answer is a verdict: an engine that has nothing to do and gives no other is lost.
    """
    pod = Pod().served()
    for action, n in script:
        act(pod, action)
        for _ in range(n):
            assert pod.tick() not in DOWN


@SEARCH
@given(
    scripts(*USERS, *PAGES, *NEUTRAL, *GUILTY), st.sampled_from(("no page", "broken page", "stale page", "idle page"))
)
def test_once_progress_ends_suspicion_comes_within_the_cap_and_the_verdict_within_one_more(
    script: list[tuple[str, int]], page: str
) -> None:
    """Accepted canaries, a token, then a hang: suspect within the cap, stalled within that of the canary."""
    pod = Pod().served()
    for action, n in script:
        act(pod, action)
        for _ in range(n):
            pod.tick()
    act(pod, page)
    pod.tick()
    pod.request(200_000, streams=False)
    pod.deliver()
    pod.canaries = ""
    pod.tick()
    pod.request(200_000)
    ended, suspect = pod.now, None
    pod.canaries = "starved"
    while pod.state != "stalled" and pod.now - ended <= 3 * CAP:
        if pod.tick() == "suspect" and suspect is None:
            suspect = pod.now
    assert suspect is not None
    assert suspect - ended <= CAP + 2 * TICK_S
    assert pod.state == "stalled"
    assert pod.now - ended <= 2 * CAP + 4 * TICK_S


@SEARCH
@given(st.integers(0, 200), st.integers(1, 200))
def test_a_control_process_that_restarts_never_kills_what_it_has_not_seen_working(ticks: int, requests: int) -> None:
    """After a restart amid a hang of any age the state is starting until a token comes: progress was forgotten."""
    pod = Pod(canaries="starved")
    for n in range(ticks):
        if n % 7 == 0 and len(pod.open) < requests % 5:
            pod.request()
        assert pod.tick() == "starting"


@SEARCH
@given(st.integers(1, 60), st.one_of(st.floats(-1e6, -6), st.floats(6, 1e6)), st.sampled_from(GUILTY))
def test_a_clock_jump_in_a_silence_gives_a_full_window_again(quiet: int, jump: float, canary: str) -> None:
    """A jump of the wall clock, at any moment of a silence before a stall: no kill within the next floor."""
    pod = silent(quiet, canary)
    if pod.state in DOWN:
        return
    pod.wall += jump
    for _ in range(int(FLOOR / TICK_S)):
        assert pod.tick() not in DOWN


@SEARCH
@given(st.integers(1, 60), st.floats(2.5, 1e5), st.sampled_from(GUILTY))
def test_an_own_pause_in_a_silence_gives_a_full_window_again(quiet: int, pause: float, canary: str) -> None:
    """Stopped for any time, at any moment of a silence before a stall: no kill within the next floor."""
    pod = silent(quiet, canary)
    if pod.state in DOWN:
        return
    pod.now += pause
    for _ in range(int(FLOOR / TICK_S)):
        assert pod.tick() not in DOWN


@SEARCH
@given(st.integers(0, 60), st.sampled_from(GUILTY))
def test_an_engine_that_is_restarted_is_starting_and_not_killed_for_the_old_ones_silence(
    quiet: int, canary: str
) -> None:
    """Another start time on the page, at any moment of a silence: starting, and so it stays until a token comes."""
    pod = Pod()
    pod.page = Value(EngineSample(running=0, waiting=0, started_wall=WALL), pod.now)
    pod.served()
    pod.request()
    pod.deliver()
    pod.canaries = canary.removeprefix("canary ")
    for _ in range(quiet):
        pod.tick()
    pod.page = Value(EngineSample(running=0, waiting=0, started_wall=WALL + pod.now), pod.now)
    for _ in range(int(2 * CAP / TICK_S)):
        assert pod.tick() == "starting"
