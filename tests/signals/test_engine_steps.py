"""The steps of an engine core, written by the plug-in in a real process and read by the sidecar."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from sidecar.launch import engine_plugin
from sidecar.readings import Absent, CoreSteps, Value
from sidecar.runtime.plugin_folders import PLUGIN_FOLDER, STEPS_FOLDER
from sidecar.signals.engine_steps import FORM, MAGIC, EngineSteps, parse

# A scheduler with the methods and fields of vLLM's, wrapped as vLLM's is; it does what it is told line by line.
CORE = """
import sys
from types import SimpleNamespace
from sidecar_vllm import steps
class Scheduler:
    def __init__(self): self.running, self.waiting, self.deferred = [], [], []
    def get_request_counts(self): return len(self.running), len(self.waiting) + len(self.deferred)
    def schedule(self, throttle=False):
        self.running += self.waiting; self.waiting = []
        return SimpleNamespace(total_num_scheduled_tokens=int(tokens))
    def update_from_output(self, scheduled, outputs): self.running = []; return {}
    def finish_requests(self, ids, status): self.running = []; return []
steps.wrap(Scheduler, steps.StepWriter(steps.PLUGIN, print, steps.count, steps.has_no_request))
core = Scheduler()
print("ready", flush=True)
for line in sys.stdin:
    what, _, tokens = line.strip().partition(" ")
    if what == "ask": core.waiting.append("request")
    if what == "defer": core.deferred.append("request")
    if what == "break": core.get_request_counts = None
    if what == "step": core.schedule()
    if what == "end": core.update_from_output(None, None)
    if what == "abort": core.finish_requests([], None)
    print(what, flush=True)
"""


class Core:
    """A process that steps as it is told."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said = [self.read()]

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, *lines: str) -> None:
        assert self.process.stdin is not None
        for line in lines:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            self.said.append(self.read())


Start = Callable[[Path], Core]


@pytest.fixture
def start() -> Iterator[Start]:
    """A function: starts a core with the plug-in that lies in a state directory."""
    with ExitStack() as stack:

        def run(state: Path) -> Core:
            env = os.environ | {"PYTHONPATH": str(state / PLUGIN_FOLDER)}
            pipe = subprocess.PIPE
            process = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", CORE], env=env, stdin=pipe, stdout=pipe, text=True)
            )
            stack.callback(process.kill)
            return Core(process)

        yield run
        for file in Path("/dev/shm").glob("sidecar-steps-*"):
            with suppress(OSError):
                if not Path(f"/proc/{file.name.rpartition('-')[2]}").exists():
                    file.unlink()


def state_directory(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    assert engine_plugin.write(str(folder))
    return folder


def cores(reader: EngineSteps) -> tuple[CoreSteps, ...]:
    reader.refresh()
    found = reader.read()
    return found.value if isinstance(found, Value) else ()


def test_each_step_of_a_prefill_is_seen(tmp_path: Path, start: Start) -> None:
    """Number, tokens and queue of each step; after the last one, that nothing is left, also where it was aborted."""
    state = state_directory(tmp_path / "state")
    core, reader = start(state), EngineSteps(state)
    assert cores(reader) == ()  # nothing before its first step
    core.tell("ask", "step 2048")
    before = time.monotonic()
    [first] = cores(reader)
    assert (first.pid, first.steps, first.tokens, first.last_tokens) == (core.process.pid, 1, 2048, 2048)
    assert (first.running, first.waiting) == (1, 0) and 0 <= before - first.at < 60
    core.tell("ask", "step 512")
    [second] = cores(reader)
    assert (second.steps, second.tokens, second.last_tokens, second.running) == (2, 2560, 512, 2)
    assert second.at > first.at
    core.tell("end")
    [last] = cores(reader)
    assert (last.steps, last.running, last.waiting) == (2, 0, 0)
    core.tell("ask", "step 5", "abort")
    [aborted] = cores(reader)
    assert (aborted.steps, aborted.running) == (3, 0)


def test_a_request_in_any_queue_of_the_scheduler_is_one(tmp_path: Path, start: Start) -> None:
    """One that waits for its grammar or its KV cache lies in a queue of its own: the core has not come to rest."""
    state = state_directory(tmp_path / "state")
    core, reader = start(state), EngineSteps(state)
    core.tell("ask", "step 7", "defer", "end")
    assert [(each.steps, each.running) for each in cores(reader)] == [(1, 1)]
    core.tell("step 0", "end")
    assert [(each.steps, each.running, each.waiting) for each in cores(reader)] == [(2, 0, 1)]


def test_a_core_that_ended_has_no_steps(tmp_path: Path, start: Start) -> None:
    """Also one that was killed: the lock went with it. One that is stopped has its last."""
    state = state_directory(tmp_path / "state")
    core, reader = start(state), EngineSteps(state)
    core.tell("ask", "step 7")
    core.process.send_signal(signal.SIGSTOP)
    assert [each.steps for each in cores(reader)] == [1]
    core.process.kill()
    core.process.wait()
    reader.refresh()
    assert isinstance(reader.read(), Absent)
    places = Path("/dev/shm"), state / STEPS_FOLDER  # the second where it is in memory, too
    left = [file for place in places for file in place.glob(f"*-{core.process.pid}")]
    start(state).tell("ask", "step 1")  # the next core removes what it left
    assert len(left) == 1 and not left[0].exists()


def test_of_two_sidecars_each_reads_its_own_engine(tmp_path: Path, start: Start) -> None:
    """On one machine, with one /dev/shm."""
    states = [state_directory(tmp_path / name) for name in ("one", "two")]
    for number, state in enumerate(states):
        start(state).tell("ask", f"step {number}")
    assert [[core.tokens for core in cores(EngineSteps(state))] for state in states] == [[0], [1]]


def test_a_state_directory_in_memory_is_preferred(start: Start) -> None:
    """There the engine's own container needs no other mount."""
    state = Path("/dev/shm") / f"sidecar-test-{os.getpid()}"
    try:
        core = start(state_directory(state))
        core.tell("ask", "step 1")
        assert [path.name.endswith(f"-{core.process.pid}") for path in (state / STEPS_FOLDER).iterdir()] == [True]
        assert len(cores(EngineSteps(state, shm=str(state)))) == 1
    finally:
        subprocess.run(["rm", "-r", str(state)], check=True)


def test_without_the_plug_in_there_is_a_reason(tmp_path: Path) -> None:
    """No folder, no file, no error."""
    reader = EngineSteps(tmp_path)
    reader.refresh()
    assert isinstance(found := reader.read(), Absent) and "plug-in" in found.reason


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * FORM.size,
        FORM.pack(b"SCSTEPS2", 1, 1, 1, 1, 1, 0, 10**9, 1),
        FORM.pack(MAGIC, 1, 2, 1, 1, 1, 0, 10**9, 1),  # half written
        FORM.pack(MAGIC, 1, 1, 2**63, 1, 1, 0, 10**9, 1),
        FORM.pack(MAGIC, 1, 1, 1, 1, 1, 0, 10**12, 1),  # in the future: another clock
    ],
)
def test_other_contents_are_nothing(content: bytes) -> None:
    """Cut short, empty, of another version, half written, impossible, or by another clock."""
    assert parse(content, now=10.0) is None
    assert parse(FORM.pack(MAGIC, 1, 1, 1, 1, 1, 0, 10**9, 1), now=10.0) == CoreSteps(1, 1, 1, 1, 1, 0, 1.0)


def test_a_report_that_fails_fails_no_step(tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plug-in is gone: the engine's log says so once, and the step goes on."""
    state = state_directory(tmp_path / "state")
    core = start(state)
    (state / PLUGIN_FOLDER).rename(state / "moved")
    core.tell("ask", "step 1")
    core.said.append(core.read())  # the line before "step"
    core.tell("step 2", "step 3", "end")
    assert "sees no steps of this engine" in core.said[2]
    assert core.said[3:] == ["step", "step", "step", "end"]


def test_a_scheduler_that_changes_fails_no_step(tmp_path: Path, start: Start) -> None:
    """What the plug-in reads is gone when requests end: said once, and nothing is raised into the engine."""
    core = start(state_directory(tmp_path / "state"))
    core.tell("ask", "step 1", "break", "end")
    core.said.append(core.read())
    core.tell("step 2", "abort")
    assert "sees no steps of this engine" in core.said[4]
    assert core.said[5:] == ["end", "step", "abort"]
