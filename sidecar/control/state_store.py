"""Saved state in a file of the state directory: read once at the start, written every few seconds.

Rules: a file that does not fit is ignored with one log line and never stops a start. What is restored never kills:
judgement is withheld for the silence that was allowed last, and a stall must be found again.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any, Final

from sidecar.control import saved_state
from sidecar.control.saved_state import StateOrigin, StateRejected
from sidecar.control.state import ControlState
from sidecar.control.state_dir import StateDir
from sidecar.signals import listening_socket

STATE_FILE: Final = "memory.json"
# An operator touches this file to resume automatic restarts.
RESUME: Final = "resume"
MAX_STATE_BYTES: Final = 256 * 1024
# Ticks between two writes: 10 s.
SAVE_INTERVAL_TICKS: Final = 20

_log = logging.getLogger(__name__)


class StateStore:
    """The saved state of one engine. All methods but `__init__` touch the disk: call them off the event loop."""

    def __init__(self, state_dir: StateDir, engine: str, coefficients: str) -> None:
        self._state_dir = state_dir
        self._engine, self._coefficients = engine, coefficients
        self._name = hashlib.sha256(engine.encode()).hexdigest()[:16]  # an address can hold a password

    def restore(self, control: ControlState, now: float) -> None:
        """Restore what an earlier process of the sidecar saved, as far as it fits."""
        try:
            raw = self._state_dir.load(STATE_FILE, MAX_STATE_BYTES)
            if raw is None:
                return
            saved, same = saved_state.load(raw, self._origin(), now)
        except (OSError, ValueError) as e:
            why = str(e) if isinstance(e, StateRejected) else type(e).__name__
            _log.warning("ignoring saved state: %s", why)
            return
        control.restore(saved, now, same=same)
        _log.info("restored saved state; the engine process is %s", "the same" if same else "another one")

    def write(self, content: dict[str, Any]) -> None:
        """Replace the file. `content` is that of `saved_state.dump`. Raises OSError."""
        self._state_dir.replace(STATE_FILE, saved_state.with_origin(content, self._origin()))

    def take_resume(self) -> bool:
        """Remove the file `resume`. Returns True if an operator had touched it. Raises OSError."""
        try:
            (self._state_dir.path / RESUME).unlink()  # at once: a file touched a moment later is the next one
        except FileNotFoundError:
            return False
        return True

    def _origin(self) -> StateOrigin:
        listeners = listening_socket.listening_inodes(self._engine)
        return StateOrigin(listening_socket.read_boot_id(), self._name, self._coefficients, listeners)
