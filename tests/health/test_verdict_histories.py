"""The verdict under any history of an engine, and where only a part of it hangs."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from sidecar.events import Directing
from sidecar.health.partial_hangs import PartialHang
from sidecar.health.verdict import PART_HOLD_S, UNASKED_KILLS, is_canary_due
from sidecar.settings import Settings

from .verdict_pod import Pod
from .verdict_world import KILL, World, evidence

steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["deliver", "work", "drop", "starved", "failed", "ok", "busy", "rejected", "refuse", "open", "none"]
        ),
        st.integers(1, 40),
    ),
    max_size=60,
)


@given(steps)
def test_stalled_needs_the_silence_of_a_kill_and_a_canary_that_failed_in_it(script: list[tuple[str, int]]) -> None:
    """In any history: stalled is entered only from suspect, never within the time of a kill, and only by a canary that
    was sent in the silence and failed or starved, or by three times that silence where none can."""
    w = World().started()
    for action, ticks in script:
        _act(w, action)
        for _ in range(ticks):
            before = w.memory
            w.tick()
            if w.memory.state == "stalled" and before.state != "stalled":
                assert before.state == "suspect"
                assert w.canary is not None
                silence = w.now - max(w.work_since or before.lost_at or 0.0, w.progress_at or 0.0)
                assert silence > KILL
                is_told = w.canary.outcome in ("failed", "starved") and w.canary.started >= (w.progress_at or 0.0)
                assert is_told or (w.work_since is not None and silence > UNASKED_KILLS * KILL)


@given(steps)
def test_an_engine_that_keeps_delivering_is_never_suspect(script: list[tuple[str, int]]) -> None:
    """While deliveries come within the allowed silence, nothing that canaries do makes the engine suspect."""
    w = World().started()
    w.work_since = w.now
    for action, ticks in script:
        if action in ("starved", "failed", "ok", "busy", "rejected"):
            w.canary_ends(action, took=0.4)
        for n in range(ticks):
            if n % 12 == 0:
                w.progress_at = w.now + 0.4
            w.tick()
            assert w.memory.state in ("progressing", "quiet")


def _act(w: World, action: str) -> None:
    match action:
        case "deliver":
            w.progress_at = w.now
        case "work":
            w.work_since = w.work_since or w.now
        case "drop":
            w.work_since = None
        case "refuse":
            w.refused_since = w.refused_since or w.now
        case "open":
            w.refused_since = None
        case "none":
            pass
        case _:
            w.canary_ends(action)


PART = PartialHang("rank_silent", 0.0, False, "rank 1")


def test_a_part_that_hangs_withdraws_readiness_though_the_rest_progresses() -> None:
    """Progress of others does not hide it, its own reason names it, and canaries come at the pace of an idle engine."""
    w = World().started()
    w.work_since = w.progress_at = w.now
    assert w.tick(part=PART).state == "suspect"
    assert w.memory.reason == "rank_silent"
    assert not is_canary_due(w.memory, evidence(w.now + 9.0), w.now + 0.1, 10.0)
    assert is_canary_due(w.memory, evidence(w.now + 11.0), w.now + 0.1, 10.0)
    w.progress_at = w.now + 0.4
    assert w.tick().state == "progressing"


def test_a_part_that_hangs_for_long_fails_liveness_and_is_held_while_its_streams_are_ended() -> None:
    """The kill stays under way once liveness failed, although the requests that showed the hang are gone."""
    w = World().started()
    w.work_since = w.progress_at = w.now
    w.tick(part=PART)
    w.tick(part=replace(PART, severe=True))
    assert (w.memory.state, w.memory.reason) == ("stalled", "rank_silent")
    w.work_since = None
    w.canary_ends("ok")
    w.wait(PART_HOLD_S - 5)
    assert w.memory.state == "stalled"
    w.wait(10)
    assert w.memory.state == "idle", "nothing shows it any more, and no one restarted it"


def test_the_silence_of_the_whole_engine_goes_before_a_part() -> None:
    """Once all is silent, the whole engine is judged: by its canary."""
    w = World().started()
    w.work_since = w.progress_at = w.now
    w.tick(part=PART)
    for _ in range(60):
        w.tick(part=PART)
    assert (w.memory.state, w.memory.reason) == ("suspect", "no_progress")
    w.canary_ends("starved", took=1)
    assert w.tick(part=PART, cause="livelock").state == "stalled"
    assert w.memory.reason == "livelock"


def test_hangs_of_the_whole_engine_one_after_the_other_are_no_silent_listener() -> None:
    """Its canaries pass, starve and pass again, as those of several listeners do of which one hangs."""
    short = Settings(engine="http://engine", silence_floor=3.0, silence_kill=9.0, silence_cap=30.0, canary_interval=1.0)
    pod = Pod(settings=short).served()
    for _ in range(4):
        pod.canaries = "starved"
        while pod.state != "stalled":
            pod.tick()
        pod.canaries = "ok"
        while pod.state != "idle":
            pod.tick()
    assert "connection_silent" not in [change.reason for change in pod.control.health.changes]


def test_no_canary_meets_a_call_that_may_stop_the_engine_at_any_moment() -> None:
    """SGLang ends when its memory is released while a request runs, and a canary is one."""
    for ticks in range(30):
        pod = Pod().served()
        for _ in range(ticks):
            pod.tick()
        if pod.sent is None:
            pod.control.on_event(0, Directing(pod.now, 1, "engine_sleeping", True))
            for _ in range(40):
                pod.tick()
                assert pod.sent is None
