"""What two looks and two dumps of a process become in one line."""

from __future__ import annotations

import pytest

from sidecar.readings import Failed
from sidecar.signals.process_state import (
    EngineProcess,
    ProcessEvidence,
    ProcessLook,
    Role,
    ThreadState,
    classify_role,
    find_symptom,
    innermost_frame,
    summarize,
)

DUMP = """Thread 12 (idle): "MainThread"
    recv (zmq/sugar/socket.py:12)
    run_engine_core (vllm/v1/engine/core.py:700)
Thread 13 (active+gil): "spinner"
    busy_loop (core.py:3)
Thread 14 (idle)
    wait (threading.py:320)"""


def seen(
    *looks: ProcessLook | Failed, name: str = "VLLM::EngineCore", role: Role = "core", stacks: tuple[str, ...] = ()
) -> ProcessEvidence:
    return ProcessEvidence(EngineProcess(12, name, role, 1), looks, stacks)


def look(at: float, state: str = "S", cpu: float = 0.0, wchan: str = "", **threads: float) -> ProcessLook:
    by_thread = tuple(ThreadState(int(tid[1:]), tid, state, used) for tid, used in threads.items())
    return ProcessLook(at, state, wchan, max(1, len(by_thread)), cpu, 1 << 20, by_thread)


def test_a_stopped_process_is_named_with_its_remedy() -> None:
    """State T is read from the last look, whatever came before."""
    one = seen(look(0, "R", 0), look(5, "T", 5))
    assert find_symptom(one)[1].startswith("stopped (T)") and "SIGCONT" in find_symptom(one)[1]


def test_a_spinning_process_is_named_with_the_frame_of_its_busiest_thread() -> None:
    """100 % of a core over both looks is spinning; the thread that used it gives the place, if both dumps agree."""
    looks = look(0, "R", 10, t12=4, t13=6), look(5, "R", 15, t12=4, t13=11)
    assert find_symptom(seen(*looks, stacks=(DUMP, DUMP)))[1] == "spinning at 100% CPU, in busy_loop (core.py:3)"
    other = DUMP.replace("core.py:3", "core.py:4")
    assert find_symptom(seen(*looks, stacks=(other, DUMP)))[1] == "spinning at 100% CPU, last in busy_loop (core.py:3)"
    assert find_symptom(seen(*looks))[1] == "spinning at 100% CPU"


@pytest.mark.parametrize(
    ("wchan", "words"),
    [
        ("futex_wait_queue", "asleep, waiting in a futex (a lock, or another thread)"),
        ("do_epoll_wait", "asleep, waiting in epoll (its event loop)"),
        ("nv_wait_thing", "asleep, waiting in another process"),
        ("uvm_something", "asleep, waiting in uvm_something"),
        ("", "asleep"),
    ],
)
def test_a_sleeping_process_is_named_with_what_it_waits_for(wchan: str, words: str) -> None:
    """No CPU between the looks is sleep; a known kernel wait is explained."""
    assert find_symptom(seen(look(0, wchan=wchan), look(5, wchan=wchan)))[1] == words


def test_a_sleeping_process_shows_its_main_threads_frame() -> None:
    """The main thread's innermost frame is where it hangs."""
    one = seen(look(0, wchan="futex_do_wait"), look(5, wchan="futex_do_wait"), stacks=(DUMP, DUMP))
    assert find_symptom(one)[1].endswith(", in recv (zmq/sugar/socket.py:12)")


def test_uninterruptible_counts_only_in_both_looks() -> None:
    """D for a moment is a disk access; D twice is a driver that does not come back."""
    assert find_symptom(seen(look(0, "D", wchan="nvidia_ioctl"), look(5, "D", wchan="nvidia_ioctl")))[1].startswith(
        "uninterruptible (D) in nvidia_ioctl"
    )
    assert find_symptom(seen(look(0, "D"), look(5, "S")))[1] == "asleep"


def test_one_look_claims_no_cpu_use() -> None:
    """After the first look there is no CPU use yet; a process that has ended or was not examined is described so."""
    assert find_symptom(seen(look(0, "S", wchan="do_epoll_wait")))[1] == "asleep, waiting in epoll (its event loop)"
    assert find_symptom(seen(look(0), Failed("it has ended")))[1] == "it has ended"
    assert find_symptom(seen())[1] == "not examined"


def test_the_summary_names_the_worst_processes_first() -> None:
    """A stopped worker precedes a sleeping core; of sleeping processes only the core is named; others are counted."""
    asleep = look(0), look(5)
    core, api = seen(*asleep), seen(*asleep, name="vllm", role="api")
    worker = seen(look(0, "T"), look(5, "T"), name="VLLM::Worker_TP1", role="worker")
    assert summarize((api, core, worker)).startswith("VLLM::Worker_TP1 (pid 12): stopped (T)")
    assert summarize((api, core, worker)).endswith("; and 2 more")
    assert summarize((api, core)) == "VLLM::EngineCore (pid 12): asleep; and 1 more"
    working = seen(look(0, "R", 0), look(5, "R", 2))
    assert summarize((api, working)).startswith("VLLM::EngineCore (pid 12): working at 40% CPU")
    assert summarize((worker,) * 5).count("stopped (T)") == 3
    assert summarize(()) == "no process of the engine was found"


@pytest.mark.parametrize(
    ("name", "listens", "role"),
    [
        ("VLLM::EngineCor", False, "core"),
        ("VLLM::EngineCore_DP1", False, "core"),
        ("VLLM::Worker_TP0", False, "worker"),
        ("sglang::scheduler_TP0", False, "core"),
        ("vllm", True, "api"),
        ("python3", False, "other"),
        ("llama-server", True, "api"),
    ],
)
def test_roles_follow_from_the_names_of_processes(name: str, listens: bool, role: Role) -> None:
    """vLLM and SGLang name their processes; one with an unknown name is the API if it listens."""
    assert classify_role(name, listens) == role


def test_an_absent_thread_has_no_frame() -> None:
    """Neither an unknown thread nor an empty dump invents a frame."""
    assert innermost_frame(DUMP, 14) == "wait (threading.py:320)"
    assert innermost_frame(DUMP, 99) == "" and innermost_frame("", 12) == ""
