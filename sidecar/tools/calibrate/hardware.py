"""The hardware of an engine on this machine: the GPUs that NVML reports, otherwise the processor."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from sidecar.flags import parse_gpu
from sidecar.signals.gpu import names as gpu_names
from sidecar.signals.listening_socket import host_and_port

LOCAL_HOSTS: Final = ("127.0.0.1", "localhost", "::1")


def gpus_of(engine: str, chosen: str) -> tuple[int, str]:
    """Number and name of the GPUs: from --gpu, otherwise from NVML; (0, "") if none are visible."""
    if chosen:
        return parse_gpu(chosen)
    names = gpu_names.read() if host_and_port(engine)[0] in LOCAL_HOSTS else []
    return len(names), names[0] if names else ""


def text(engine: str, gpus: tuple[int, str]) -> str:
    """A name such as "NVIDIA H100 80GB HBM3" or "2 x AMD EPYC"; empty if the engine is on another machine."""
    count, name = gpus
    if not name:
        if host_and_port(engine)[0] not in LOCAL_HOSTS:
            return ""
        count, name = os.cpu_count() or 1, _processor()
    return name if count == 1 else f"{count} x {name}"


def _processor() -> str:
    try:
        found = re.search(r"(?m)^model name\s*: *(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else "processor"
