"""Every hang mode is found with the right reason and every alarm stays silent: real processes, one and two relays.

All selected stories are played first, some of them concurrently; then each test checks its own. `-v` ends with the
matrix as a table. sidecar/tools/scripted_engine/hang_catalogue.py has the expected results, stories.py and
field_stories.py play the rows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from sidecar.tools.scripted_engine import hang_catalogue
from sidecar.tools.scripted_engine.faults import FAULTS
from sidecar.tools.scripted_engine.hang_catalogue import HangCase

from ..nvml_stub.build import build
from . import field_stories, stories
from .conftest import TABLE
from .scene import Scene, Seen, scene
from .stories import Story

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1800)]

# Stories at a time.
CONCURRENT_STORIES = 10
STORIES = {"mode": stories.MODES | field_stories.MODES, "alarm": stories.ALARMS | field_stories.ALARMS}
CASES = {"mode": hang_catalogue.MODES, "alarm": hang_catalogue.ALARMS}


class Row(NamedTuple):
    """One test: a row of the catalogue, its story, and the number of relays."""

    kind: str
    case: HangCase
    story: Story
    relays: int

    def __str__(self) -> str:
        play = getattr(self.story.play, "func", self.story.play)  # of a partial
        name = self.story.name or (self.case.faults[0] if self.case.faults else play.__name__)
        return f"{self.kind}-{self.case.number:02}-{name}[{self.relays} relay{'s' * (self.relays > 1)}]"


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a story: seconds from the fault to the reaction (None for silence), or what was wrong."""

    seconds: float | None = None
    seen: str = ""
    wrong: str = ""


ROWS = [
    Row(kind, case, story, relays)
    for kind, cases in CASES.items()
    for case in cases
    for story in STORIES[kind][case.number]
    for relays in story.relays
]


@pytest.mark.parametrize("row", [pytest.param(row, id=str(row)) for row in ROWS])
def test_the_row_gets_what_is_owed(row: Row, found: dict[str, Found]) -> None:
    """A hang is found as the catalogue says and with its reason; an alarm fails no liveness probe."""
    if found[str(row)].wrong:
        pytest.fail(found[str(row)].wrong, pytrace=False)


def test_every_mode_and_alarm_is_played() -> None:
    """Every row of the catalogue has a story, names faults that exist, and has a reason where one is expected."""
    for kind, cases in CASES.items():
        assert [case.number for case in cases] == list(STORIES[kind]) == list(range(1, len(cases) + 1))
        for case in cases:
            assert set(case.faults) <= set(FAULTS), case
            assert bool(case.reasons) == (case.owed not in ("silence", "ready")), case


# --- playing ---


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, requires: Callable[[str], Path]
) -> dict[str, Found]:
    """The result of each selected row."""
    parameters = [getattr(item, "callspec", Nothing).params for item in request.session.items]
    wanted = [each["row"] for each in parameters if "row" in each]
    folder = tmp_path_factory.mktemp("matrix")
    driver = build(requires("gcc"), folder / "lib") if any(row.story.setting.gpu for row in wanted) else None
    gate = asyncio.Semaphore(CONCURRENT_STORIES)
    results: dict[str, Found] = {}

    async def play(row: Row) -> None:
        async with gate:
            place = folder / str(len(list(folder.iterdir())))
            place.mkdir()
            results[str(row)] = await _played(row, place, driver if row.story.setting.gpu else None)

    await asyncio.gather(*(play(row) for row in wanted if not row.story.alone))
    for row in wanted:
        if row.story.alone:
            await play(row)
    request.config.stash[TABLE] = lines(results)
    return results


class Nothing:
    """What a test without parameters has for a callspec."""

    params: dict[str, Any] = {}  # noqa: RUF012


def lines(results: dict[str, Found]) -> list[str]:
    """The matrix as Markdown."""
    rows = [
        f"| `{name}` | {'-' if f.seconds is None else f'{f.seconds:.1f} s'} | {f.seen or 'silent'} "
        f"| {'wrong' if f.wrong else 'ok'} |"
        for name, f in results.items()
    ]
    return ["| case | found after | seen | |", "|---|---|---|---|", *sorted(rows)]


async def _played(row: Row, folder: Path, driver: Path | None) -> Found:
    """Play one row; failures are reported by its own test."""
    try:
        async with scene(row.story.setting, row.relays, folder, driver) as s:
            await row.story.play(s)
            found = await CHECKS[row.case.owed](s, row.case)
            late = (found.seconds or 0.0) > row.story.within and not found.wrong
            return replace(found, wrong=f"found too late; {s.story()}") if late else found
    except Exception as e:  # noqa: BLE001  one story's failure must not end the others'
        return Found(wrong=f"{type(e).__name__}: {e}")


async def _liveness(s: Scene, case: HangCase) -> Found:
    """/livez fails, and the first failure has the right reason."""
    await s.until(lambda: _dead(s), "a failed liveness probe")
    first = _dead(s)[0]
    return _judged(s, first, first.verdict == "stalled" and first.reason in case.reasons)


async def _readiness(s: Scene, case: HangCase) -> Found:
    """/readyz fails with the right reason, before any liveness probe fails."""
    await s.until(
        lambda: [x for x in s.since() if x.ready != 200 and x.reason in case.reasons] or _dead(s),
        f"unready for {case.reasons}",
    )
    first = next(x for x in s.since() if (x.ready != 200 and x.reason in case.reasons) or x.live != 200)
    return _judged(s, first, first.live == 200)


async def _startup(s: Scene, case: HangCase) -> Found:
    """The verdict stays `starting` with the right reason; /startupz fails, /livez does not."""
    await s.until(lambda: [x for x in s.since() if x.reason in case.reasons], f"the reason {case.reasons}")
    first = next(x for x in s.since() if x.reason in case.reasons)
    startup, _ = await s.sidecar.get("/startupz")
    return _judged(s, first, first.verdict == "starting" and startup == 503 and not _dead(s))


async def _request(s: Scene, case: HangCase) -> Found:
    """The client of the one request gets an error with the right code; the others are served on, and no probe fails."""
    await s.until(lambda: set(case.reasons) & set(s.ended), f"a request that ended with {case.reasons}")
    seconds = time.monotonic() - s.began
    done = s.ended.count("done")
    await s.until(lambda: s.ended.count("done") > done + 3, "others served on")
    calm = all((x.live, x.ready) == (200, 200) for x in s.since())
    return Found(seconds, f"request ended: {case.reasons[0]}", "" if calm else s.story())


async def _report(s: Scene, case: HangCase) -> Found:
    """The log warns with the reason; no probe fails."""
    await s.until(lambda: any(case.reasons[0] in line for line in s.sidecar.log), f"a warning of {case.reasons}")
    calm = all((x.live, x.ready) == (200, 200) for x in s.since())
    return Found(time.monotonic() - s.began, f"warning: {case.reasons[0]}", "" if calm else s.story())


async def _silence(s: Scene, case: HangCase) -> Found:
    """No liveness probe has failed, and the sidecar still answers."""
    count = len(s.seen)
    await s.until(lambda: len(s.seen) > count, "an answer of the probes after the story")
    worst = [f"{x.verdict}/{x.reason}" for x in s.seen if x.verdict in ("suspect", "unknown", "exempt")]
    return Found(seen="silent" + "".join(f", {w}" for w in dict.fromkeys(worst)), wrong=s.story() if _dead(s) else "")


async def _ready(s: Scene, case: HangCase) -> Found:
    """No probe has failed, and no request but been served."""
    count = len(s.seen)
    await s.until(lambda: len(s.seen) > count, "an answer of the probes after the story")
    calm = all((x.live, x.ready) == (200, 200) for x in s.since()) and set(s.ended) <= {"done"}
    return Found(seen="silent", wrong="" if calm else s.story())


CHECKS = {
    "liveness": _liveness,
    "readiness": _readiness,
    "startup": _startup,
    "request": _request,
    "report": _report,
    "silence": _silence,
    "ready": _ready,
}


def _dead(s: Scene) -> list[Seen]:
    return [x for x in s.since() if x.live != 200]


def _judged(s: Scene, first: Seen, right: bool) -> Found:
    return Found(first.at - s.began, f"{first.verdict}/{first.reason}", "" if right else s.story())
