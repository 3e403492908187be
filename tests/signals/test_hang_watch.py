"""Real processes that hang in different ways: each hang is named rightly, only what never ends by itself is proved."""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sidecar.health.hang_classes import MIN_PROOF_S, NO_CLASS, hang_class, is_proof
from sidecar.readings import Absent, Failed, HangSigns, Value
from sidecar.signals.hang_signs import MemoryLook, TreeLook, signs_of
from sidecar.signals.hang_watch import HangWatch, _field
from sidecar.signals.process_state import EngineProcess, ProcessLook, ThreadState

from .victims import Victim, victim

# A process that names itself as vLLM's core does, with a port, and then does `BODY`.
CORE = """
import os, pathlib, queue, socket, subprocess, sys, threading, time
pathlib.Path("/proc/self/comm").write_text("VLLM::EngineCor")
listener = socket.create_server(("127.0.0.1", 0))
def ready(): print(listener.getsockname()[1], flush=True)
BODY
"""
LOCK = "lock = threading.Lock(); lock.acquire(); ready(); lock.acquire()"
SPIN = "ready()\nwhile True: pass"
RECEIVE = """
peer = socket.create_server(("127.0.0.1", 0))
own = socket.create_connection(peer.getsockname())
ready()
own.recv(1)
"""
AWAIT_WORK = "def _process_input_queue():\n  queue.Queue().get()\nready(); _process_input_queue()"
WORKER = """
child = subprocess.Popen([sys.executable, "-c", '''
import pathlib, time
pathlib.Path("/proc/self/comm").write_text("VLLM::Worker")
print("named", flush=True)
time.sleep(1000)
'''], stdout=subprocess.PIPE)
child.stdout.readline()
lock = threading.Lock(); lock.acquire(); ready(); lock.acquire()
"""
LOOK_S = 0.25  # between the looks of these tests: 25 ticks of the clock of CPU time


def core(body: str) -> str:
    return CORE.replace("BODY", body)


async def series(engine: Victim, between: Callable[[], object] = lambda: None, looks: int = 3) -> HangSigns:
    """The signs after some looks; `between` happens after the second."""
    watch = HangWatch(engine.url, LOOK_S)
    for number in range(looks):
        await watch.look()
        if number == 1:
            between()
        await asyncio.sleep(LOOK_S)
    signs = watch.read()
    assert isinstance(signs, Value), signs
    return signs.value


def named(signs: HangSigns) -> str:
    return hang_class(signs).name


async def test_a_lock_is_named_and_proved(py_spy: str) -> None:
    """A main thread that waits for a lock for ever: without CPU time, with the same stack."""
    with victim(program=core(LOCK)) as engine:
        signs = await series(engine)
    assert (named(signs), hang_class(signs).proves) == ("host_lock", True), signs
    assert f"pid {engine.pid}" in signs.where and signs.seconds > LOOK_S


async def test_what_works_has_no_class(py_spy: str) -> None:
    """A process that computes begins its series anew with each look."""
    with victim(program=core(SPIN)) as engine:
        signs = await series(engine)
    assert hang_class(signs) is NO_CLASS and signs.cpu in ("some", "busy") and not is_proof(signs, 0.0)


async def test_a_core_without_work_is_in_no_lock(py_spy: str) -> None:
    """vLLM's core waits so when it is idle, or paused past the sidecar: from the kernel it looks like a lock."""
    with victim(program=core(AWAIT_WORK)) as engine:
        assert hang_class(await series(engine)) is NO_CLASS


async def test_without_stacks_a_lock_is_not_proved() -> None:
    """A wait for the GPU looks the same from the kernel."""
    with victim(program=core(LOCK)) as engine:
        watch = HangWatch(engine.url, locate_py_spy=lambda: None)
        for _ in range(2):
            await watch.look()
            await asyncio.sleep(LOOK_S)
        signs = watch.read()
    assert isinstance(signs, Value) and signs.value.same_stacks is None and hang_class(signs.value) is NO_CLASS


async def test_a_stopped_process_is_proved_without_stacks(py_spy: str) -> None:
    """SIGSTOP of the core."""
    with victim(program=core(SPIN)) as engine:
        os.kill(engine.pid, signal.SIGSTOP)
        signs = await series(engine)
    assert (named(signs), hang_class(signs).proves) == ("stopped", True), signs


async def test_a_debugger_proves_nothing(py_spy: str) -> None:
    """A traced process that stands still goes on when its tracer lets it."""
    with victim(program=core(SPIN)) as engine, traced(engine.pid):
        signs = await series(engine)
    assert (named(signs), hang_class(signs).proves) == ("debugger", False), signs


async def test_a_frozen_control_group_proves_nothing(py_spy: str) -> None:
    """What was frozen is thawed by who froze it."""
    with victim(program=core(SPIN)) as engine, frozen(engine.pid):
        signs = await series(engine)
    assert (named(signs), hang_class(signs).proves) == ("frozen", False), signs


async def test_a_compiler_among_the_children_means_patience(py_spy: str, tmp_path: Path) -> None:
    """Also one that itself waits, while the engine's own threads wait for it in a lock."""
    compiler = tmp_path / "ptxas"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", compiler)
    body = f"subprocess.Popen([{str(compiler)!r}, '100']); " + LOCK
    with victim(program=core(body)) as engine:
        signs = await series(engine)
        with suppress(ProcessLookupError):
            for pid in children(engine.pid):
                os.kill(pid, signal.SIGKILL)
    assert (named(signs), signs.compilers, hang_class(signs).proves) == ("compiling", ("ptxas",), False), signs


async def test_a_lost_worker_is_named(py_spy: str) -> None:
    """A worker is killed while its core waits for it."""
    with victim(program=core(WORKER)) as engine:
        [worker] = children(engine.pid)
        signs = await series(engine, between=lambda: os.kill(worker, signal.SIGKILL))
    assert (named(signs), hang_class(signs).proves) == ("lost_worker", True), signs


async def test_a_wait_for_a_peer_proves_nothing(py_spy: str) -> None:
    """A main thread that receives from a TCP connection."""
    with victim(program=core(RECEIVE)) as engine:
        signs = await series(engine)
    assert (named(signs), hang_class(signs).proves) == ("network_wait", False), signs


async def test_a_collective_that_spins_is_named(py_spy: str, tmp_path: Path) -> None:
    """CPU time in one place, in a collective operation; only the GPU's signs could prove it."""
    module = tmp_path / "distributed_c10d.py"
    module.write_text("def all_reduce():\n    while True: pass\n")
    body = f"sys.path.insert(0, {str(tmp_path)!r}); import distributed_c10d; ready(); distributed_c10d.all_reduce()"
    with victim(program=core(body)) as engine:
        signs = await series(engine)
    assert (named(signs), hang_class(signs).proves) == ("collective_spin", False), signs


async def test_kernels_that_compile_within_the_process_mean_patience(py_spy: str, tmp_path: Path) -> None:
    """Triton calls LLVM in its own process: a core is busy, and the stack stays the same."""
    folder = tmp_path / "triton" / "compiler"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    (folder / "code.py").write_text("def compile():\n    while True: pass\n")
    body = f"sys.path.insert(0, {str(tmp_path)!r}); import triton.compiler.code as c; ready(); c.compile()"
    with victim(program=core(body)) as engine:
        signs = await series(engine)
    assert (named(signs), hang_class(signs).proves) == ("compiling", False), signs


async def test_nothing_is_known_where_no_process_can_be_seen() -> None:
    """An engine elsewhere, or a port where nothing listens, has no signs, with the reason."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    watch = HangWatch(f"http://127.0.0.1:{port}")
    await watch.look()
    signs = watch.read()
    assert isinstance(signs, Absent) and "nothing listens" in signs.reason


async def test_it_looks_only_while_suspect() -> None:
    """At its pace while the engine is suspect; what was seen stays until the doubt is over."""
    watch = HangWatch("http://127.0.0.1:9")
    assert not watch.is_due(10.0, "progressing")
    assert [at for at in range(20, 30) if watch.is_due(at, "suspect")] == [20, 23, 26, 29]
    assert [at for at in range(195, 400) if watch.is_due(at, "suspect")] == [195, 198, 201, 261, 321, 381]  # seldom
    await watch.look()
    seen = watch.read()
    assert not watch.is_due(40.0, "stalled") and watch.read() is seen
    assert not watch.is_due(50.0, "idle") and watch.read() is not seen


# --- what cannot be made here, as records ---

ENGINE = EngineProcess(10, "VLLM::EngineCor", "core", 1)
UNKNOWN = MemoryLook()
WAITS = 'Thread 10 (idle): "MainThread"\n    {}\n'


def tree(at: float, thread: ThreadState, stack: str | Failed, memory: MemoryLook = UNKNOWN, **more: object) -> TreeLook:
    look = ProcessLook(at, thread.state, thread.wchan, 1, 1.0, 0, (thread,), **more)  # type: ignore[arg-type]
    return TreeLook(at, (ENGINE,), {10: look}, {10: stack}, memory)


def signs(thread: ThreadState, stack: str | Failed, memory: MemoryLook = UNKNOWN, **more: object) -> HangSigns:
    first, last = tree(0.0, thread, stack, **more), tree(13.0, thread, stack, memory, **more)
    return signs_of(first, first, last, steady=True)


LOCKED = ThreadState(10, "python", "S", 1.0, "futex_wait_queue", "202 0x7f 0x80")


def test_a_wait_for_the_gpu_is_no_lock() -> None:
    """A GPU is open, and the stack is in a library that may wait for it; the same without a GPU is a lock."""
    stack = WAITS.format("get_output (vllm/v1/worker/gpu_model_runner.py:300)")
    assert named(signs(LOCKED, stack, holds_gpu=True)) == "device_wait"
    assert named(signs(LOCKED, stack, holds_gpu=None)) == "device_wait"
    assert named(signs(LOCKED, stack, holds_gpu=False)) == "host_lock"
    on_host = WAITS.format("acquire (threading.py:300)")
    assert named(signs(LOCKED, on_host, holds_gpu=True)) == "host_lock"


def test_a_call_into_the_driver_is_a_wait_for_the_gpu() -> None:
    """Of any thread, by the file that it waits on; without the GPU's signs it proves nothing."""
    ioctl = ThreadState(10, "python", "S", 1.0, "do_poll", "16 0x5", "/dev/nvidia0")
    found = signs(ioctl, WAITS.format("synchronize (torch/cuda/streams.py:9)"), holds_gpu=True)
    assert named(found) == "device_wait" and not hang_class(found).proves


@pytest.mark.parametrize(
    ("memory", "pressed"),
    [(MemoryLook(0.5, 0), True), (MemoryLook(0.0, 3), True), (MemoryLook(0.0, 0), False), (MemoryLook(), False)],
)
def test_a_want_of_memory_is_no_lock(memory: MemoryLook, pressed: bool) -> None:
    """By the kernel's pressure, or by a process that it killed meanwhile."""
    first, last = (tree(at, LOCKED, WAITS.format("acquire (threading.py:300)"), which, holds_gpu=False)
                   for at, which in ((0.0, MemoryLook(0.0, 0)), (13.0, memory)))  # fmt: skip
    found = named(signs_of(first, first, last, steady=True))
    assert found == ("memory_pressure" if pressed else "host_lock")


def test_pressure_is_read_as_the_kernel_writes_it() -> None:
    """The line of all tasks, over ten seconds."""
    text = "some avg10=3.00 avg60=0.00 avg300=0.00 total=5\nfull avg10=1.50 avg60=0.00 avg300=0.00 total=2\n"
    assert _field(text, "full", "avg10") == 1.5 and _field("", "full", "avg10") is None
    here = Path("/proc/pressure/memory")
    assert not here.exists() or _field(here.read_text(), "full", "avg10") is not None


def test_a_transfer_is_named_by_its_stack() -> None:
    """A KV transfer that waits in a lock for a thread of its library."""
    stack = WAITS.format("wait_for_layer (vllm/distributed/kv_transfer/kv_connector/v1/nixl_connector.py:40)")
    assert named(signs(LOCKED, stack, holds_gpu=False)) == "network_wait"


def test_a_short_or_old_series_is_no_proof() -> None:
    """The signs of a lock count after twelve seconds, and until the next look is late."""
    found = signs(LOCKED, WAITS.format("acquire (threading.py:300)"), holds_gpu=False)
    assert is_proof(found, 1.0) and found.seconds > MIN_PROOF_S
    assert not is_proof(found, 7.0)
    begun = tree(3.0, LOCKED, WAITS.format("acquire (threading.py:300)"), holds_gpu=False)
    assert not is_proof(signs_of(begun, begun, tree(13.0, LOCKED, "", holds_gpu=False), steady=True), 0.0)


# --- what holds a process still ---


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def traced(pid: int) -> Iterator[None]:
    """Stopped by this process as its tracer."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    if libc.ptrace(16, pid, None, None) != 0:  # PTRACE_ATTACH
        pytest.skip(f"no process can be traced here ({os.strerror(ctypes.get_errno())})")
    os.waitpid(pid, 0x40000000)  # __WALL
    try:
        yield
    finally:
        libc.ptrace(17, pid, None, None)  # PTRACE_DETACH


@contextmanager
def frozen(pid: int, *, ends: bool = True) -> Iterator[None]:
    """In a frozen control group of its own, of either version. `ends`: it is killed after that."""
    for root, members, switch, on, off in (
        ("/sys/fs/cgroup/freezer", "cgroup.procs", "freezer.state", "FROZEN", "THAWED"),
        ("/sys/fs/cgroup/unified", "cgroup.procs", "cgroup.freeze", "1", "0"),
        ("/sys/fs/cgroup", "cgroup.procs", "cgroup.freeze", "1", "0"),
    ):
        group = Path(root) / f"sidecar-test-{pid}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if not (group / switch).exists():
                continue
            (group / members).write_text(str(pid))
            (group / switch).write_text(on)
            yield
            return
        finally:
            with suppress(OSError):
                (group / switch).write_text(off)
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL) if ends else (group.parent / members).write_text(str(pid))
            deadline = time.monotonic() + 5
            while group.exists() and time.monotonic() < deadline:
                with suppress(OSError):
                    group.rmdir()
    pytest.skip("no control group can be made and frozen here")
