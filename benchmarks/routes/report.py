"""The Markdown that both benchmarks print and keep."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from pathlib import Path

from .processes import cores, cpu_name

RESULTS = Path(__file__).parents[1] / "results"


def heading(title: str, remark: str) -> list[str]:
    """Title with date, the machine, the command; `remark` stands after it."""
    load_core, route_core = cores()
    program, *words = sys.argv
    return [
        f"# {title}, {datetime.date.today()}",
        "",
        f"{cpu_name()}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}. "
        f"Engine and client on core {load_core}, the route on core {route_core}.",
        f"`python benchmarks/{Path(program).name}{''.join(' ' + shlex.quote(word) for word in words)}`; {remark}",
    ]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["", *(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))]


def publish(lines: list[str], keep_as: str) -> None:
    """Print it, and keep it under that name if there is one."""
    text = "\n".join([*lines, ""])
    print(text)
    if keep_as:
        (RESULTS / f"{keep_as}-{datetime.date.today()}.md").write_text(text)
