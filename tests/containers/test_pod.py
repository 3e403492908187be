"""The printed manifest, played with real containers: what a frozen engine, a lost sidecar and no CPU lead to."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from .pods import ADMIN, PATIENCE_S, RELAY, Pod, wait_for

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1500)]

ENGINE = 8000
MIB = 1 << 20
LARGE_BYTES, LARGE_BODIES = 200 * 10**6, 6
AWAY_S = 30.0  # three times the age at which the verdict's file counts as old
STARVED_S = 20.0
CPU_PERIOD_US = 100_000


class Load(threading.Thread):
    """One completion after the other, until it is stopped; counts statuses, and errors by their type."""

    def __init__(self, pod: Pod) -> None:
        super().__init__()
        self.seen: Counter[int | str] = Counter()
        self._pod = pod
        self._ends = threading.Event()

    def run(self) -> None:
        while not self._ends.is_set():
            try:
                self.seen[self._pod.complete()] += 1
            except (OSError, http.client.HTTPException) as e:
                self.seen[type(e).__name__] += 1

    def stop(self) -> Counter[int | str]:
        self._ends.set()
        self.join()
        return self.seen


def test_a_frozen_engine_is_restarted_and_serves(pod: Pod) -> None:
    """It hangs silently with a stream open: the printed probe fails, the container restarts, no request hangs."""
    before, sidecar = pod.pid("engine"), pod.pid("sidecar")
    assert {pod.complete() for _ in range(15)} == {200}, "ten first tokens, after which the silence allowed is short"
    assert pod.is_alive()
    with contextlib.closing(pod.stream(100_000)) as stream:
        answer = stream.getresponse()
        assert answer.status == 200 and answer.readline()
        assert pod.ask(ENGINE, "POST", "/faults", {"kind": "freeze"})[0] == 200
        hang(pod, before, answer)
    wait_for(pod.is_serving, "the new engine to serve")
    assert pod.is_alive() and pod.pid("sidecar") == sidecar, "one kill for one hang, and the sidecar stayed"


def hang(pod: Pod, before: int, answer: http.client.HTTPResponse) -> None:
    """What kubelet does with a hang, until the engine is another process and the stream has ended."""
    failures = 0
    deadline = time.monotonic() + PATIENCE_S
    while failures < pod.liveness["failureThreshold"]:
        assert time.monotonic() < deadline, f"a frozen engine passes its probe; verdict {pod.verdict()}"
        failures = 0 if pod.is_alive() else failures + 1
        time.sleep(pod.liveness["periodSeconds"])
    assert pod.verdict() == "stalled"
    pod.kill("engine")
    pod.restarted("engine", before)
    ended(answer)


def ended(answer: http.client.HTTPResponse) -> None:
    """A stream that was open ends, with an error or without; a timeout of its socket would be a hang."""
    try:
        while answer.read(MIB):
            pass
    except TimeoutError:
        raise AssertionError("the request hangs") from None
    except (OSError, http.client.HTTPException):
        pass


def test_a_sidecar_that_is_away_kills_no_engine(pod: Pod) -> None:
    """Frozen for 30 s and then killed: the engine's printed probe passes at every look, and serving comes back."""
    engine, sidecar = pod.pid("engine"), pod.pid("sidecar")
    frozen = pod.processes("sidecar")
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    until = time.monotonic() + AWAY_S
    while time.monotonic() < until:
        assert pod.is_alive()
        time.sleep(1.0)
    pod.kill("sidecar")
    pod.restarted("sidecar", sidecar)
    wait_for(pod.is_serving, "the new sidecar to serve")
    assert pod.is_alive() and pod.pid("engine") == engine


def test_a_killed_control_process_costs_no_request(pod: Pod) -> None:
    """kill -9 of control under load: every request gets its 200, and the supervisor starts another one."""
    engine = pod.pid("engine")
    control = control_of(pod)
    load = Load(pod)
    load.start()
    try:
        wait_for(lambda: load.seen[200] > 5, "load")
        os.kill(control, signal.SIGKILL)
        wait_for(lambda: control_of(pod) not in (0, control), "another control process")
        wait_for(pod.is_serving, "the new control process to know the engine")
    finally:
        seen = load.stop()
    assert set(seen) == {200}
    assert pod.pid("engine") == engine and pod.is_alive()


def control_of(pod: Pod) -> int:
    """The control process, which serves /healthz and says its number there; 0 while there is none."""
    try:
        inside = json.loads(pod.ask(ADMIN, "GET", "/healthz")[1])["pid"]
    except (OSError, http.client.HTTPException):
        return 0
    return next((pid for pid in pod.processes("sidecar") if number_within(pid) == inside), 0)


def number_within(pid: int) -> int:
    """A process's number in its container; 0 if it has ended."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return 0
    return int(status["NSpid"].split()[-1])


def test_a_starved_sidecar_suspects_no_engine(pod: Pod) -> None:
    """At 5 % of a CPU under load for 20 s it is slow, and blames the engine for nothing."""
    engine = pod.pid("engine")
    load = Load(pod)
    load.start()
    seen = set()
    try:
        wait_for(lambda: load.seen[200] > 5, "load")
        quota = cpu_quota_file(pod.pid("sidecar"))
        before = quota.read_text()
        quota.write_text(f"{CPU_PERIOD_US * 5 // 100}" + (f" {CPU_PERIOD_US}" if quota.name == "cpu.max" else ""))
        try:
            until = time.monotonic() + STARVED_S
            while time.monotonic() < until:
                seen.add(published(pod))
                assert pod.is_alive()
                time.sleep(0.5)
        finally:
            quota.write_text(before)
    finally:
        counts = load.stop()
    assert counts[200] > 5 and not seen & {"suspect", "stalled", "dead"}, (counts, seen)
    assert pod.pid("engine") == engine


def published(pod: Pod) -> str:
    """The verdict in the file that probes read, as the engine's container sees it."""
    text = pod.podman.must("exec", pod.container("engine"), "cat", "/run/sidecar/verdict.json")
    return str(json.loads(text)["verdict"])


def cgroup(pid: int, controller: str) -> Path:
    """The folder of a process's control group: of this controller in version 1, the only one in version 2."""
    lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    for _, names, path in lines:
        if controller in names.split(","):
            return Path("/sys/fs/cgroup", controller, path.lstrip("/"))
    (path,) = [path for number, _, path in lines if number == "0"]
    return Path("/sys/fs/cgroup", path.lstrip("/"))


def cpu_quota_file(pid: int) -> Path:
    folder = cgroup(pid, "cpu")
    return next(folder / name for name in ("cpu.cfs_quota_us", "cpu.max") if (folder / name).exists())


def test_six_large_uploads_leave_the_relay_alive(pod: Pod) -> None:
    """Six announced bodies of 200 MB at 1 GiB: what is over the budget is refused, and nothing is killed for memory.

    With cgroup v2, memory.oom.group is set as kubelet sets it: one kill would then end the whole container.
    """
    sidecar, memory = pod.pid("sidecar"), cgroup(pod.pid("sidecar"), "memory")
    if (group := memory / "memory.oom.group").exists():
        group.write_text("1")
    processes = pod.processes("sidecar")
    statuses: list[int | str] = []
    threads = [threading.Thread(target=lambda: statuses.append(upload(pod))) for _ in range(LARGE_BODIES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # a quarter of 1 GiB holds one of them; another is let in where the first has gone before it comes
    refused = [status for status in statuses if status in (429, 503)]
    assert len(refused) >= LARGE_BODIES - 2 and set(statuses) - {429, 503} == {200}, statuses
    assert oom_kills(memory) == 0
    assert pod.pid("sidecar") == sidecar and set(processes) <= set(pod.processes("sidecar"))
    wait_for(pod.is_serving, "serving after the uploads")


def upload(pod: Pod) -> int | str:
    """The status of one large request whose length is announced, sent until it is refused.

    A short prompt, and a long member that engines ignore.
    """
    head, tail = f'{{"model": "{pod.model}", "max_tokens": 1, "prompt": "hello", "padding": "'.encode(), b'"}'
    piece = b"words and " * (MIB // 10)
    left = LARGE_BYTES - len(head) - len(tail)
    connection = http.client.HTTPConnection("127.0.0.1", RELAY)
    connection.sock = pod.connect(RELAY)
    connection.sock.settimeout(PATIENCE_S)
    try:
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", str(LARGE_BYTES))
        connection.endheaders(head)
        try:
            while left:
                part = piece[:left]
                connection.send(part)
                left -= len(part)
            connection.send(tail)
        except OSError:
            pass  # refused while it was sent: the answer is there
        return connection.getresponse().status
    except (OSError, http.client.HTTPException) as e:
        return type(e).__name__
    finally:
        connection.close()


def oom_kills(memory: Path) -> int:
    """How often the kernel has killed a process of the group for its memory."""
    file = next(memory / name for name in ("memory.events", "memory.oom_control") if (memory / name).exists())
    return int(dict(line.split() for line in file.read_text().splitlines())["oom_kill"])
