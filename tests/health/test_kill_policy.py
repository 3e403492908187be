"""The policy between the verdict and liveness: how often a stalled engine is killed, and when it is handed over."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.events import STATES, State
from sidecar.health import kill_policy
from sidecar.health.kill_policy import (
    KillHold,
    KillInputs,
    KillLimits,
    KillPolicy,
    KillState,
    decide,
    interval,
    kill_limits,
    kills_by_reason,
    share,
)
from sidecar.readings import Absent, GpuSample, Value
from sidecar.settings import Settings

LIMITS = KillLimits(interval=300, interval_cap=3600, jitter=0, recovery=600, healthy=3600, useless=2)
DAY = 86_400.0
STEP_S = 10.0  # of a story that lasts longer
BROKEN = {"gpu_needs_reset", "node_needs_reboot"}


def gaps(times: Sequence[float]) -> list[float]:
    """The time from each to the next."""
    return [after - before for before, after in pairwise(times)]


@dataclass
class Story:
    """An engine's life under the policy; `kills` are the times at which liveness began to fail."""

    limits: KillLimits = LIMITS
    now: float = 1000.0
    state: KillState = field(default_factory=KillState)
    hold: KillHold | None = None
    kills: list[float] = field(default_factory=list)

    def be(self, state: State, seconds: float = 0.5, **inputs: object) -> str:
        """Spend `seconds` in a state, in steps; the reason that holds at the end."""
        end = self.now + seconds
        while self.now < end:
            before = self.state.kills_total
            tick = replace(self._inputs(state), **inputs)  # type: ignore[arg-type]
            self.state, self.hold = decide(self.state, tick, self.limits)
            if self.state.kills_total > before:
                self.kills.append(self.now)
            self.now += min(0.5 if seconds < STEP_S else STEP_S, end - self.now)
        return self.hold.reason if self.hold else ""

    def _inputs(self, state: State) -> KillInputs:
        return KillInputs(self.now, state, proof=self.now if state in kill_policy.HEALTHY_STATES else None)

    def hang(self) -> None:
        """Hang until liveness fails, however long that is held back."""
        before = len(self.kills)
        while len(self.kills) == before:
            self.be("stalled", STEP_S)

    def restart(self, served: float = 0.0) -> None:
        """Kubelet restarts the engine, which then serves for `served` seconds."""
        self.be("starting", 60)
        if served:
            self.be("progressing", served)


def test_the_first_stall_is_killed_at_once() -> None:
    """Nothing holds the first kill, and the order stands while the stall lasts."""
    story = Story()
    story.be("progressing", 10)
    assert story.be("stalled") == "" and story.be("stalled", 4000) == ""
    assert len(story.kills) == 1


@pytest.mark.parametrize(
    ("owed", "seconds"),
    [(0, 0), (1, 300), (6, 300), (7, 600), (12, 600), (18, 1200), (24, 2400), (25, 3600), (30, 3600), (9999, 3600)],
)
def test_the_interval_doubles_up_to_its_cap(owed: int, seconds: float) -> None:
    """None while all kills are paid for by service; 5 minutes for one that is not, then 10, 20, 40, 60."""
    assert interval(owed, LIMITS) == seconds


def test_the_settings_bound_interval_and_restarts() -> None:
    """What is no setting has its constant; an interval over an hour is its own cap; the jitter depends on the name."""
    engine = "http://engine"
    assert kill_limits(Settings(engine=engine), "") == KillLimits()
    slow = kill_limits(Settings(engine=engine, kill_interval=7200, useless_restarts=0), "llm-1")
    assert (slow.interval, slow.interval_cap, slow.useless) == (7200, 7200, 0)
    assert slow.jitter == kill_policy.JITTER_S * share("llm-1") > 0


def test_a_stall_soon_after_a_restart_waits_for_the_interval() -> None:
    """The verdict stays, liveness passes until the interval is over, and an operator can read how long that takes."""
    story = Story(replace(LIMITS, useless=0))
    story.be("stalled")
    story.restart(served=20)
    assert story.be("stalled") == "kill_interval"
    assert story.hold and "may come in 2" in story.hold.detail and not story.hold.handover
    story.be("stalled", 300)
    story.restart(served=20)
    story.be("stalled", 700)
    assert story.hold is None
    assert gaps(story.kills) == pytest.approx([300, 600], abs=5)


@pytest.mark.parametrize("minutes", [7, 9, 12, 20, 30, 60])
def test_an_engine_that_hangs_again_and_again_but_serves_between_is_restarted_at_once(minutes: float) -> None:
    """Every restart paid for itself: nothing is held back all day."""
    story = Story()
    while story.now < DAY:
        assert story.be("stalled") == ""
        story.restart(served=60 * minutes + 5)
    assert len(story.kills) >= DAY // (60 * minutes + 100) - 1
    assert story.state.owed == 0 and not story.state.handover


def test_each_minute_of_service_shortens_the_interval_again() -> None:
    """Four kills without service, then four of it leave less unpaid; ten minutes without a break forgive all."""
    story = Story(replace(LIMITS, useless=0))
    for _ in range(4):
        story.hang()
        story.restart()
    assert story.state.owed == 24
    story.be("progressing", 245)
    assert story.state.owed == 20
    story.be("starting")
    story.be("progressing", 50)
    assert story.state.owed == 20, "no whole minute without a break"
    story.be("progressing", 560)
    assert story.state.owed == 0


def test_hangs_at_random_cost_little_more_than_the_restarts() -> None:
    """Twenty minutes of service on average, some much shorter: two in three hangs are followed by a restart at once."""
    story, rng, held = Story(), random.Random(3), 0
    while story.now < 2 * DAY:
        held += story.be("stalled") != ""
        story.be("stalled", STEP_S)
        if not story.state.standing:
            story.hang()
        story.be("starting", 180)
        story.be("progressing", 30 + rng.expovariate(1 / 1200))
    assert held < len(story.kills) / 3


def test_two_restarts_that_do_not_help_are_followed_by_one_an_hour() -> None:
    """Stalled a third time: escalated, and tried again once an hour until an operator comes."""
    story = Story()
    for _ in range(2):
        story.be("stalled", 1200)
        story.restart(served=30)
    assert story.be("stalled") == "restart_useless"
    assert story.hold and story.hold.handover
    assert re.search(r"next attempt in 2[0-9]{3} s; restarts do not help", story.hold.detail)
    while story.now < DAY:
        story.be("stalled", 4000)
        story.restart(served=30)
        assert story.state.handover == "restart_useless", "an operator still sees it"
    assert all(3600 <= gap < 4200 for gap in gaps(story.kills)[1:]) and len(story.kills) > 20


def test_hangs_every_five_minutes_grow_apart_and_never_end_for_ever() -> None:
    """Served for nearly five minutes after each restart, which is too little: it comes down to one attempt an hour."""
    story = Story()
    while story.now < 2 * DAY:
        story.hang()
        story.restart(served=295)
    between = gaps(story.kills)
    assert between == sorted(between) and between[0] < 600
    assert story.state.handover and between[-24:] == pytest.approx([3600] * 24, abs=STEP_S)


def test_an_attempt_that_helps_ends_the_escalation() -> None:
    """The hourly attempt serves for ten minutes: the next stall is an ordinary one."""
    story = Story()
    for _ in range(2):
        story.be("stalled", 1200)
        story.restart(served=30)
    story.be("stalled", 3600)
    assert len(story.kills) == 3 and story.hold is None and story.state.handover
    story.restart(served=300)
    assert story.state.handover == "restart_useless", "five minutes prove nothing"
    story.be("progressing", 310)
    assert story.state.handover == "" and story.state.owed == 0
    assert story.be("stalled") == "" and len(story.kills) == 4


def test_a_kill_without_a_restart_counts_too() -> None:
    """A stall that passes before anything is restarted: liveness does not flap within the interval."""
    story = Story()
    while story.now < 1000 + 3600:
        story.be("stalled", 20)
        story.be("progressing", 20)
    assert gaps(story.kills) == pytest.approx([300, 600, 1200], abs=45)
    assert not story.state.handover, "no restart was seen that could have been useless"


@pytest.mark.parametrize(("useless", "most"), [(2, 25), (0, 27)])
def test_a_storm_of_false_verdicts_is_bounded(useless: int, most: int) -> None:
    """A verdict that is wrong right after each start kills at most so often in a day."""
    story = Story(replace(LIMITS, useless=useless))
    while story.now < 1000 + DAY:
        story.hang()
        story.restart(served=1)
    assert most - 2 <= sum(kill < 1000 + DAY for kill in story.kills) <= most


def test_one_restart_counts_once_even_if_the_engine_stalls_on_and_off() -> None:
    """A stall that passes by itself proves nothing more about the restart before it."""
    story = Story()
    story.be("stalled")
    story.restart(served=10)
    for _ in range(5):
        story.be("stalled", 2)
        story.be("progressing", 2)
    assert story.state.owed == 6 and not story.state.handover


def test_idle_without_a_token_proves_nothing() -> None:
    """An idle engine after a restart of the sidecar may hang all the same: the kill stands, the restart is open."""
    story = Story()
    story.be("stalled")
    story.be("idle", 4000, proof=None)
    assert story.be("stalled") == "" and len(story.kills) == 1, "still the same kill"


@pytest.mark.parametrize("xid", [46, 79])
@pytest.mark.parametrize("clear", ["operator", "hour"])
def test_a_broken_gpu_ends_by_an_operator_or_a_healthy_hour(xid: int, clear: str) -> None:
    """No attempt is made however long it takes, and recoveries that are short do not end it."""
    story = Story()
    story.be("stalled", xid=xid)
    assert story.be("stalled", 20_000) and story.kills == []
    story.be("progressing", 1800)
    assert story.be("stalled"), "half an hour is not enough"
    if clear == "operator":
        assert story.be("stalled", resume=True) == ""
    else:
        story.be("progressing", 3605)
        assert story.be("stalled") == ""


def test_an_operator_ends_any_hold() -> None:
    """Resumed: killed at once, and counting starts again."""
    story = Story()
    for _ in range(2):
        story.be("stalled", 1200)
        story.restart(served=30)
    assert story.be("stalled") == "restart_useless"
    assert story.be("stalled", resume=True) == ""
    story.restart(served=30)
    assert story.be("stalled") == "kill_interval" and story.state.owed == 6


def test_kills_are_counted_by_the_reason_of_the_verdict() -> None:
    """By its reason at the kill; what is no known code counts as `other`, and the total is their sum."""
    story = Story()
    for cause in ("decode_stalled", "no_progress", "decode_stalled", "made up"):
        story.be("stalled", cause=cause)
        story.restart(served=700)
    assert kills_by_reason(story.state.kills) == {"decode_stalled": 2, "no_progress": 1, "other": 1}
    assert story.state.kills_total == 4
    assert kills_by_reason((("of another version", 2), ("other", 1))) == {"other": 3}


@pytest.mark.parametrize(
    ("xid", "reason"), [*((x, "gpu_needs_reset") for x in kill_policy.NEEDS_RESET), (79, "node_needs_reboot"), (0, "")]
)
def test_an_xid_that_a_restart_does_not_heal_hands_over(xid: int, reason: str) -> None:
    """Seen before the stall: no kill at all; seen while liveness fails already: the order is taken back."""
    story = Story()
    story.be("progressing", 10)
    story.be("progressing", xid=xid)
    assert story.be("stalled") == reason
    late = Story()
    late.be("stalled")
    assert late.be("stalled", xid=xid) == reason


def test_the_gravest_reason_is_reported() -> None:
    """A GPU off the bus is more than one that needs a reset, and both are more than restarts that did not help."""
    story = Story(state=KillState(handover="restart_useless"))
    assert story.be("stalled", xid=119) == "gpu_needs_reset"
    assert story.be("stalled", xid=79) == "node_needs_reboot"
    assert story.be("stalled", xid=46) == "node_needs_reboot"


def test_an_xid_with_ten_minutes_of_service_after_it_is_forgotten() -> None:
    """Another pod's GPU, or a reset since: what served on was not broken."""
    story = Story()
    story.be("progressing", 1)
    story.be("progressing", xid=46)
    story.be("progressing", 700)
    assert story.be("stalled") == ""


def test_dead_is_neither_held_nor_counted() -> None:
    """A process that is gone is kubelet's: no kill, no interval, and a hand-over stays known."""
    story = Story()
    for _ in range(5):
        story.be("dead", 20)
        story.restart(served=20)
    assert story.kills == [] and story.be("stalled") == ""
    gone = Story()
    gone.be("dead", xid=79)
    assert gone.hold is None and gone.state.handover == "node_needs_reboot"


def test_jitter_spreads_replicas_that_stall_at_once() -> None:
    """Each waits for its own share, the same each time; without a name there is none."""
    shares = [share(f"llm-{n}") for n in range(100)]
    assert len({round(s, 3) for s in shares}) > 80 and all(0 <= s < 1 for s in shares)
    assert share("llm-1") == shares[1] and share("") == 0
    story = Story(replace(LIMITS, jitter=8))
    assert story.be("stalled", 7) == "kill_jitter" and story.be("stalled", 2) == ""


def gpu(index: int, *xids: tuple[int, int]) -> GpuSample:
    nothing = Absent("not asked")
    return GpuSample(index, "", "", nothing, nothing, nothing, nothing, nothing, xids)


def test_only_new_xids_beyond_healing_count() -> None:
    """Counts of the driver are compared from tick to tick; an XID of an application (13) is ignored."""
    policy = KillPolicy(LIMITS)
    policy.tick("progressing", None, Value((gpu(0, (13, 4), (46, 1)),), at=0), 1.0)
    assert policy.state.xid_at == 1.0 and policy.state.xid == 46
    policy.tick("progressing", None, Value((gpu(0, (13, 5), (46, 1)), gpu(1)), at=1), 2.0)
    assert policy.state.xid_at == 1.0
    policy.tick("progressing", None, Value((gpu(0, (46, 1)), gpu(1, (79, 1), (46, 9))), at=2), 3.0)
    assert policy.state.xid == 79
    policy.tick("stalled", None, Absent("lost"), 4.0)
    assert policy.hold and policy.hold.reason == "node_needs_reboot"


steps = st.lists(
    st.tuples(
        st.sampled_from(STATES),
        st.sampled_from((0.5, 5.0, 60.0, 400.0, 4000.0)),
        st.sampled_from((0, 0, 0, 0, 46, 79)),
        st.sampled_from((False, False, False, True)),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(steps=steps, jitter=st.sampled_from((0.0, 7.0)))
def test_whatever_happens_the_promises_hold(steps: list[tuple[State, float, int, bool]], jitter: float) -> None:
    """No two kills closer than the interval; only `stalled` is killed or held; a broken GPU ends by an operator or a
    healthy hour only, and nothing is killed under it; other escalations leave one kill an hour."""
    kill_limits, memory, now = replace(LIMITS, jitter=jitter), KillState(), 1000.0
    last_kill, resumed, healthy_since = None, False, None
    for state, seconds, xid, resume in steps:
        before = memory
        memory, hold = decide(
            memory,
            KillInputs(now, state, now if state in kill_policy.HEALTHY_STATES else None, xid, resume),
            kill_limits,
        )
        healthy_since = (healthy_since or now) if state in kill_policy.HEALTHY_STATES else healthy_since
        healthy_since = None if state in kill_policy.UNHEALTHY_STATES else healthy_since
        healthy = now - healthy_since if state in kill_policy.HEALTHY_STATES and healthy_since else 0.0
        resumed |= resume
        if before.handover:
            needed = kill_limits.recovery if before.handover == "restart_useless" else kill_limits.healthy
            assert memory.handover or resume or healthy >= needed
        if memory.handover in BROKEN and state == "stalled":
            assert hold and hold.handover
        if state != "stalled":
            assert hold is None
        if memory.kills_total > before.kills_total:
            assert state == "stalled" and hold is None and memory.handover not in BROKEN
            if last_kill is not None and not resumed:
                assert now - last_kill >= (3600 if memory.handover else kill_limits.interval)
            last_kill, resumed = now, False
        now += seconds


lives = st.lists(
    st.tuples(st.integers(1, 4000), st.integers(0, 900), st.booleans(), st.floats(0, 1)), min_size=1, max_size=9
)


@pytest.mark.parametrize(("longest", "most"), [(59, 4), (900, 12)])
@settings(max_examples=40, deadline=None)
@given(lives=lives, useless=st.sampled_from((0, 1, 2, 3)))
def test_kills_within_an_hour_are_bounded(
    longest: float, most: int, lives: list[tuple[int, int, bool, float]], useless: int
) -> None:
    """Whatever is stalled, dead or starting: at most four in any hour when nothing helps, twelve whatever helps."""
    story = Story(replace(LIMITS, useless=useless))
    for stalled, starting, dies, served in lives:
        story.be("stalled", stalled)
        if dies:
            story.be("dead", 6)
        story.be("starting", starting)
        story.be("progressing", served * longest)
    assert max(sum(0 <= other - kill < 3600 for other in story.kills) for kill in story.kills) <= most
