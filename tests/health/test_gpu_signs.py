"""What the GPUs show of a hang: the signs by themselves, and what a verdict makes of them, on simulated clocks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sidecar.health.gpu_signs import NO_GPU_SIGNS, GpuLook, GpuSigns
from sidecar.health.hang_classes import MIN_PROOF_S
from sidecar.health.progress import PROVEN_KILL_S
from sidecar.readings import Absent, GpuActivity, GpuFaults, GpuSample, HangSigns, Value
from sidecar.settings import Settings

from .verdict_pod import LIMITS, SETTINGS, Pod

UNKNOWN = Absent("not here")
WORKING_W = 400.0


def gpu(watts: float = WORKING_W, share: float = 0.9, index: int = 0, slowdowns: tuple[str, ...] = ()) -> GpuSample:
    """A GPU that draws `watts` and runs kernels for a `share` of the time."""
    return GpuSample(
        index,
        "GPU",
        f"GPU-{index}",
        Value(share, 0.0),
        UNKNOWN,
        UNKNOWN,
        Value(watts, 0.0),
        UNKNOWN,
        slowdowns=Value(slowdowns, 0.0),
    )


SPINS = gpu(140.0, 1.0)
IDLE = gpu(90.0, 0.0)


def taught(*gpus: GpuSample, seconds: int = 100) -> GpuSigns:
    """After an engine has delivered for a while; its GPUs drew what these draw."""
    signs = GpuSigns()
    for second in range(seconds):
        signs.teach(Value(gpus, float(second + 1)))
    return signs


def watch(signs: GpuSigns, *gpus: GpuSample, seconds: int = 20, start: float = 200.0) -> GpuLook:
    """The signs after `seconds` in which the GPUs were these."""
    look = NO_GPU_SIGNS
    for second in range(seconds + 1):
        look = signs.read(Value(gpus, start + second), start + second, start)
    return look


def with_activity(one: GpuSample, tensor: float | None, dram: float | None, nvlink: float | None = None) -> GpuSample:
    return replace(one, activity=Value(GpuActivity(tensor, dram, nvlink), 0.0))


@pytest.mark.parametrize(
    ("now", "look"),
    [
        (SPINS, GpuLook("idle", "busy")),
        (IDLE, GpuLook("idle", "idle")),
        (gpu(390.0, 1.0), GpuLook("busy", "busy")),
        (gpu(250.0, 0.5), GpuLook()),
        (gpu(140.0, 1.0, slowdowns=("thermal_hardware",)), GpuLook(None, "busy")),
        (gpu(140.0, 1.0, slowdowns=("power_cap",)), GpuLook("idle", "busy")),
        (replace(SPINS, power=UNKNOWN), GpuLook(None, "busy")),
        (replace(SPINS, utilization=UNKNOWN), GpuLook("idle", None)),
        (with_activity(SPINS, 0.0, 0.001, 1e6), GpuLook("idle", "busy")),
        (with_activity(SPINS, 0.02, None), GpuLook("idle", "working")),
        (with_activity(SPINS, None, 0.3), GpuLook("idle", "working")),
        (with_activity(SPINS, 0.0, 0.0, 1e9), GpuLook("idle", "working")),
    ],
)
def test_signs_of_one_gpu(now: GpuSample, look: GpuLook) -> None:
    """Power against what it drew at work, kernels, and what GPM shows."""
    assert watch(taught(gpu()), now) == look


def test_signs_need_their_time_without_a_break() -> None:
    """Less than twelve seconds, and a gap between readings, are no sign."""
    signs = taught(gpu())
    assert watch(signs, SPINS, seconds=int(MIN_PROOF_S) - 1) == NO_GPU_SIGNS
    assert watch(signs, SPINS, seconds=5, start=240.0) == NO_GPU_SIGNS
    assert watch(signs, SPINS, seconds=20, start=246.0).power == "idle"
    assert signs.read(Absent("NVML hangs"), 300.0, 200.0) == NO_GPU_SIGNS


def test_all_gpus_must_show_it() -> None:
    """One rank that compiles leaves its GPU idle while the others wait for it: no sign of either."""
    first, second = SPINS, replace(SPINS, index=1, uuid="GPU-1")
    signs = taught(gpu(), gpu(index=1))
    assert watch(signs, first, second) == GpuLook("idle", "busy")
    assert watch(signs, first, replace(IDLE, index=1, uuid="GPU-1"), start=300.0) == GpuLook("idle", None)
    assert watch(signs, first, with_activity(second, 0.2, 0.2), start=400.0).activity == "working"


def test_power_says_nothing_before_it_is_known() -> None:
    """A minute of service, and a level that idling stays well below."""
    assert watch(taught(gpu(), seconds=30), SPINS).power is None
    small = taught(gpu(150.0))
    assert watch(small, SPINS).power == "busy" and watch(small, IDLE, start=300.0).power is None
    assert small.level("GPU-0") == 150.0 and small.level("GPU-7") is None


def test_the_level_follows_the_least_that_service_draws() -> None:
    """Hours of prefill do not raise it above decode at a small batch."""
    signs = taught(gpu(700.0), seconds=400)
    for second in range(100):
        signs.teach(Value((gpu(200.0),), 1000.0 + second))
    assert signs.level("GPU-0") == 200.0
    assert watch(signs, gpu(180.0, 1.0), start=1200.0).power == "busy"


def test_an_xid_of_this_silence_is_a_fault() -> None:
    """Not one that ends no context, nor an older one, nor one from before the sidecar looked."""
    signs = GpuSigns()
    before = replace(gpu(), xid_errors=((31, 2),))
    assert signs.read(Value((before,), 10.0), 10.0, 5.0).fault is None
    harmless = replace(gpu(), xid_errors=((31, 2), (63, 9)))
    assert signs.read(Value((harmless,), 11.0), 11.0, 5.0).fault is None
    fatal = replace(gpu(), xid_errors=((31, 3),))
    assert signs.read(Value((fatal,), 12.0), 12.0, 14.0).fault == "xid"
    assert signs.read(Value((fatal,), 13.0), 13.0, None).fault is None
    assert signs.read(Value((fatal,), 60.0), 60.0, 30.0).fault is None


def test_faults_by_the_driver() -> None:
    """A fatal event of this silence, and a GPU that must be reset; one that is to be drained works on."""
    signs = GpuSigns()
    signs.read(Value((gpu(),), 1.0), 1.0, None)
    assert signs.read(Value((replace(gpu(), events=(("recoverable", 1),)),), 2.0), 2.0, 1.0).fault is None
    assert signs.read(Value((replace(gpu(), events=(("fatal", 1),)),), 3.0), 3.0, 1.0).fault == "event"
    for action, fault in (("gpu_reset", "recovery"), ("system_reboot", "recovery"), ("drain_and_reset", None)):
        broken = replace(gpu(), faults=Value(GpuFaults(recovery=action), 0.0))
        assert GpuSigns().read(Value((broken,), 4.0), 4.0, 1.0).fault == fault


# --- verdicts ---


def silent(
    now: GpuSample | None, signs: HangSigns | None = None, *, canaries: str = "", chosen: Settings = SETTINGS
) -> tuple[Pod, float]:
    """An engine that served falls silent with a request open; its GPU does `now`. Returns the seconds to a stall."""
    pod = Pod(chosen)
    pod.gpu = gpu()
    pod.served()
    for _ in range(120):
        pod.request()
        pod.tick()
        pod.deliver()
        pod.settle()
        pod.tick()
    pod.request()
    pod.deliver()
    pod.canaries, pod.signs, began = canaries, signs, pod.now
    pod.gpu = now or replace(gpu(), power=UNKNOWN, utilization=UNKNOWN)
    while pod.state != "stalled" and pod.now < began + 300:
        pod.tick()
    return pod, pod.now - began


def test_a_collective_that_spins_is_proved_by_the_gpus_alone() -> None:
    """Processes that cannot be seen: killed at 30 s, and the verdict says by what."""
    pod, seconds = silent(SPINS)
    seen = pod.control.health.verdict
    assert PROVEN_KILL_S < seconds <= PROVEN_KILL_S + 2
    assert (seen.evidence["proof"], seen.evidence["hang"]) == ("gpus", "collective_spin")
    assert "proved by its GPUs: collective_spin" in seen.detail


def test_gpus_that_spin_for_a_rank_on_another_node_prove_nothing() -> None:
    """--gpus counts those of all nodes: the rank that is waited for may compile where no one looks."""
    pod, seconds = silent(SPINS, chosen=replace(SETTINGS, gpus=16))
    assert seconds > LIMITS.kill and pod.control.health.verdict.evidence["proof"] == "none"


@pytest.mark.parametrize(
    ("signs", "hang"),
    [
        (HangSigns(3.0, cpu="busy", same_stacks=True), "collective_spin"),
        (HangSigns(13.0, cpu="busy", frames="collective", same_stacks=True), "collective_spin"),
    ],
)
def test_processes_that_spin_with_their_gpus(signs: HangSigns, hang: str) -> None:
    """Threads that burn CPU in one place begin no series of their own; the GPUs' signs have lasted."""
    pod, seconds = silent(SPINS, signs)
    assert seconds <= PROVEN_KILL_S + 2 and pod.control.health.verdict.evidence["hang"] == hang


@pytest.mark.parametrize(
    ("signs", "hang"),
    [
        (HangSigns(13.0, cpu="busy", compilers=("ptxas",)), "compiling"),
        (HangSigns(13.0, cpu="busy", frames="compiler"), "compiling"),
        (HangSigns(13.0, cpu="busy", same_stacks=False), "gpu_spin"),
        (HangSigns(13.0, debugged=True), "debugger"),
    ],
)
def test_what_goes_on_in_the_processes_outweighs_idle_power(signs: HangSigns, hang: str) -> None:
    """A compiler, a debugger, and stacks that change: no proof."""
    pod, seconds = silent(SPINS, signs)
    seen = pod.control.health.verdict.evidence
    assert seconds > LIMITS.kill and (seen["proof"], seen["hang"]) == ("none", hang)


def test_a_lost_launch_needs_both() -> None:
    """The engine waits for a GPU that does nothing; where the processes cannot be seen, it may compile."""
    waits = HangSigns(13.0, frozen=False, cpu="none", wait="device", same_stacks=True)
    pod, seconds = silent(IDLE, waits)
    assert seconds <= PROVEN_KILL_S + 2
    assert (pod.control.health.verdict.evidence["proof"], pod.control.health.verdict.evidence["hang"]) == (
        "gpus",
        "device_wait",
    )
    blind, later = silent(IDLE)
    assert later > LIMITS.kill and blind.control.health.verdict.evidence["hang"] == "gpu_idle"
    busy, later = silent(gpu(390.0, 1.0), waits)
    assert later > LIMITS.kill and busy.control.health.verdict.evidence["proof"] == "none"


def test_gpus_at_work_are_not_killed_before_the_cap() -> None:
    """Tensor cores that move: whatever they compute may be delivered. Readiness goes as ever."""
    chosen = Settings(engine="http://engine", silence_floor=4.0, silence_kill=20.0, silence_cap=200.0)
    works, later = silent(with_activity(gpu(300.0, 1.0), 0.3, 0.4), canaries="starved", chosen=chosen)
    usual, seconds = silent(with_activity(gpu(300.0, 1.0), 0.0, 0.0), canaries="starved", chosen=chosen)
    assert seconds < 80 and later > 200
    assert (works.state, usual.state) == ("stalled", "stalled")
    assert works.control.health.verdict.evidence["hang"] == "gpu_working"


def test_a_canary_that_passes_is_stronger_than_the_gpus() -> None:
    """The engine computes, whatever NVML says."""
    assert silent(SPINS, canaries="ok")[0].state != "stalled"


@pytest.mark.parametrize(
    "fault",
    [
        replace(gpu(), xid_errors=((13, 1),)),
        replace(gpu(), events=(("fatal", 1),)),
        replace(gpu(), faults=Value(GpuFaults(recovery="gpu_reset"), 0.0)),
    ],
)
def test_a_fault_of_the_gpu_proves_a_hang(fault: GpuSample) -> None:
    """An XID that ends a context, a fatal event, and a GPU that must be reset."""
    pod, seconds = silent(fault)
    seen = pod.control.health.verdict
    assert seconds <= PROVEN_KILL_S + 2 and (seen.evidence["proof"], seen.evidence["hang"]) == ("gpus", "gpu_fault")


def test_a_gpu_that_must_be_reset_is_for_an_operator() -> None:
    """No restart would help: liveness passes until someone resumes restarts, although the driver still asks."""
    pod, _ = silent(replace(gpu(), faults=Value(GpuFaults(recovery="node_reboot"), 0.0)))
    pod.tick()
    policy = pod.control.health.kill_policy
    assert policy.hold is not None and policy.hold.reason == "node_needs_reboot"
    assert "recovery action" in policy.hold.detail
    policy.resume = True
    for _ in range(60):
        pod.tick()
    assert policy.hold is None
