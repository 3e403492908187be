"""The names of the visible GPUs, or of their MIG slices, read once at startup.

NVML can hang, and does not survive a fork. So it runs in a process of its own, which is killed after a timeout.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
from typing import Final

from sidecar.signals.gpu.poller import LIBRARY

# NVML's first call wakes the GPUs up.
NAMES_TIMEOUT_S: Final = 10.0
MAX_GPUS: Final = 64
PROGRAM: Final = """
import pynvml
from sidecar.signals.gpu.sample import find_devices
pynvml.nvmlInit()
for index in range(pynvml.nvmlDeviceGetCount()):
    for device in find_devices(pynvml, lambda call, *args: call(*args), index):
        if device.error:
            raise device.error
        print(device.name)
"""

_log = logging.getLogger(__name__)


def read(timeout_s: float = NAMES_TIMEOUT_S) -> list[str]:
    """One name per GPU, or per slice that this container was given; empty if NVML cannot be read."""
    try:
        ctypes.CDLL(LIBRARY)
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)
    except OSError:
        return []
    except subprocess.SubprocessError as e:
        _log.warning("cannot read the GPU names from NVML (%s); set --gpu", type(e).__name__)
        return []
    return done.stdout.splitlines()[:MAX_GPUS]
