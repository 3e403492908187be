"""A core that stands in a step is not ready at once; one that computes a prompt stays ready."""

from __future__ import annotations

from dataclasses import replace

from sidecar.health.progress import Evidence
from sidecar.health.step_watch import HALF_LIFE_S, STEP_FLOOR_S, STEP_MARGIN, StepWatch
from sidecar.readings import CoreSteps
from sidecar.settings import Settings

from .verdict_pod import Pod
from .verdict_world import World, evidence


def core(steps: int, at: float, *, tokens: int = 0, running: int = 1, pid: int = 1) -> CoreSteps:
    return CoreSteps(pid, steps, tokens, 1000, running, 0, at)


def test_a_core_stands_only_with_requests() -> None:
    """An idle core begins no step for hours."""
    watch = StepWatch()
    watch.read((core(1, 100.0, running=0),), 100.0, teaches=True)
    assert watch.standing(500.0) is None
    watch.read((core(2, 500.0),), 500.0, teaches=True)
    assert watch.standing(507.0) == 7.0


def test_of_several_cores_all_must_stand() -> None:
    """One rank that hangs is another finding."""
    watch = StepWatch()
    watch.read((core(1, 100.0, pid=1), core(1, 100.0, pid=2), core(9, 10.0, running=0, pid=3)), 100.0, teaches=True)
    watch.read((core(1, 100.0, pid=1), core(2, 130.0, pid=2), core(9, 10.0, running=0, pid=3)), 131.0, teaches=True)
    assert watch.standing(131.0) == 1.0


def test_a_clock_that_differs_makes_no_core_stand() -> None:
    """What was first seen now began now at the earliest; what has changed did so after the reading before."""
    watch = StepWatch()
    watch.read((core(1, 10.0),), 1000.0, teaches=True)
    assert watch.standing(1001.0) == 1.0
    watch.read((core(2, 11.0),), 1002.0, teaches=True)
    assert watch.standing(1003.0) == 3.0
    watch.read((core(2, 11.0),), 1004.0, teaches=True)
    assert watch.standing(1007.0) == 7.0


def test_long_steps_teach_patience_and_fade() -> None:
    """What a healthy engine took for a step; not what ended a doubt."""
    watch = StepWatch()
    watch.read((core(1, 100.0),), 100.0, teaches=True)
    watch.read((core(1, 100.0),), 108.0, teaches=True)
    watch.read((core(2, 108.5),), 108.5, teaches=False)
    assert watch.allowed(0.0) == STEP_FLOOR_S
    watch.read((core(2, 108.5),), 118.5, teaches=True)
    watch.read((core(3, 119.0),), 119.0, teaches=True)
    assert watch.allowed(0.0) == STEP_MARGIN * 10.0 and watch.allowed(50.0) == 50.0
    watch.read((core(4, 119.0 + HALF_LIFE_S),), 119.0 + HALF_LIFE_S, teaches=False)
    assert watch.allowed(0.0) == STEP_MARGIN * 5.0


def test_scheduled_tokens_are_work_up_to_what_is_open() -> None:
    """A prompt of 10,000 tokens may be computed twice; what decodes for no one comes to an end."""
    watch, now = StepWatch(), 100.0
    watch.read((core(0, now),), now, teaches=True)
    seen = []
    for step in range(1, 31):
        now += 1.0
        watch.read((core(step, now, tokens=1000 * step),), now, teaches=True)
        seen.append(watch.is_computing(now, 100.0, 10_000))
    assert seen == [True] * 21 + [False] * 9  # counted from the first reading of the silence
    assert not watch.is_computing(now + 10, now, 10_000)  # and only while they move


def test_a_core_that_is_another_process_begins_anew() -> None:
    """Its counts are lower; nothing is computed by that."""
    watch = StepWatch()
    watch.read((core(500, 100.0, tokens=9000),), 100.0, teaches=True)
    watch.read((core(1, 101.0, tokens=10),), 101.0, teaches=True)
    assert not watch.is_computing(101.0, 100.0, 10_000)


# --- in the verdict ---


def learned() -> Pod:
    """A served engine whose gaps are known, and whose core reports its steps."""
    pod = Pod(Settings(engine="http://engine", coefficients="measured.json")).served()
    for number in range(12):
        pod.request()
        pod.steps = (core(number + 1, pod.now + 0.5),)
        pod.tick()
        pod.deliver()
        pod.settle()
    pod.tick()
    return pod


def test_a_standing_core_is_not_ready_within_seconds() -> None:
    """Before the silence alone would say so; and no sooner killed than by silence."""
    pod = learned()
    pod.canaries = "starved"
    pod.request(tokens=40_000)  # of which silence may take half a minute
    pod.steps = (core(100, pod.now),)
    began = pod.now
    while pod.tick() != "suspect":
        assert pod.now < began + 60
    assert pod.now - began <= STEP_FLOOR_S + 1
    assert pod.control.health.verdict.evidence["core_stands"] and "begun no step" in pod.control.health.verdict.detail
    while pod.tick() != "stalled":
        assert pod.now < began + 200
    assert pod.now - began > pod.control.health.progress.limits.kill


def test_a_chunked_prefill_of_200_s_stays_ready() -> None:
    """Its chunks are steps with tokens: no doubt, though every canary waits behind it."""
    pod = learned()
    pod.canaries = "starved"
    pod.request(tokens=40_000)
    began, seen = pod.now, set()
    for chunk in range(400):
        pod.steps = (core(100 + chunk, pod.now + 0.5, tokens=20_000 + 100 * chunk),)
        seen.add(pod.tick())
    assert pod.now - began == 200 and not seen & {"suspect", "stalled"}


def test_a_canary_that_waited_behind_a_prefill_proves_nothing() -> None:
    """The client leaves amid it: the idle engine is neither killed nor doubted for canaries that starved before."""
    pod = learned()
    pod.canaries = "starved"
    pod.request(tokens=40_000)
    for chunk in range(240):
        pod.steps = (core(100 + chunk, pod.now + 0.5, tokens=20_000 + 100 * chunk),)
        pod.tick()
    assert pod.sent is None or pod.now - pod.sent[0] > 20
    pod.settle("client_cancelled")
    pod.steps, pod.canaries = (core(500, pod.now, running=0),), "ok"
    assert {pod.tick() for _ in range(20)} == {"idle"}


def test_the_same_without_the_plug_in_is_a_doubt() -> None:
    """Silence beyond what is allowed, on a machine far slower than its coefficients: what the steps are worth."""
    pod = learned()
    pod.canaries, pod.steps = "starved", None
    pod.request(tokens=40_000)
    assert {"suspect", "stalled"} <= {pod.tick() for _ in range(400)}


def test_steps_of_old_say_nothing() -> None:
    """The plug-in is gone: what it said last is forgotten."""
    pod = learned()
    pod.request()
    pod.deliver()
    pod.steps = (core(100, pod.now),)
    pod.tick()
    pod.steps = None
    pod.tick()
    assert pod.control.health.evidence.step_age is None


def test_a_standing_core_alone_kills_no_sooner() -> None:
    """Silent for long within what is allowed: not ready, and only a proof of half a minute in that step kills."""
    world = World().started()
    world.work_since = world.progress_at = world.now

    def seen(step: float) -> Evidence:
        age = world.now + 0.5 - (world.progress_at or 0.0)
        work = evidence(world.now + 0.5, age=age, at=world.progress_at, allowed=200.0)
        return replace(work, kill_after=200.0, stands=step > 6, step_age=step)

    while world.now < (world.progress_at or 0.0) + 100:
        assert world.tick(evidence=seen(0.5)).state in ("progressing", "quiet")
    began = world.now
    world.canary_ends("starved")
    while world.now < began + 20:
        world.tick(evidence=seen(world.now - began), proven_after=30.0)
    assert world.memory.state == "suspect"
    while world.tick(evidence=seen(world.now - began), proven_after=30.0).state == "suspect":
        assert world.now < began + 60
    assert world.memory.state == "stalled" and 30 <= world.now - began <= 32
