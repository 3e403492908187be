"""Linux's prctl through ctypes, which Python's library lacks. On other systems nothing is done."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

SET_PDEATHSIG: Final = 1
SET_NAME: Final = 15
CAPBSET_DROP: Final = 24
SET_CHILD_SUBREAPER: Final = 36
SET_NO_NEW_PRIVS: Final = 38
CAP_AMBIENT: Final = 47


def prctl(option: int, value: int | bytes) -> bool:
    """Whether the kernel did it; it does not know every option, and may forbid some."""
    if sys.platform != "linux":
        return False
    given = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    nothing = ctypes.c_ulong(0)  # each argument is a long: as an int its upper half would be whatever was there
    return bool(ctypes.CDLL(None).prctl(ctypes.c_int(option), given, nothing, nothing, nothing) == 0)


def die_with(parent: int) -> None:
    """Have this process killed when its parent, the process `parent`, ends; at once if that has happened."""
    prctl(SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
