"""The verdict: the table is whole, and the ways of an engine through it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sidecar.events import STATES
from sidecar.health.progress import Evidence
from sidecar.health.verdict import (
    CONDITIONS,
    DEAD_HOLD_S,
    REFUSED_GRACE_S,
    REJECTED_STARTS,
    STUCK_CYCLES,
    TABLE,
    VerdictInputs,
    VerdictState,
    is_canary_due,
    judge,
)

from .verdict_world import KILL, World, evidence


def test_the_table_has_a_row_forevery_condition_and_every_row_ends_in_a_state() -> None:
    """Every condition has a row; every row covers all states or holds them; every state named exists."""
    assert [name for name, _, _ in CONDITIONS] == list(TABLE)
    for row in TABLE.values():
        assert set(row) <= {*STATES, "*"}
        assert all(state in STATES and reason for state, reason in row.values())
        assert "*" in row or set(row) == {"stalled", "dead"}


def test_start_up_ends_with_the_first_canary_token() -> None:
    """Starting holds, whatever the silence, until a token came."""
    w = World()
    w.wait(1200)
    assert w.memory.state == "starting" and not w.memory.startup_done
    w.canary_ends("ok", took=700)
    w.tick()
    assert w.memory.state == "idle" and w.memory.startup_done


def test_start_up_ends_with_a_users_token_too() -> None:
    """A delivered token proves a start as well as a canary does."""
    w = World()
    w.progress_at = w.work_since = 100.2
    assert w.tick().state == "progressing"
    assert w.memory.startup_done


def test_a_busy_engine_is_progressing_then_quiet_never_suspect() -> None:
    """Silence within the allowed time is quiet."""
    w = World().started()
    w.work_since = w.now
    w.progress_at = w.now + 0.1
    w.wait(7)
    assert w.states() == ["progressing", "quiet"]


def test_a_silent_hang_is_suspect_then_stalled_once_a_fresh_canary_starved() -> None:
    """Silence alone makes suspect; only a canary that was sent since then, and starved, makes stalled."""
    w = World().started()
    w.work_since = w.progress_at = w.now
    w.wait(10)
    assert w.memory.state == "suspect", "readiness goes first"
    w.canary_ends("starved", took=8)
    assert w.wait(9).state == "suspect", "a starved canary does not shorten the silence of a kill"
    assert w.wait(2).state == "stalled"
    assert w.states() == ["progressing", "quiet", "suspect", "stalled"]


def test_the_silence_of_a_canary_counts_for_work_that_came_meanwhile() -> None:
    """A canary of an idle engine starved, then work came: readiness need not wait for all of a silence again."""
    w = World().started()
    w.wait(8)
    w.work_since = w.now - 2
    w.canary_ends("starved", took=6)
    assert w.wait(2).state == "quiet"
    assert w.wait(1).state == "suspect", "8 s after the canary was sent, 4 s after the work came"


def test_without_a_canary_that_tells_silence_takes_three_times_as_long() -> None:
    """Unknown never lasts forever: after long enough users' silence decides alone."""
    w = World().started()
    w.work_since = w.progress_at = w.now
    assert w.wait(58).state == "suspect", "no kill without a confirming canary"
    assert w.wait(4).state == "stalled"


def test_counters_that_stand_still_confirm_where_no_canary_passes() -> None:
    """The engine itself says that it has work, and nothing moves."""
    w = World().started()
    w.work_since = w.progress_at = w.now
    w.wait(19)
    for _ in range(3):
        w.now += 0.5
        seen = replace(evidence(w.now, age=w.now - w.work_since, at=w.progress_at), frozen=True)
        w.memory, _ = judge(w.memory, VerdictInputs(w.now, seen, can_ask=False))
    assert w.memory.state == "stalled"


def test_a_busy_answer_is_evidence_where_the_counters_stand_still() -> None:
    """A bounded queue that is full refuses the canary, whether its engine computes or not."""
    w = World().started()
    w.work_since = w.progress_at = w.now
    w.wait(19)
    w.canary_ends("busy")
    assert w.wait(5).state == "suspect"
    seen = replace(evidence(w.now, age=w.now - w.work_since, at=w.progress_at), frozen=True)
    assert judge(w.memory, VerdictInputs(w.now, seen, w.canary))[0].state == "stalled"


def test_a_canary_from_before_the_silence_confirms_nothing() -> None:
    """What starved before the last progress says nothing about the silence after it."""
    w = World().started()
    w.work_since = w.progress_at = w.now
    w.wait(21)
    w.canary_ends("starved", took=30)
    assert w.tick().state == "suspect"


def test_an_engine_that_served_and_refuses_everything_is_unready_then_dead() -> None:
    """A worker lost behind a living front: 404 for all, the canary too."""
    w = World().started()
    assert w.tick(refusing=13.0).state == "suspect"
    assert w.memory.reason == "refuses_work"
    assert w.tick(refusing=KILL + 1).state == "suspect", "readiness has its time"
    for _ in range(round(KILL)):
        w.tick(refusing=KILL + 2)
    assert w.memory.state == "stalled"
    assert w.tick(refusing=KILL + 3).state == "stalled"


def test_an_engine_whose_canaries_pass_is_never_killed() -> None:
    """Users' work may stand still for as long as it likes: each canary that passes begins the silence again."""
    w = World().started()
    w.work_since = w.progress_at = w.now
    for n in range(600):
        if n % 4 == 0:
            w.canary_ends("ok")
        if n == 400:
            w.canary_ends("starved")
        assert w.tick().state != "stalled"
    assert (w.memory.state, w.memory.reason) == ("suspect", "work_stuck")


def test_a_canary_that_failed_at_the_pods_own_start_makes_no_replaced_process() -> None:
    """The deadline is for a process that took the place of another one; kubelet watches the pod's own start."""
    w = World()
    for outcome in ("rejected", "rejected", "rejected", "failed"):
        w.canary_ends(outcome)
        w.tick()
    assert w.memory.state == "starting" and not w.memory.replaced


def test_a_process_that_replaced_another_has_a_deadline_to_serve() -> None:
    """A supervisor in the container restarted it, and it never answers. The pod's own start is kubelet's."""
    first = World()
    assert first.tick(start_overdue=True).state == "starting"
    w = World().started()
    w.tick(restarted=True)
    assert w.wait(1000).state == "starting"
    assert w.tick(start_overdue=True).state == "stalled"
    assert w.memory.reason == "startup_stuck"


def test_stalled_holds_until_something_shows_recovery() -> None:
    """When the clients of a stalled engine gave up, nothing outstanding is not health."""
    w = World().started()
    w.work_since = w.progress_at = w.now
    w.wait(21)
    w.canary_ends("starved", took=1)
    w.tick()
    w.work_since = None
    assert w.wait(300).state == "stalled"
    w.canary_ends("ok")
    assert w.tick().state == "idle"


def test_deliveries_bring_a_stalled_engine_back() -> None:
    """Progress of any kind leaves stalled."""
    w = World().started()
    w.work_since = w.progress_at = w.now
    w.wait(21)
    w.canary_ends("starved", took=1)
    assert w.tick().state == "stalled"
    w.progress_at = w.now + 0.2
    assert w.tick().state == "progressing"


def test_an_idle_hang_is_stalled_once_no_canary_has_passed_for_the_time_of_a_kill() -> None:
    """One lost canary of an idle engine makes suspect; more of them, for as long as a kill takes, make stalled."""
    w = World().started()
    w.wait(20)
    w.canary_ends("starved", took=8)
    assert w.tick().state == "suspect"
    w.wait(3)
    w.canary_ends("starved", took=2)
    assert w.tick().state == "suspect"
    w.wait(10)
    w.canary_ends("starved", took=2)
    assert w.tick().state == "stalled"


def test_an_idle_suspicion_is_cleared_by_the_next_canary() -> None:
    """A canary that passes clears a lost one."""
    w = World().started()
    w.wait(20)
    w.canary_ends("starved", took=8)
    assert w.tick().state == "suspect"
    w.now += 1
    w.canary_ends("ok")
    assert w.tick().state == "idle"


def test_a_passing_canary_never_lets_a_kill_happen_but_withdraws_readiness_when_work_stays_stuck() -> None:
    """The canary proves compute: no kill. After several such rounds without progress the engine stays suspect."""
    w = World().started()
    w.work_since = w.progress_at = w.now
    for _ in range(STUCK_CYCLES):
        while w.memory.state != "suspect":
            w.tick()
        w.now += 0.2
        w.canary_ends("ok")
        w.tick()
    w.wait(100)
    assert (w.memory.state, w.memory.reason) == ("suspect", "work_stuck")
    w.canary_ends("ok")
    assert w.wait(5).state == "suspect"
    w.progress_at = w.now + 0.2
    assert w.tick().state == "progressing"


def test_a_refused_port_is_death_and_then_a_new_start() -> None:
    """Refusal for the grace time is dead; connections again are a start, and start-up is to be proven again."""
    w = World().started()
    w.refused_since = w.now
    w.wait(REFUSED_GRACE_S - 1)
    assert w.memory.state == "idle"
    w.wait(2)
    assert (w.memory.state, w.memory.reason) == ("dead", "engine_gone")
    w.refused_since = None
    assert w.tick().state == "starting"
    assert not w.memory.startup_done
    w.canary_ends("ok")
    assert w.tick().state == "idle"


def test_an_old_canary_does_not_prove_a_new_engine() -> None:
    """After a restart the last good canary belongs to the process before."""
    w = World().started()
    w.tick(restarted=True)
    assert w.wait(10).state == "starting"


def test_death_is_not_held_forever() -> None:
    """A dead engine that is loading for minutes after its restart must not be killed again."""
    w = World().started()
    w.refused_since = w.now
    w.wait(REFUSED_GRACE_S + DEAD_HOLD_S + 2)
    assert w.memory.state == "starting"
    assert w.wait(1200).state == "starting"


def test_a_stalled_engine_that_is_restarted_is_starting_not_dead() -> None:
    """The restart that was requested closes the port; that is no new death."""
    w = World().started()
    w.work_since = w.progress_at = w.now
    w.wait(21)
    w.canary_ends("starved", took=1)
    w.tick()
    w.refused_since, w.work_since = w.now, None
    w.tick()
    assert (w.memory.state, w.memory.reason) == ("starting", "engine_restarting")
    w.wait(REFUSED_GRACE_S + 1)
    assert (w.memory.state, w.memory.reason) == ("starting", "engine_unreachable")
    assert "dead" not in w.states()


@pytest.mark.parametrize("outcome", ["rejected", "busy", "moot", "refused"])
def test_canaries_that_prove_nothing_kill_nothing(outcome: str) -> None:
    """4xx, 429, 503, no connection, or work that moved meanwhile: none of them confirms a stall."""
    w = World().started()
    w.work_since = w.progress_at = w.now
    w.wait(10)
    for _ in range(20):
        w.now += 1
        w.canary_ends(outcome)
        w.tick()
    assert w.memory.state in ("suspect", "unknown")


def test_an_engine_that_takes_no_canary_is_unknown_and_passes_start_up() -> None:
    """An embedding model answers 4xx to every canary: start-up must not wait for a token forever."""
    w = World()
    for _ in range(REJECTED_STARTS):
        w.canary_ends("rejected")
        w.tick()
    assert (w.memory.state, w.memory.reason) == ("unknown", "canary_rejected")
    assert w.memory.startup_done


def test_exempt_and_withheld_take_precedence_over_silence() -> None:
    """A sleeping engine and own pause both hold a verdict back."""
    w = World().started()
    w.work_since = w.progress_at = w.now
    w.wait(10)
    w.canary_ends("starved", took=1)
    assert w.tick(exempt="engine_sleeping").state == "exempt"
    assert (w.tick(withheld="own_pause").state, w.memory.reason) == ("unknown", "own_pause")


def test_canaries_are_sent_when_starting_idle_suspect_or_stalled_and_never_to_a_working_engine() -> None:
    """A canary adds load, so a working engine gets none."""
    for state in STATES:
        m = VerdictState(state=state, since=50.0)
        busy = is_canary_due(m, evidence(100.0, age=1.0), 60.0, 10.0)
        assert busy == (state in ("starting", "suspect", "stalled", "dead")), state
    idle = VerdictState(state="idle", since=50.0)
    assert is_canary_due(idle, evidence(100.0), 90.0, 10.0)
    assert not is_canary_due(idle, evidence(100.0), 90.5, 10.0)
    assert not is_canary_due(idle, evidence(100.0, at=95.0), 60.0, 10.0), "fresh progress is as good as a canary"
    suspect = VerdictState(state="suspect", since=99.9)
    assert is_canary_due(suspect, evidence(100.0), 99.8, 10.0), "the confirming canary does not wait"


def test_a_start_up_without_a_sign_of_progress_is_named_and_stays_the_startup_probes() -> None:
    """Its reason changes, its state does not."""
    w = World()
    assert w.tick(startup_stuck=True).state == "starting"
    assert w.memory.reason == "startup_stuck"
    assert w.tick().reason == "awaiting_first_token"


def test_a_canary_that_starved_behind_work_within_its_time_is_no_loss() -> None:
    """The client of a long prefill leaves: the idle engine is in doubt, and not killed for a canary sent before."""
    world = World().started()
    world.work_since = world.now

    def busy() -> Evidence:
        return evidence(world.now + 0.5, age=world.now + 0.5 - (world.work_since or 0.0), allowed=200.0)

    while world.now < world.work_since + 60:
        world.tick(evidence=busy())
    world.canary_ends("starved", took=50.0)
    for _ in range(20):
        assert world.tick(evidence=busy()).state == "quiet"
    world.work_since = None
    world.wait(KILL - 2)
    assert world.states()[-1] == "suspect"
    world.canary_ends("starved", took=KILL + 1)  # and one that was sent to the idle engine counts
    assert world.wait(2).state == "stalled"
