"""Invariants of the verdict over histories at random, on the production control object as a whole: facts, readings, canaries, ticks."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.control import TICK, Control, Readings
from sidecar.facts import (
    Absent,
    Admitted,
    CanaryResult,
    Delivered,
    EngineSample,
    Failed,
    FirstToken,
    Reading,
    Settled,
    Value,
    Work,
)
from sidecar.settings import Settings
from sidecar.snapshot import RelayUse
from sidecar.units import Coefficients

FLOOR, UNLEARNED, CAP = 4.0, 12.0, 40.0
SETTINGS = Settings(engine="http://engine", silence_floor=FLOOR, silence_unlearned=UNLEARNED, silence_cap=CAP)
CO = Coefficients()
NOTHING = Absent("not here")
WALL = 1_700_000_000.0
DOWN = ("stalled", "dead")


@dataclass
class Pod:
    """A control object and what is around it. Each `tick` is half a second; `canaries` is how a canary ends, "" for not yet."""

    now: float = 1000.0
    wall: float = WALL
    page: Reading[EngineSample] = NOTHING
    canaries: str = "ok"
    control: Control = field(init=False)
    open: list[str] = field(default_factory=list)
    requests: int = 0
    sent: tuple[float, float] | None = None  # the canary under way: started, allowed
    pulse: float = 1000.0
    refused: float | None = None

    def __post_init__(self) -> None:
        self.control = Control(SETTINGS, CO, self.now, self.wall + self.now)

    @property
    def state(self) -> str:
        return self.control.memory.state

    def tick(self) -> str:
        """Half a second. Returns the verdict."""
        self.now += TICK
        self.pulse = self.now
        self.judge()
        return self.state

    def judge(self) -> None:
        self._end_canary()
        page = Value(self.page.value, self.now) if isinstance(self.page, Value) else self.page
        relay = RelayUse(0, 1, 0, len(self.open), 0.0, self.now - self.pulse)
        self.control.tick(
            Readings(page, NOTHING, NOTHING, (relay,), self.refused, "vllm"), self.now, self.wall + self.now
        )
        allowed = self.control.canary_due()
        if allowed is not None:
            self.control.canary_sent(self.now)
            self.sent = (self.now, allowed)

    def _end_canary(self) -> None:
        if self.sent is None:
            return
        started, allowed = self.sent
        starved = self.now - started >= allowed
        if self.canaries and (self.canaries != "starved" or starved):
            self.control.canary_ended(CanaryResult(self.canaries, started, self.now, allowed))  # type: ignore[arg-type]
            self.sent = None

    def request(self, tokens: int = 500, streams: bool = True) -> None:
        self.requests += 1
        id = str(self.requests)
        self.open.append(id)
        work = Work(tokens, output=64)
        self.control.fact(0, Admitted(id, self.now, "t", "m", "chat", streams, work, 64, 1.0))

    def deliver(self) -> None:
        """A token of the oldest request."""
        if not self.open:
            return
        self.control.fact(0, FirstToken(self.open[0], self.now))
        self.control.fact(0, Delivered(self.open[0], self.now, 1, 4))

    def settle(self, outcome: str = "ok") -> None:
        if self.open:
            id = self.open.pop(0)
            self.control.fact(0, Settled(id, self.now, outcome, 200, None, 1, 4, None, self.now, 0.0))  # type: ignore[arg-type]

    def served(self) -> Pod:
        """Past start-up, by a canary's token."""
        for _ in range(6):
            self.tick()
        assert self.state == "idle"
        return self


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
            pod.control.relay_lost(0, pod.now)
            pod.open.clear()
        case "pause":
            pod.now += 7.0
        case "jump":
            pod.wall += 3600.0
        case _:
            pod.canaries = action.removeprefix("canary ")


USERS = ("request", "long request", "whole answer", "deliver", "settle", "hang up")
PAGES = ("no page", "broken page", "stale page", "idle page")
OURS = ("relay dies", "pause", "jump")
NEUTRAL = ("canary ok", "canary busy", "canary refused", "canary moot", "canary ")
INNOCENT = (*NEUTRAL, "canary rejected")
GUILTY = ("canary starved", "canary failed")


def scripts(*actions: str, most: int = 25) -> st.SearchStrategy[list[tuple[str, int]]]:
    """Actions, each followed by some ticks."""
    return st.lists(st.tuples(st.sampled_from(actions), st.integers(0, 30)), max_size=most)


@settings(deadline=None)
@given(scripts(*USERS, *PAGES, *INNOCENT, *GUILTY, "jump"), st.integers(1, int(FLOOR / TICK) - 1))
def test_never_stalled_or_suspect_while_deliveries_come_within_the_allowed_silence(
    script: list[tuple[str, int]], every: int
) -> None:
    """Whatever canaries, pages and other requests do: with one request that gets a token within the floor, nothing is suspected."""
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


@settings(deadline=None)
@given(scripts(*USERS, *PAGES, *OURS, *INNOCENT, *GUILTY, most=40))
def test_never_stalled_without_work_or_a_canary_that_failed_since_suspicion(script: list[tuple[str, int]]) -> None:
    """Stalled is entered from suspect alone, by a canary sent since that failed, over silent work where there is work."""
    pod = Pod().served()
    for action, n in script:
        act(pod, action)
        for _ in range(n):
            before = pod.control.memory
            if pod.tick() in DOWN and before.state not in DOWN:
                canary, e = pod.control.canary, pod.control.evidence
                assert pod.state == "stalled"
                assert before.state == "suspect"
                assert canary is not None
                assert canary.outcome in ("failed", "starved")
                assert canary.started >= before.since
                assert e.age is None or e.age > e.allowed


@settings(deadline=None)
@given(scripts(*USERS, *PAGES, *OURS, *INNOCENT, most=40))
def test_unknown_never_kills(script: list[tuple[str, int]]) -> None:
    """Pages that cannot be read, canaries without a verdict, our own pauses, any silence: none of it fails liveness."""
    pod = Pod().served()
    for action, n in script:
        act(pod, action)
        for _ in range(n):
            assert pod.tick() not in DOWN


@settings(deadline=None)
@given(
    scripts(*USERS, *PAGES, *NEUTRAL, *GUILTY), st.sampled_from(("no page", "broken page", "stale page", "idle page"))
)
def test_once_progress_ends_suspicion_comes_within_the_cap_and_the_verdict_within_one_more(
    script: list[tuple[str, int]], page: str
) -> None:
    """Any history in which canaries were taken, then a token, then a hang: suspect within the cap, stalled once the canary of that suspicion has had its own."""
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
    assert suspect - ended <= CAP + 2 * TICK
    assert pod.state == "stalled"
    assert pod.now - ended <= 2 * CAP + 4 * TICK


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 200))
def test_a_control_process_that_starts_anew_never_kills_what_it_has_not_seen_working(ticks: int, requests: int) -> None:
    """After a restart in the midst of a hang of any age: starting, for as long as no token comes; it forgot its watermarks."""
    pod = Pod(canaries="starved")
    for n in range(ticks):
        if n % 7 == 0 and len(pod.open) < requests % 5:
            pod.request()
        assert pod.tick() == "starting"


@settings(deadline=None)
@given(st.integers(1, 60), st.one_of(st.floats(-1e6, -6), st.floats(6, 1e6)), st.sampled_from(GUILTY))
def test_a_clock_jump_in_a_silence_gives_a_full_window_anew(quiet: int, jump: float, canary: str) -> None:
    """A jump of the wall clock, at any moment of a silence that is not yet a stall: no kill within the next floor of seconds."""
    pod = Pod().served()
    pod.request()
    pod.deliver()
    pod.canaries = canary
    for _ in range(quiet):
        if pod.tick() in DOWN:
            return
    pod.wall += jump
    for _ in range(int(FLOOR / TICK)):
        assert pod.tick() not in DOWN


@settings(deadline=None)
@given(st.integers(1, 60), st.floats(2.5, 1e5), st.sampled_from(GUILTY))
def test_a_pause_of_our_own_in_a_silence_gives_a_full_window_anew(quiet: int, pause: float, canary: str) -> None:
    """Stopped for any time, at any moment of a silence that is not yet a stall: no kill within the next floor of seconds."""
    pod = Pod().served()
    pod.request()
    pod.deliver()
    pod.canaries = canary
    for _ in range(quiet):
        if pod.tick() in DOWN:
            return
    pod.now += pause
    for _ in range(int(FLOOR / TICK)):
        assert pod.tick() not in DOWN


@settings(deadline=None)
@given(st.integers(0, 60), st.sampled_from(GUILTY))
def test_an_engine_that_is_started_anew_is_starting_and_not_killed_for_the_old_ones_silence(
    quiet: int, canary: str
) -> None:
    """Another start time on the page, at any moment of a silence: starting, and so it stays until a token comes."""
    pod = Pod()
    pod.page = Value(EngineSample(running=0, waiting=0, started_wall=WALL), pod.now)
    pod.served()
    pod.request()
    pod.deliver()
    pod.canaries = canary
    for _ in range(quiet):
        pod.tick()
    pod.page = Value(EngineSample(running=0, waiting=0, started_wall=WALL + pod.now), pod.now)
    for _ in range(int(2 * CAP / TICK)):
        assert pod.tick() == "starting"
