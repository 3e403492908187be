"""What the engines showed in the last runs that were kept: `make test-engines ARGS=--write`.

docs/engines/seen.json has the legend of the cases and, for each engine, the date, the machine and a cell for each case.
docs/generate.py makes the tables of docs/engines/seen.md of it.
"""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from .cases import CASES, legend
from .engines import ENGINES

FILE = Path(__file__).resolve().parents[2] / "docs" / "engines" / "seen.json"


def read() -> dict[str, Any]:
    """The file's content; empty before the first run."""
    kept: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    return kept


def keep(cells: dict[str, dict[str, str]]) -> None:
    """Put the cells of a run, by engine and case, in the place of older ones; engines without any stay as they were."""
    known = read().get("engines", {})
    kept = {}
    for row in ENGINES:
        new, old = cells.get(row.name, {}), known.get(row.name, {})
        if new:
            date = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
            old = {
                "page": row.page,
                "date": date,
                "machine": f"{os.cpu_count()} CPUs",
                "cells": old.get("cells", {}) | new,
            }
        if old:
            kept[row.name] = old | {"cells": {case: old["cells"][case] for case in CASES if case in old["cells"]}}
    content = {"cases": {case: legend(case) for case in CASES}, "engines": kept}
    FILE.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
