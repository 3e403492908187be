"""How many CPUs this process may use: the cgroup's quota, or the scheduler's affinity mask.

Rules: files are read once, at start; nothing raises. The container's quota counts: libraries that ask the host start
one thread per core of the whole machine, which then wait for one another.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")


def quota(root: Path = CGROUP_ROOT) -> int:
    """CPUs, at least 1: affinity mask or quota (v2 `cpu.max`, v1 `cpu.cfs_quota_us`) rounded up, the smaller one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [limit for limit in (_v2(root / "cpu.max"), _v1(root / "cpu")) if limit is not None]
    return max(1, min([allowed, *limits]))


def _v2(path: Path) -> int | None:
    quota_us, _, period_us = _read(path).partition(" ")
    return _whole(quota_us, period_us)


def _v1(directory: Path) -> int | None:
    return _whole(_read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us"))


def _whole(quota_us: str, period_us: str) -> int | None:
    """CPUs of a quota; None without one (`max`, -1, no file)."""
    if not quota_us.isdigit() or not period_us.isdigit() or int(period_us) == 0:
        return None
    return math.ceil(int(quota_us) / int(period_us))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
