"""How many CPUs this process may use.

The container's quota counts: libraries that ask the host start one thread per core of the whole machine, which then
wait for one another.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")


def quota(root: Path = CGROUP_ROOT) -> int:
    """CPUs, at least 1: affinity mask or quota (v2 `cpu.max`, v1 `cpu.cfs_quota_us`) rounded up, the smaller one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    v2 = _read(root / "cpu.max").partition(" ")[::2]
    v1 = _read(root / "cpu" / "cpu.cfs_quota_us"), _read(root / "cpu" / "cpu.cfs_period_us")
    for quota_us, period_us in (v2, v1):
        if quota_us.isdigit() and period_us.isdigit() and int(period_us):  # else `max`, -1 or no file: no quota
            allowed = min(allowed, math.ceil(int(quota_us) / int(period_us)))
    return max(1, allowed)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
