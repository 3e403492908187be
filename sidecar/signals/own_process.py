"""Memory, CPU time, threads and open files of this process. A sample takes about 0.1 ms."""

from __future__ import annotations

import time
from functools import lru_cache

import psutil

from sidecar.readings import Failed, ProcessSample, Reading, Value
from sidecar.runtime import open_files

_process = lru_cache(maxsize=1)(psutil.Process)  # made once: it reads when the process began


def sample(pid: int) -> Reading[ProcessSample]:
    """Resident bytes, CPU seconds so far (user and system) and thread count of `pid`. Never raises."""
    started = time.monotonic()
    try:
        process = _process(pid)
        with process.oneshot():
            cpu = process.cpu_times()
            used = process.memory_info().rss, cpu.user + cpu.system, process.num_threads()
        result = ProcessSample(pid, *used, open_files.count(), open_files.limit())
    except psutil.NoSuchProcess:
        return Failed(f"process {pid} is gone")
    except psutil.AccessDenied:
        return Failed(f"no permission to read process {pid}; run the sidecar as the same user")
    except OSError as e:
        return Failed(f"process {pid} could not be read: {e.strerror}")
    ended = time.monotonic()
    return Value(result, at=ended, seconds=ended - started)
