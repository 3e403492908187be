"""How much memory may be used."""

from __future__ import annotations

from pathlib import Path

from sidecar.relay.handler import body_budget
from sidecar.runtime.memory_limit import memory_limit


def test_the_limit_is_the_cgroups_and_no_more_than_the_machines(tmp_path: Path) -> None:
    """The first file that names a number; `max`, or none at all, is the machine's memory."""
    named, unlimited, huge = (tmp_path / name for name in ("named", "unlimited", "huge"))
    named.write_text("1073741824\n")
    unlimited.write_text("max\n")
    huge.write_text(f"{1 << 63}\n")
    machine = memory_limit(())
    assert machine > 1 << 28
    assert memory_limit((str(tmp_path / "absent"), str(named))) == 1 << 30
    assert memory_limit((str(unlimited),)) == memory_limit((str(huge),)) == machine


def test_bodies_get_a_share_and_each_allowed_one_fits() -> None:
    """One body of the largest allowed size is always taken."""
    assert body_budget(1 << 20, 1) == 2 * body_budget(1 << 20, 2)
    assert body_budget(1 << 60, 8) == 1 << 60
