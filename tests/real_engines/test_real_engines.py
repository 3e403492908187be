"""What holds beside any engine, beside each of the real ones: the table of engines times the list of cases."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .cases import CASES
from .engines import ENGINES, RealEngine
from .scene import EngineScene

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ENGINES, ids=lambda row: row.id, indirect=True)
async def test_a_case_holds(scene: EngineScene, case: str, note: Callable[[str, str, str], None]) -> None:
    """A case holds beside a real engine, unless the engine's row says why it does not apply."""
    row: RealEngine = scene.row
    if case in row.absent:
        note(row.name, case, f"— {row.absent[case]}")
        return
    try:
        note(row.name, case, await CASES[case](scene))
    except BaseException:
        note(row.name, case, "**failed**")
        raise
