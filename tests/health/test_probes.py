"""Probes: which verdict fails which probe, and how the exec probe fails open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sidecar.control import state_dir
from sidecar.control.state_dir import StateDir
from sidecar.errors import StartError
from sidecar.events import STATES, State, Verdict
from sidecar.health import probes


def stand(state: State, *, startup: bool = True, draining: bool = False) -> probes.ProbeState:
    return probes.ProbeState(Verdict(state, "because", "in detail", 1.0, 2.0, {"outstanding": 3}), startup, draining)


@pytest.mark.parametrize("state", STATES)
def test_each_verdict_fails_the_probes_of_the_contract_and_no_other(state: State) -> None:
    """Liveness fails for stalled and dead only; readiness for what must get no new work; unknown fails nothing."""
    s = stand(state)
    assert probes.passes("live", s) is (state not in ("stalled", "dead"))
    assert probes.passes("ready", s) is (state in ("idle", "progressing", "quiet", "unknown"))
    assert probes.passes("startup", s) is (state not in ("stalled", "dead")), "a new container waits for a new verdict"
    assert not probes.passes("startup", stand(state, startup=False))
    assert not probes.passes("ready", stand(state, draining=True))


def test_the_state_directory_answers_like_the_endpoints(tmp_path: Path) -> None:
    """verdict.json carries the body and each probe's answer; `stalled` exists only while liveness fails."""
    state = StateDir(str(tmp_path / "deep" / "state"))
    state.write(stand("stalled"), time.time())
    content, age = state_dir.read(str(state.path))
    assert content["verdict"] == "stalled" and content["passes"] == {"live": False, "ready": False, "startup": False}
    assert age is not None and age < 5
    assert (state.path / "stalled").exists()
    state.write(stand("progressing"), time.time())
    assert not (state.path / "stalled").exists()
    assert sorted(p.name for p in state.path.iterdir()) == ["verdict.json"], "no scratch files are left"


@pytest.mark.parametrize(
    ("content", "age", "passed"),
    [
        ({"passes": {"live": False}}, 1.0, False),
        ({"passes": {"live": True}}, 1.0, True),
        ({"passes": {"live": False}}, probes.VERDICT_STALE_S + 1, True),
        ({"passes": {"live": False}}, -probes.VERDICT_STALE_S - 1, True),
        (None, None, True),
        (None, 0.0, True),
        ([], 0.0, True),
        ({"passes": "no"}, 0.0, True),
        ({"passes": {}}, 0.0, True),
    ],
)
def test_the_exec_probe_fails_only_on_a_fresh_word_against_the_engine(
    content: object, age: float | None, passed: bool
) -> None:
    """Missing, stale, from the future, garbled: all pass."""
    assert probes.exec_answer("live", content, age)[0] is passed


def test_the_probe_command_exits_with_the_answer(tmp_path: Path) -> None:
    """`sidecar probe live` as kubelet runs it: 1 on a fresh stalled verdict, 0 on an old one, 0 without a file."""

    def probe(kind: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sidecar", "probe", kind, "--state-dir", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert probe("live").returncode == 0
    StateDir(str(tmp_path)).write(stand("stalled"), time.time())
    failed = probe("live")
    assert failed.returncode == 1 and "stalled" in failed.stdout and "because" in failed.stdout
    old = time.time() - 60
    os.utime(tmp_path / "verdict.json", (old, old))
    assert probe("live").returncode == 0
    assert probe("nonsense").returncode == 2


def test_a_state_directory_that_cannot_be_written_is_a_start_error(tmp_path: Path) -> None:
    """The error names the directory and the remedy."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="emptyDir"):
        StateDir(str(tmp_path / "file" / "below"))


def test_the_verdict_file_is_replaced_whole(tmp_path: Path) -> None:
    """A reader never sees half a file: the content is JSON at every moment of many replacements."""
    state = StateDir(str(tmp_path))
    for n in range(200):
        state.write(stand("stalled" if n % 2 else "idle"), time.time())
        json.loads((tmp_path / "verdict.json").read_text())
