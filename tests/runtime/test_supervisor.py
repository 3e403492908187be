"""The supervisor with real processes: what it starts, starts again, passes on, and takes with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator

import psutil
import pytest

from sidecar.runtime.supervisor import MAX_PAUSE_S, MIN_PAUSE_S, STEADY_S, pause_after

from ..waiting import PATIENCE

# Each process prints its name and waits; it also prints the SIGTERM and SIGUSR1 that it receives.
PROGRAM = """
import os, resource, signal, subprocess, sys
from functools import partial
from sidecar.runtime.supervisor import Role, Supervisor

def report(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # one write: lines of processes do not mix

def life(name, end, restarts):
    report(name, "born", os.getpid(), restarts)
    if name == "control":
        if end == "fails":
            return 2
        os.kill(os.getppid(), signal.SIGUSR1)
    while True:
        got = signal.sigwait((signal.SIGTERM, signal.SIGUSR1))
        # Both came while the process had no core; the kernel gives the lower first.
        if got == signal.SIGUSR1 and signal.SIGTERM in signal.sigpending():
            report(name, signal.Signals(signal.sigwait((signal.SIGTERM,))).name)
        report(name, signal.Signals(got).name)
        if got == signal.SIGUSR1 or end == "at once":
            return 0
        if end == "orphan":
            os.system("(sleep 0.2; echo orphan) &")  # its child, whose parent ends at once

def allow_processes(count):
    resource.setrlimit(resource.RLIMIT_NPROC, (count, resource.getrlimit(resource.RLIMIT_NPROC)[1]))

if sys.argv[4]:
    signal.signal(signal.SIGUSR2, lambda *_: allow_processes(resource.getrlimit(resource.RLIMIT_NPROC)[1]))
    allow_processes(int(sys.argv[4]))
    if os.geteuid() == 0:  # no such limit binds root; its saved id lets root send signals
        os.setresuid(54321, 54321, 0)
roles = [Role("control", "control", partial(life, "control", sys.argv[1]), ())]
roles += [Role("relay", f"relay {n}", partial(life, f"relay{n}", sys.argv[2]), ()) for n in range(2)]
sys.exit(Supervisor(roles, float(sys.argv[3])).run())
"""


class Program:
    """The program under way, and what its processes printed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.printed: list[str] = []

    async def wait_for(self, beginning: str) -> list[str]:
        """The words of the next line that begins so."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            while line := (await self.process.stdout.readline()).decode():
                self.printed.append(line)
                if line.startswith(beginning):
                    return line.split()
        raise AssertionError(f"never printed {beginning!r}: {self.printed}")

    async def ended(self) -> int:
        async with asyncio.timeout(PATIENCE):
            assert self.process.stdout is not None
            self.printed += (await self.process.stdout.read()).decode().splitlines(keepends=True)
            return await self.process.wait()


@contextlib.asynccontextmanager
async def program(
    control: str = "", relay: str = "at once", grace: float = 20.0, processes: str = ""
) -> AsyncIterator[Program]:
    """`processes`: how many its user may have."""
    # Tests that nohup runs have SIGHUP ignored.
    heeding = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n" + PROGRAM
    command = (sys.executable, "-c", heeding, control, relay, str(grace), processes)
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        yield Program(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_the_first_restart_waits_for_nothing_and_a_crash_loop_for_longer_each_time() -> None:
    """A steady life is followed at once; young deaths double the pause up to its bound."""
    assert pause_after(STEADY_S, MAX_PAUSE_S) == 0.0
    pauses = [MIN_PAUSE_S]
    for _ in range(10):
        pauses.append(pause_after(0.1, pauses[-1]))
    assert pause_after(0.1, 0.0) == MIN_PAUSE_S
    assert pauses[:3] == [MIN_PAUSE_S, 2 * MIN_PAUSE_S, 4 * MIN_PAUSE_S] and pauses[-1] == MAX_PAUSE_S


async def test_a_start_that_fails_ends_with_its_code_and_starts_nothing_else() -> None:
    """A control process that cannot start is not started again; no one else is started."""
    async with program(control="fails") as p:
        assert await p.ended() == 2
    assert [line.split()[0] for line in p.printed] == ["control"]


@pytest.mark.parametrize("name", ["control", "relay1"])
async def test_a_process_that_is_killed_is_started_again_and_no_one_else_notices(name: str) -> None:
    """kill -9: the next life knows how often; SIGTERM then ends all with 0."""
    async with program() as p:
        pids = {who: int((await p.wait_for(f"{who} born"))[2]) for who in ("control",)}
        for _ in range(2):
            who, _, pid, _ = await p.wait_for("relay")
            pids[who] = int(pid)
        os.kill(pids[name], signal.SIGKILL)
        assert (await p.wait_for(f"{name} born"))[3] == "1"
        p.process.terminate()
        assert await p.ended() == 0
    assert len([line for line in p.printed if " born " in line]) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
async def test_control_ends_after_the_last_relay(number: signal.Signals) -> None:
    """SIGTERM goes to control and relays at once; SIGUSR1 to control when the relays are gone.

    A terminal that closes sends SIGHUP to all processes: the relays finish their streams first.
    """
    async with program() as p:
        pids = [int((await p.wait_for("relay"))[2]) for _ in range(2)]
        for pid in (*pids, p.process.pid) if number == signal.SIGHUP else (p.process.pid,):
            os.kill(pid, number)
        assert await p.ended() == 0
    ends = [line.split() for line in p.printed if "SIG" in line]
    assert ["control", "SIGTERM"] in ends and ["relay0", "SIGTERM"] in ends and ["relay1", "SIGTERM"] in ends
    assert ends[-1] == ["control", "SIGUSR1"]


async def test_a_hangup_that_nohup_has_ignored_ends_nothing() -> None:
    """It is followed by SIGTERM, which does."""
    command = (sys.executable, "-c", "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + PROGRAM)
    process = await asyncio.create_subprocess_exec(
        *(*command, "", "at once", "20", ""), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    p = Program(process)
    for _ in range(2):
        relay = int((await p.wait_for("relay"))[2])
    process.send_signal(signal.SIGHUP)
    os.kill(relay, signal.SIGKILL)
    await p.wait_for("relay")  # it is started again, as nothing ends
    process.terminate()
    assert await p.ended() == 0


async def test_a_control_that_dies_in_the_drain_is_replaced_and_drains_too() -> None:
    """kill -9 of control while relays drain: the next one receives the SIGTERM that was sent before, too."""
    async with program(relay="never") as p:
        control = int((await p.wait_for("control born"))[2])
        relays = [int((await p.wait_for("relay"))[2]) for _ in range(2)]
        p.process.terminate()
        await p.wait_for("control SIGTERM")
        os.kill(control, signal.SIGKILL)
        await p.wait_for("control born")
        await p.wait_for("control SIGTERM")
        for pid in relays:
            os.kill(pid, signal.SIGUSR1)
        assert await p.ended() == 0


async def test_the_drain_has_an_end() -> None:
    """What still lives when the grace is over is killed, and the exit code shows it."""
    async with program(relay="never", grace=0.5) as p:
        for _ in range(2):
            await p.wait_for("relay")
        p.process.terminate()
        assert await p.ended() == 1


async def test_children_die_with_their_supervisor() -> None:
    """kill -9 of the first process leaves nothing behind."""
    async with program() as p:
        await p.wait_for("control born")
        for _ in range(2):
            await p.wait_for("relay")
        children = psutil.Process(p.process.pid).children()
        p.process.kill()
        await p.ended()
        gone, alive = await asyncio.to_thread(psutil.wait_procs, children, 30)
    assert len(gone) == 3 and not alive


async def test_orphans_are_reaped() -> None:
    """A grandchild whose parent ended comes to the supervisor, which leaves no zombie."""
    async with program(relay="orphan") as p:
        await p.wait_for("control born")
        relay = int((await p.wait_for("relay"))[2])
        await p.wait_for("relay")
        os.kill(relay, signal.SIGTERM)
        await p.wait_for("orphan")
        root = psutil.Process(p.process.pid)
        async with asyncio.timeout(PATIENCE):
            while len(root.children()) > 3:  # noqa: ASYNC110  the kernel has no event for it
                await asyncio.sleep(0.05)


async def test_a_fork_that_fails_is_tried_again() -> None:
    """Without a process left for it nothing ends: control is started once there is one, and counts no restart."""
    async with program(processes="1") as p:
        await p.wait_for("cannot start control (Resource temporarily unavailable); trying again")
        p.process.send_signal(signal.SIGUSR2)
        assert (await p.wait_for("control born"))[3] == "0"
        for _ in range(2):
            await p.wait_for("relay")
        p.process.terminate()
        assert await p.ended() == 0
    assert sum(line.startswith("cannot start control") for line in p.printed) == 1
