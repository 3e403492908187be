"""Invariants of the verdict under any order of events: a state machine drives the production control object and checks
each tick.

Users, clients that do not read, operators' orders, pages true and false, canaries, closed ports, XIDs, the sidecar's
own restarts, pauses and clock jumps come in any order; what must never happen is written out once, in
`Machine._checked`.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from sidecar.health import verdict
from sidecar.health.monitor import TICK_S
from sidecar.readings import EngineSample, Failed, RankSample, Value

from .verdict_pod import CAP, DOWN, FLOOR, LIMITS, NOTHING, SEARCH, SETTINGS, WALL, Pod

PLACES = st.integers(0, 5)
WHAT = ("engine_sleeping", "engine_paused", "engine_profiling", "weight_update")
WARNED, WITHIN = 60.0, 600.0  # seconds for which readiness must have been withdrawn before a part's kill
LEAST = 5 * FLOOR  # seconds that any single stream may be silent


class Machine(RuleBasedStateMachine):
    """`withheld_until`: no kill before, the sidecar is unreliable; `orders`: pauses of the engine, by time."""

    def __init__(self) -> None:
        super().__init__()
        self.pod = Pod()
        self.withheld_until = 0.0
        self.orders: dict[str, float] = {}
        self.started = WALL
        self.kills: list[float] = []
        self.suspected: list[float] = []  # ticks at which readiness was withdrawn

    @initialize(served=st.booleans())
    def begin(self, served: bool) -> None:
        """Most histories begin on a served engine."""
        if served:
            self.pod.served()

    # --- users ---

    @rule(tokens=st.sampled_from((10, 500, 60_000)), streams=st.booleans())
    def request(self, tokens: int, streams: bool) -> None:
        self.pod.request(tokens, streams)

    @rule(place=PLACES, tokens=st.sampled_from((1, 2, 20)))
    def deliver(self, place: int, tokens: int) -> None:
        self.pod.deliver(place, tokens)
        self.orders.clear()  # it may have ended them; what no order excuses is checked the harder

    @rule(outcome=st.sampled_from(("ok", "client_cancelled", "engine_error")))
    def settle(self, outcome: str) -> None:
        self.pod.settle(outcome)
        self.orders.clear()

    @rule(place=PLACES, on=st.booleans())
    def read(self, place: int, on: bool) -> None:
        self.pod.read(place, on=on)

    # --- engine and operators ---

    @rule(
        running=st.integers(0, 3),
        waiting=st.integers(0, 3),
        tokens=st.integers(0, 3),
        steps=st.integers(0, 3),
        ranks=st.booleans(),
        capacity=st.sampled_from((None, 1000.0)),
    )
    def page(self, running: int, waiting: int, tokens: int, steps: int, ranks: bool, capacity: float | None) -> None:
        by_rank = (RankSample(0, running, waiting, tokens), RankSample(1, 1, 0, 5)) if ranks else ()
        self.pod.page = Value(
            EngineSample(
                running=running,
                waiting=waiting,
                kv_usage=0.5,
                generation_tokens=100 + tokens,
                iterations=50 + steps,
                started_wall=self.started,
                kv_capacity_tokens=capacity,
                ranks=by_rank,
            ),
            self.pod.now,
        )

    @rule(page=st.sampled_from((NOTHING, Failed("garbage"))))
    def no_page(self, page: object) -> None:
        self.pod.page = page  # type: ignore[assignment]

    @rule(canaries=st.sampled_from(("ok", "starved", "failed", "busy", "moot", "rejected", "")))
    def canary(self, canaries: str) -> None:
        self.pod.canaries = canaries

    @rule(what=st.sampled_from(WHAT), on=st.booleans())
    def order(self, what: str, on: bool) -> None:
        self.pod.order(what, on=on)
        if on:
            self.orders[what] = self.pod.now
        else:
            self.orders.pop(what, None)

    @rule(id=st.integers(0, 3), on=st.booleans(), taken=st.booleans())
    def call(self, id: int, on: bool, taken: bool) -> None:
        """Whether one that is not answered excuses anything or not: what must never happen is the same."""
        self.pod.call(id, WHAT[id], on=on, taken=taken)

    @rule(resting=st.sampled_from(("", "", "engine_sleeping", "engine_paused")), unanswered=st.booleans())
    def signs(self, resting: str, unanswered: bool) -> None:
        self.pod.resting, self.pod.unanswered = resting, unanswered

    @rule(closed=st.booleans())
    def port(self, closed: bool) -> None:
        self.pod.refused = (self.pod.refused or self.pod.now) if closed else None
        self.orders.clear()

    @rule()
    def xid(self) -> None:
        self.pod.xids += 1

    @rule()
    def new_engine(self) -> None:
        self.started += 1000.0
        self.orders.clear()
        if isinstance(self.pod.page, Value):
            self.page(0, 0, 0, 0, False, None)

    # --- ourselves ---

    @rule(seconds=st.floats(2.6, 1000.0))
    def pause(self, seconds: float) -> None:
        self.pod.now += seconds
        self._withhold()

    @rule(seconds=st.one_of(st.floats(-1e6, -6), st.floats(6, 1e6)))
    def jump(self, seconds: float) -> None:
        self.pod.wall += seconds
        self._withhold()

    @rule()
    def relay_dies(self) -> None:
        self.pod.relay_dies()

    @rule(remembers=st.booleans())
    def restart(self, remembers: bool) -> None:
        self.pod.restart(remembers=remembers)
        if not remembers:
            self.orders.clear()
            self.kills.clear()
        self._withhold()

    def _withhold(self) -> None:
        self.withheld_until = self.pod.now + FLOOR - TICK_S

    # --- time, and what must never happen in it ---

    @rule(n=st.integers(1, 40))
    def wait(self, n: int) -> None:
        for _ in range(n):
            self._tick()

    @rule(n=st.integers(30, 80), tokens=st.sampled_from((1, 3)), read=st.booleans())
    def one_moves(self, n: int, tokens: int, read: bool) -> None:
        """The newest request gets tokens all the time, the others nothing; the oldest's client reads, or does not."""
        self.pod.resting, self.pod.unanswered = "", False
        for _ in range(3):
            self.request(500, True)
        self.deliver(0, 1)
        self.pod.read(0, on=read)
        for _ in range(n):
            self.pod.deliver(len(self.pod.open) - 1, tokens)
            self._tick()

    @rule(
        n=st.integers(20, 100),
        canaries=st.sampled_from(("starved", "failed")),
        asked=st.booleans(),
        what=st.sampled_from(("", "", *WHAT)),
        amid=st.sampled_from(("", "", "pause", "jump", "restart")),
    )
    def hang(self, n: int, canaries: str, asked: bool, what: str, amid: str) -> None:
        """Nothing moves and canaries fail, after a pause of the engine or without one; the sidecar may falter."""
        self.pod.canaries, self.pod.resting, self.pod.refused = canaries, "", None
        if what:
            self.order(what, True)
        if asked:
            self.pod.request()
        for _ in range(n):
            self._tick()
        falter = {
            "pause": lambda: self.pause(7.0),
            "jump": lambda: self.jump(3600.0),
            "restart": lambda: self.restart(True),
        }
        if amid:
            falter[amid]()
        for _ in range(n):
            self._tick()

    @rule(n=st.integers(20, 60), tokens=st.sampled_from((0, 1)))
    def parts_hang(self, n: int, tokens: int) -> None:
        """Requests keep coming, get their first token or nothing, and an answer in one piece ends now and then."""
        for i in range(n):
            self.pod.request(10, streams=i % 8 != 0)
            if i % 8 == 0:
                self.pod.settle("ok", self.pod.open[-1])
            elif tokens:
                self.pod.deliver(len(self.pod.open) - 1, tokens)
            for _ in range(8):
                self._tick()

    def _tick(self) -> None:
        before, kills = self.pod.control.health.state, self.pod.control.health.kill_policy.state.kills_total
        self.pod.tick()
        after = self.pod.control.health.state
        if after.state in ("suspect", *DOWN):
            self.suspected.append(self.pod.now)
        if after.state in DOWN and before.state not in DOWN:
            self._checked(before, str(self.pod.control.health.verdict.evidence["condition"]))
        if self.pod.control.health.kill_policy.state.kills_total > kills:
            self._spaced()
        ends = self.pod.take_aborts()
        self._check_ends(ends)
        self.pod.on_command(ends)
        assert after.reason

    def _checked(self, before: verdict.VerdictState, condition: str) -> None:
        """Liveness begins to fail."""
        p, e = self.pod, self.pod.control.health.evidence
        if p.state == "dead":
            assert p.refused is not None
            assert p.now - p.refused >= verdict.REFUSED_GRACE_S
            return
        assert p.now > self.withheld_until, "own pause, restart or clock jump gives a full window"
        assert not p.resting, "an engine that rests is not judged"
        held = [what for what, at in self.orders.items() if p.now - at < CAP]
        assert not held or p.now - p.delivered_at <= verdict.FRESH_PROGRESS_S, (
            "an order that the relay saw excuses silence"
        )
        if condition == "part_severe":
            assert e.outstanding > 0, "a part hangs only with work"
            assert any(WARNED <= p.now - at <= WITHIN for at in self.suspected), "readiness goes long before liveness"
            return
        if condition == "start_overdue":
            assert before.replaced and not before.served
            return
        assert before.state == "suspect", "a stall is always suspected first; never is it found from unknown or exempt"
        canary = p.control.health.canaries.last
        assert canary is not None
        is_told = canary.outcome in ("failed", "starved") and canary.started >= (e.progress_at or 0.0)
        if condition == "lost":
            assert e.age is None and is_told
            assert before.lost_at is not None
            assert p.now - before.lost_at > LIMITS.kill
        elif condition == "refuses_long":
            assert e.outstanding == 0
        else:
            assert condition == "confirmed"
            assert e.age is not None
            assert e.age > e.kill_after, "silent beyond the time of a kill"
            assert is_told or e.frozen or e.age > verdict.UNASKED_KILLS * e.kill_after
        assert p.now - p.delivered_at > verdict.FRESH_PROGRESS_S, "not while anything is delivered"
        assert e.age is None or e.age > e.allowed, "silent beyond what is allowed, or nothing but the canary was out"
        assert e.allowed <= CAP + LIMITS.blocked + 1e-9

    def _spaced(self) -> None:
        now = self.pod.now
        assert not self.kills or now - self.kills[-1] >= SETTINGS.kill_interval, "kills keep their distance"
        self.kills.append(now)

    def _check_ends(self, ends: list[tuple[str, str]]) -> None:
        for id, code in ends:
            assert [i for i, _ in self.pod.ended].count(id) == 1, "a request is ended once"
            assert id not in self.pod.blocked, "a client that does not read is not the engine's fault"
            assert code in ("stream_stuck", "prompt_exceeds_kv_cache")
            if code == "stream_stuck":
                assert self.pod.now - self.pod.moved[id] >= LEAST, "each stream has its own patience"


TestMachine = Machine.TestCase
TestMachine.settings = settings(SEARCH, max_examples=20, stateful_step_count=20)
