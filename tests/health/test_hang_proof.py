"""A proof from the engine's processes shortens the wait for a kill, and nothing else does; on simulated clocks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sidecar.health.hang_classes import HANG_CLASSES, MAX_WORK_AGE_S, NO_CLASS, HangClass, hang_class
from sidecar.health.progress import PROVEN_KILL_S, SilenceLimits, silence_limits
from sidecar.readings import HangSigns
from sidecar.settings import Settings

from .verdict_pod import LIMITS, SETTINGS, Pod

LOCK = HangSigns(13.0, frozen=False, cpu="none", wait="lock", same_stacks=True, memory="none", where="core (pid 7)")
COMPILES = HangSigns(13.0, frozen=False, cpu="busy", same_stacks=True, compilers=("ptxas",))
INDUCTOR = HangSigns(13.0, frozen=False, cpu="some", frames="compiler")
STANDS = HangSigns(13.0, frozen=False, cpu="none", wait="lock", same_stacks=True, compilers=("ptxas",))
LONG_CAP = replace(SETTINGS, silence_cap=200.0)
BUSY = HangSigns(13.0, frozen=False, cpu="busy", same_stacks=False)


def silent(
    signs: HangSigns | None, *, canaries: str = "", idle: bool = False, settings: Settings = SETTINGS
) -> tuple[Pod, float, list[float]]:
    """A served engine that falls silent with a request open, until it is stalled, for 300 s at most.

    Returns the seconds until then, and those until it was suspect.
    """
    pod = Pod(settings=settings).served()
    for _ in range(12):  # enough to know this engine's gaps
        pod.request()
        pod.tick()
        pod.deliver()
        pod.settle()
    pod.tick()
    if not idle:
        pod.request()
        pod.deliver()
    pod.canaries, pod.signs = canaries, signs
    began, suspected = pod.now, []
    while pod.state != "stalled" and pod.now < began + 300:
        if pod.tick() == "suspect":
            suspected.append(pod.now - began)
    return pod, pod.now - began, suspected


def test_a_proof_kills_at_30_s() -> None:
    """All of it: silence, an unanswered canary, and signs that prove a hang; the verdict and its detail name it."""
    pod, seconds, suspected = silent(LOCK)
    assert PROVEN_KILL_S < seconds <= PROVEN_KILL_S + 2 and suspected[0] < 10
    seen = pod.control.health.verdict
    assert (seen.evidence["proof"], seen.evidence["hang"], seen.evidence["condition"]) == (
        "processes",
        "host_lock",
        "proven",
    )
    assert "proved by its processes, core (pid 7): host_lock" in seen.detail


@pytest.mark.parametrize("signs", [None, STANDS, BUSY])
def test_without_a_proof_everything_stays_as_it_is(signs: HangSigns | None) -> None:
    """Nothing readable, a compiler that does nothing, and threads at work: the usual bound of a kill."""
    pod, seconds, _ = silent(signs)
    assert seconds > LIMITS.kill and pod.control.health.verdict.evidence["proof"] == "none"


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("signs", [COMPILES, INDUCTOR])
def test_a_compiler_at_work_is_waited_for_up_to_the_cap(signs: HangSigns, idle: bool) -> None:
    """Readiness goes as always; liveness holds while it compiles, and no longer than the cap."""
    pod, seconds, suspected = silent(signs, canaries="starved", idle=idle, settings=LONG_CAP)
    _, usual, _ = silent(STANDS, canaries="starved", idle=idle, settings=LONG_CAP)
    assert suspected[0] < 15 and usual < 100 < LONG_CAP.silence_cap < seconds < LONG_CAP.silence_cap + 30
    assert (pod.state, pod.control.health.verdict.evidence["hang"]) == ("stalled", "compiling")


def test_what_was_compiled_is_forgotten() -> None:
    """An engine that hangs once its compiler has ended does not have the cap: the next look shows no compiler."""
    pod, _, _ = silent(COMPILES, canaries="starved", settings=replace(LONG_CAP, silence_cap=900.0))
    assert pod.state == "suspect"
    pod.signs, ended = BUSY, pod.now
    while pod.state != "stalled" and pod.now < ended + 600:
        pod.tick()
    assert pod.now - ended <= MAX_WORK_AGE_S + 2


def test_a_canary_that_passes_is_stronger_than_a_proof() -> None:
    """The engine computes, whatever its processes seem to do."""
    pod, seconds, _ = silent(LOCK, canaries="ok")
    assert pod.state != "stalled" and seconds >= 300


def test_an_idle_engine_is_killed_by_proof_only_once_its_canary_was_lost() -> None:
    """Nothing is outstanding: from the first lost canary on."""
    pod, seconds, _ = silent(LOCK, canaries="starved", idle=True)
    usual, later, _ = silent(None, canaries="starved", idle=True)
    assert (pod.state, usual.state) == ("stalled", "stalled") and PROVEN_KILL_S < seconds < later


def test_a_proof_needs_its_time() -> None:
    """Signs of three seconds are those of any pause."""
    pod, seconds, _ = silent(HangSigns(3.0, frozen=False, cpu="none", wait="lock", same_stacks=True))
    assert seconds > LIMITS.kill and pod.control.health.verdict.evidence["hang"] == "host_lock"


def test_the_proven_bound_is_never_longer_than_the_usual_one() -> None:
    """And never shorter than the floor, which is what any engine may be silent."""
    assert SilenceLimits().proven == PROVEN_KILL_S
    for floor, kill in ((12.0, 75.0), (3.0, 9.0), (40.0, 60.0), (40.0, 10.0)):
        limits = silence_limits(Settings(engine="http://engine", silence_floor=floor, silence_kill=kill))
        assert floor <= limits.proven <= limits.kill


def test_the_table_reads_each_row_before_those_that_it_excludes() -> None:
    """Every row is the answer to its own signs, so none is hidden behind another."""
    for row in HANG_CLASSES:
        cells = {name: getattr(row, name) for name in HangSigns.__slots__ if getattr(row, name, None) is not None}
        if "compilers" in cells:
            cells["compilers"] = ("nvcc",)
        assert hang_class(HangSigns(**({"seconds": 12.0} | cells))) is row, row


@pytest.mark.parametrize(
    "row", [row for row in HANG_CLASSES if not row.is_of_gpu], ids=lambda row: f"{row.name}: {row.text[:40]}"
)
def test_each_class_of_processes_has_its_story(row: HangClass) -> None:
    """Silence with the signs of a row: named; killed at 30 s if it proves. Those of GPUs are in test_gpu_signs.py."""
    cells = {name: getattr(row, name) for name in HangSigns.__slots__ if getattr(row, name, None) is not None}
    if "compilers" in cells:
        cells["compilers"] = ("nvcc",)
    pod, seconds, _ = silent(HangSigns(**({"seconds": 13.0} | cells)))
    seen = pod.control.health.verdict
    assert (pod.state, seen.evidence["hang"]) == ("stalled", row.name)
    assert seen.evidence["proof"] == ("processes" if row.proves else "none")
    assert seconds <= PROVEN_KILL_S + 2 if row.proves else seconds > LIMITS.kill


def test_no_sign_no_class() -> None:
    """What cannot be read proves nothing."""
    assert hang_class(HangSigns(60.0)) is NO_CLASS
