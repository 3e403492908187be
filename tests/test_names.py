"""A class name stands for one thing, and the top of the package holds no loose files."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GROUND = {
    "__init__",
    "__main__",
    "errors",
    "events",
    "flags",
    "labels",
    "readings",
    "settings",
    "snapshot",
    "trace_context",
}


def classes() -> Iterator[str]:
    """The name of every class at the top of a module of sidecar/ and kernels/."""
    for folder in ("sidecar", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            yield from (node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef))


def test_a_class_name_stands_for_one_thing() -> None:
    """No two classes of the package share a name."""
    counted = Counter(classes())
    assert len(counted) > 300
    assert {name for name, count in counted.items() if count > 1} == set()


def test_a_new_file_belongs_in_a_package() -> None:
    """Only the ground that every package uses stands at the top of sidecar/."""
    assert {path.stem for path in (ROOT / "sidecar").glob("*.py")} == GROUND
