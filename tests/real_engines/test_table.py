"""The table of real engines is whole, and the documents show what a run of all of it showed. Starts no engine."""

from __future__ import annotations

from sidecar.engines.registry import KINDS
from sidecar.readings import EngineSample

from . import seen
from .cases import CASES, legend
from .engines import ENGINES
from .environments import ENVIRONMENTS


def test_each_row_names_what_exists() -> None:
    """Kinds, series, cases and pages are known ones; no row leaves out a case without a reason."""
    assert len({row.name for row in ENGINES}) == len({row.id for row in ENGINES}) == len(ENGINES)
    for row in ENGINES:
        assert row.kind in KINDS and {*row.needed} <= {*ENVIRONMENTS.values()}, row.name
        assert row.series <= {*EngineSample.__dataclass_fields__}, row.name
        assert {*row.absent} <= {*CASES} and all(row.absent.values()), row.name
        assert seen.FILE.with_name(f"{row.page}.md").exists(), row.name


def test_what_was_seen_is_of_this_table() -> None:
    """The kept run has each engine and each case of the table, none failed, and the cases' present words."""
    kept = seen.read()
    assert kept["cases"] == {case: legend(case) for case in CASES}
    assert [*kept["engines"]] == [row.name for row in ENGINES]
    for row in ENGINES:
        cells = kept["engines"][row.name]["cells"]
        assert [*cells] == [*CASES], row.name
        assert "failed" not in " ".join(cells.values()), row.name
        assert {case for case, cell in cells.items() if cell.startswith("—")} == {*row.absent}, row.name
