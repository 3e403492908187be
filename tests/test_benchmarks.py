"""Benchmarks run by hand: what they import of the product exists, so that a name that moved is found at once."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
FILES = sorted(path.relative_to(BENCHMARKS) for path in BENCHMARKS.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_what_a_benchmark_imports_exists(file: Path) -> None:
    """Each name that it imports from the package exists."""
    taken = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse((BENCHMARKS / file).read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sidecar"
        for alias in node.names
    ]
    missing = [
        f"{module}.{name}"
        for module, name in taken
        if not hasattr(importlib.import_module(module), name) and importlib.util.find_spec(f"{module}.{name}") is None
    ]
    assert missing == []
