"""What the control process learned, in a file of the state directory: read once at the start, written every few seconds.

Rules: a file that does not fit is ignored with one line, and never stops a start; what is restored never kills: judgement is withheld
for the silence that was allowed last, and a stall must be found anew.
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
RESUME: Final = "resume"  # an operator touches it: what was handed over is mended
MAX_STATE_BYTES: Final = 256 * 1024
# Ticks between two writes: 10 s.
SAVE_INTERVAL_TICKS: Final = 20

_log = logging.getLogger(__name__)


class StateStore:
    """The memory file of one engine. All methods but `__init__` touch the disk: call them off the event loop."""

    def __init__(self, state: StateDir, engine: str, coefficients: str) -> None:
        self._state = state
        self._engine, self._coefficients = engine, coefficients
        self._name = hashlib.sha256(engine.encode()).hexdigest()[:16]  # an address can hold a password

    def restore(self, control: ControlState, now: float) -> None:
        """Give the control what an earlier process of this sidecar knew, as far as it fits."""
        try:
            raw = self._state.load(STATE_FILE, MAX_STATE_BYTES)
            if raw is None:
                return
            kept, same = saved_state.load(raw, self._place(), now)
        except (OSError, ValueError) as e:
            why = str(e) if isinstance(e, StateRejected) else type(e).__name__
            _log.warning("what an earlier process of the sidecar learned is ignored: it is %s", why)
            return
        control.restore(kept, now, same=same)
        process = "the same engine process" if same else "another engine process"
        _log.info("restored what an earlier process of the sidecar learned; %s is there", process)

    def write(self, content: dict[str, Any]) -> None:
        """Replace the file. `content` is memory.dump's. Raises OSError."""
        self._state.replace(STATE_FILE, saved_state.with_origin(content, self._place()))

    def take_resume(self) -> bool:
        """Whether an operator has touched the file `resume` since the last look; it is removed. Raises OSError."""
        wish = self._state.path / RESUME
        if not wish.exists():
            return False
        wish.unlink(missing_ok=True)
        return True

    def _place(self) -> StateOrigin:
        return StateOrigin(
            listening_socket.boot(), self._name, self._coefficients, listening_socket.listeners(self._engine)
        )
