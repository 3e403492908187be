"""What outlives the sidecar's own process: kept whole, believed only where it fits, and never a reason to kill."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.control import saved_state
from sidecar.control.saved_state import SavedState, StateOrigin, StateRejected
from sidecar.control.state import ControlState
from sidecar.control.state_dir import StateDir
from sidecar.control.state_store import MAX_STATE_BYTES, RESUME, STATE_FILE, StateStore
from sidecar.events import CanaryResult
from sidecar.health import kill_policy
from sidecar.health.latency_model import LatencyModel
from sidecar.health.monitor import TICK_S, TickReadings
from sidecar.health.probes import ProbeState, passes
from sidecar.load import cost_model, drift
from sidecar.readings import Absent
from sidecar.settings import Settings
from sidecar.signals.listening_socket import listening_inodes, read_boot_id

HERE = StateOrigin("boot-1", "http://127.0.0.1:8000", "default", (4711,))


def kept() -> SavedState:
    learned = LatencyModel(answers=30)
    for n in range(30):
        learned.first_token(0.5 + n / 100, 0.25)
    policy = kill_policy.KillState(
        state="stalled",
        stalled_at=9.0,
        killed_at=10.5,
        standing=True,
        owed=8,
        kills=(("no_progress", 2), ("gpu_fault", 1)),
    )
    drifted = drift.DriftState(
        "slower", 0.1, 40, drift.Cusum(1.5, 0.0, 3), drift.Cusum(), {"4/0": drift.Baseline(9, -0.1)}
    )
    return SavedState(
        learned,
        (0.2, 0.3),
        True,
        1,
        stalled=True,
        allowed=31.5,
        orders={},
        fleet=policy,
        canaries_pass=True,
        drift=drifted,
    )


def file_of(it: SavedState, now: float = 100.0, place: StateOrigin = HERE) -> Any:
    return json.loads(json.dumps(saved_state.with_origin(saved_state.dump(it, now), place)))


def test_what_is_kept_comes_back_whole() -> None:
    """Every field, through JSON: what was learned with its bounds, the kill state, what is of one process."""
    found, same = saved_state.load(file_of(kept()), HERE, 110.0)
    assert same and found == kept()
    assert found.learned.__class__ is LatencyModel and saved_state.to_plain(LatencyModel()) == saved_state.to_plain(
        saved_state.from_plain(LatencyModel, saved_state.to_plain(LatencyModel()))
    )


def test_another_process_of_the_engine_shares_only_what_was_learned() -> None:
    """Other listening sockets, or none that can be seen: not the same process."""
    for listener in ((4712,), (), (4711, 4712)):
        assert saved_state.load(file_of(kept()), replace(HERE, listener=listener), 110.0) == (kept(), False)


def file_of_version_3(it: SavedState, now: float = 100.0) -> Any:
    """As the sidecar wrote it before kills had reasons, during a stall after two useless restarts of three."""
    raw = file_of(it, now)
    for new in ("kills", "owed", "credited", "restarted"):
        del raw["kept"]["fleet"][new]
    raw["kept"]["fleet"] |= {"kills": 2, "kills_total": 3, "restarted_at": 20.0, "served_at": 30.5, "counted": True}
    raw["kept"]["fleet"]["useless"] = 2
    del raw["kept"]["canaries_pass"]
    for new in ("answers", "concurrent", "one_by_one", "token_times", "routes", "measured_to", "start_seconds"):
        del raw["kept"]["learned"][new]
    return raw | {"version": 3}


def test_a_file_of_the_version_before_is_read() -> None:
    """Its kills are of no known reason, its useless restarts are not paid for; everything else is as it was."""
    found, same = saved_state.load(file_of_version_3(kept()), HERE, 110.0)
    fleet = replace(kept().fleet, owed=12, kills=(("other", 3),), restarted=True)
    assert same and found == replace(kept(), fleet=fleet, learned=replace(kept().learned, fitted_at=-1))
    none = file_of_version_3(kept())
    none["kept"]["fleet"]["kills_total"] = 0
    assert saved_state.load(none, HERE, 110.0)[0].fleet.kills == ()


def changed(path: str, value: Any) -> Callable[[Any], None]:
    def change(raw: Any) -> None:
        *parents, last = path.split(".")
        for name in parents:
            raw = raw[name]
        raw[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed("version", 0), "another version"),
        (changed("place.boot", "boot-0"), "earlier boot"),
        (changed("place.engine", "http://127.0.0.1:9"), "another engine"),
        (changed("place.coefficients", "measured"), "other coefficients"),
        (changed("at", 111.0), "old"),
        (changed("at", 110.0 - saved_state.MAX_STATE_AGE_S - 1), "3601 s old"),
        (changed("at", True), "damaged"),
        (changed("kept.served", 1), "damaged"),
        (changed("kept.allowed", float("nan")), "damaged"),
        (changed("kept.allowed", None), "damaged"),
        (changed("kept.more", 1), "damaged"),
        (changed("kept.canary_seconds", ["x"]), "damaged"),
        (changed("kept.canary_seconds", [0.1] * 20_000), "damaged"),
        (changed("kept.fleet.state", "happy"), "damaged"),
        (changed("kept.fleet.handover", "x" * 10_000), "damaged"),
        (changed("kept.fleet.kills", [["x" * 10_000, 1]]), "damaged"),
        (changed("kept.fleet.kills", [["no_progress", 1]] * 10_000), "damaged"),
        (changed("kept.learned", []), "damaged"),
        (changed("kept.learned.prefills", [[1.0, 2.0, 3.0]]), "damaged"),
        (changed("kept.allowed", 10**400), "damaged"),
        (changed("place.listener", None), "damaged"),
    ],
)
def test_what_does_not_fit_is_not_believed(change: Callable[[Any], None], words: str) -> None:
    """The error gives the reason, in words for the log."""
    raw = file_of(kept())
    change(raw)
    with pytest.raises(StateRejected, match=words):
        saved_state.load(raw, HERE, 110.0)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200)
@given(where=st.integers(0, 10_000), value=values, write=st.sampled_from((file_of, file_of_version_3)))
def test_a_damaged_file_raises_nothing_but_unfit(where: int, value: Any, write: Callable[[SavedState], Any]) -> None:
    """Any one value of the file replaced by anything: it is believed whole, or not at all."""
    raw = {"file": write(kept())}
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, item in list(node.items() if isinstance(node, dict) else enumerate(node)):
            places.append((node, key))
            if isinstance(item, dict | list):
                walk(item)

    walk(raw)
    node, key = places[where % len(places)]
    node[key] = value
    try:
        found, _ = saved_state.load(raw["file"], HERE, 110.0)
    except StateRejected:
        return
    assert isinstance(found, SavedState)


# --- what the control makes of it ---

NOTHING = TickReadings(Absent("x"), Absent("x"), Absent("x"), (), None, "auto")


class Life:
    """A control under a simulated clock whose engine never answers a canary."""

    def __init__(self, at: float = 1000.0) -> None:
        self.now = at
        self.control = ControlState(Settings(), cost_model.Coefficients(), at, at)
        self.states: list[str] = []

    def run(self, seconds: float, *, answers: bool = False) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += TICK_S
            self.control.tick(NOTHING, self.now, self.now)
            self.states.append(self.control.health.verdict.state)
            self._canary(answers)

    def _canary(self, answers: bool) -> None:
        allowed = self.control.health.canary_due()
        if allowed is not None:
            self.control.health.canary_sent(self.now)
            self._due = self.now + (0.1 if answers else allowed)
        since = self.control.health.canaries.since
        if since is not None and self.now >= self._due:
            outcome: Any = "ok" if answers else "starved"
            self.control.canary_ended(CanaryResult(outcome, since, self.now, 8.0))


def probe(it: Life) -> ProbeState:
    return it.control.health.probe_state()


def test_a_restored_stall_is_judged_again() -> None:
    """Unknown and unready but not killed for the whole silence allowed last; then a new canary must fail again."""
    life = Life()
    life.control.restore(kept(), life.now, same=True)
    life.run(30)
    assert set(life.states) == {"unknown"} and life.control.health.verdict.reason == "sidecar_restarted"
    assert passes("live", probe(life)) and passes("startup", probe(life)) and not passes("ready", probe(life))
    life.run(60)
    assert life.states[-1] == "stalled" and life.states.index("stalled") * TICK_S > 31.5
    assert not passes("live", probe(life)), "the order before the restart stands: this is no second kill"
    assert life.control.health.kill_policy.state.kills_total == 3


def test_kills_by_reason_outlive_the_sidecar() -> None:
    """What was counted stays, and the next kill counts by the reason of its verdict."""
    life = Life()
    before = kill_policy.KillState(kills=(("gpu_fault", 2),))
    life.control.restore(replace(kept(), stalled=False, fleet=before), life.now, same=True)
    while life.control.health.verdict.state != "stalled":
        life.run(1)
    reason = life.control.health.verdict.reason
    assert reason in kill_policy.KILL_REASONS[:-1]
    assert life.control.save().fleet.kills == (("gpu_fault", 2), (reason, 1))
    assert life.control.tick(NOTHING, life.now + TICK_S, life.now + TICK_S).kills_by_reason == (
        ("gpu_fault", 2),
        (reason, 1),
    )


def test_a_restored_engine_that_serves_is_believed_at_once() -> None:
    """One canary that passes ends the waiting; nothing is learned again."""
    life = Life()
    life.control.restore(replace(kept(), stalled=False), life.now, same=True)
    life.run(2, answers=True)
    assert life.states[-1] == "idle" and life.control.health.evidence.learned
    assert life.control.health.progress.learned.first_tokens == 30 and passes("ready", probe(life))


def test_another_engine_process_starts_and_its_restart_is_counted() -> None:
    """What it served is not known; what was learned and the kills are."""
    life = Life()
    life.control.restore(kept(), life.now, same=False)
    life.run(1)
    assert set(life.states) == {"starting"} and not passes("startup", probe(life))
    policy = life.control.health.kill_policy.state
    assert policy.restarted and not policy.standing and (policy.owed, policy.kills_total) == (8, 3)
    assert life.control.health.progress.learned.first_tokens == 30


def test_an_engine_that_was_paused_on_purpose_is_still_paused() -> None:
    """The order came through the relay before the sidecar's restart; only its opposite, a token or the cap ends it."""
    life = Life()
    life.control.restore(replace(kept(), stalled=False, orders={"engine_paused": life.now - 30}), life.now, same=True)
    life.run(120)
    assert set(life.states) == {"exempt"} and life.control.health.verdict.reason == "engine_paused"


def test_a_hand_over_outlives_the_sidecar() -> None:
    """Unready from the first moment, although nothing is known yet."""
    life = Life()
    policy = replace(kept().fleet, handover="gpu_needs_reset")
    life.control.restore(replace(kept(), stalled=False, fleet=policy), life.now, same=True)
    life.run(1)
    assert life.states[-1] == "unknown" and not passes("ready", probe(life))


# --- the files ---


def test_a_file_that_does_not_fit_costs_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Garbled, foreign, too large: the start goes on with nothing, and the log gives the reason."""
    state = StateDir(str(tmp_path))
    keeping = StateStore(state, "http://127.0.0.1:1", "default")
    control = ControlState(Settings(), cost_model.Coefficients(), 1.0, 1.0)
    keeping.restore(control, 1.0)
    assert caplog.messages == [], "no file is nothing to log"
    for content in ("{", "[]", '"' + "x" * MAX_STATE_BYTES + '"', "\x00"):
        caplog.clear()
        (tmp_path / STATE_FILE).write_text(content)
        keeping.restore(control, 1.0)
        assert [r.levelno for r in caplog.records] == [logging.WARNING] and "ignoring saved state" in caplog.text
    assert control.health.progress.learned.first_tokens == 0


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    """Through the real file, of this machine's boot; a process that listens on the engine's port is known again."""
    with socket.create_server(("127.0.0.1", 0)) as engine:
        url = f"http://127.0.0.1:{engine.getsockname()[1]}"
        keeping = StateStore(StateDir(str(tmp_path)), url, "default")
        keeping.write(saved_state.dump(kept(), 100.0))
        control = ControlState(Settings(), cost_model.Coefficients(), 101.0, 101.0)
        keeping.restore(control, 101.0)
    assert control.save() == replace(
        kept(), stalled=False, canary_seconds=(0.2, 0.3), allowed=control.health.evidence.allowed
    )
    assert [p.name for p in tmp_path.iterdir()] == [STATE_FILE]


def test_no_password_of_an_address_is_written(tmp_path: Path) -> None:
    """The address is known again by a digest."""
    StateStore(StateDir(str(tmp_path)), "http://user:secret@127.0.0.1:1", "default").write(
        saved_state.dump(kept(), 100.0)
    )
    assert (
        "secret" not in (tmp_path / STATE_FILE).read_text() and "127.0.0.1" not in (tmp_path / STATE_FILE).read_text()
    )


def test_listening_sockets_tell_processes_apart() -> None:
    """The inode of a socket that listens on the port, also by IPv6; none for another machine or a closed port."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
        assert listening_inodes(f"http://127.0.0.1:{port}") == (os.fstat(one.fileno()).st_ino,)
        assert listening_inodes(f"http://192.0.2.1:{port}") == ()
    assert listening_inodes(f"http://127.0.0.1:{port}") == ()
    if socket.has_dualstack_ipv6():
        with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as both:
            assert listening_inodes(f"http://localhost:{both.getsockname()[1]}") == (os.fstat(both.fileno()).st_ino,)
    assert read_boot_id() == read_boot_id() != ""


def test_a_unix_socket_tells_processes_apart(tmp_path: Path) -> None:
    """By the inode of the socket that listens at the path, not of the connections to it."""
    path = str(tmp_path / "engine.sock")
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as client:
        one.bind(path)
        one.listen()
        client.connect(path)
        accepted, _ = one.accept()
        with accepted:
            assert listening_inodes(f"unix:{path}") == (os.fstat(one.fileno()).st_ino,)
    assert listening_inodes(f"unix:{path}") == ()


def test_an_operators_resume_counts_once(tmp_path: Path) -> None:
    """The file `resume` is taken away when it was seen."""
    keeping = StateStore(StateDir(str(tmp_path)), "http://127.0.0.1:1", "default")
    assert not keeping.take_resume()
    (tmp_path / RESUME).touch()
    assert keeping.take_resume() and not keeping.take_resume()
