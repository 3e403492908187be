"""The names of the GPUs that are visible here, or of their MIG slices, as signals/gpu/poller.py tells them; asked once at the start.

NVML has hung, and does not outlive a fork, so it is asked in a process of its own, which is killed when it takes too long. Where there
is no driver library, nothing is started.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
from typing import Final

from sidecar.signals.gpu.poller import LIBRARY

NAMES_TIMEOUT_S: Final = 10.0  # seconds; NVML's first call wakes the GPUs up
MAX_GPUS: Final = 64  # GPUs
ASK: Final = """
import pynvml
from sidecar.signals.gpu.sample import found
pynvml.nvmlInit()
for index in range(pynvml.nvmlDeviceGetCount()):
    for device in found(pynvml, lambda call, *args: call(*args), index):
        if device.error:
            raise device.error
        print(device.name)
"""

_log = logging.getLogger(__name__)


def read(patience: float = NAMES_TIMEOUT_S) -> list[str]:
    """NVML's names, one per GPU, or per slice of it that is ours; empty where none can be read."""
    try:
        ctypes.CDLL(LIBRARY)
        done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, timeout=patience, check=True)
    except OSError:
        return []
    except subprocess.SubprocessError as e:
        _log.warning("the GPU's name cannot be read (NVML: %s); --gpu names it", type(e).__name__)
        return []
    return done.stdout.splitlines()[:MAX_GPUS]
