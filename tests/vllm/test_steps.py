"""The plug-in's hook against the scheduler of each version of vLLM that it takes, by that version's own source."""

from __future__ import annotations

import ast
from types import SimpleNamespace

import pytest

from sidecar.launch.engine_plugin import SOURCES

from . import scheduler_sources as sources

pytestmark = [pytest.mark.vllm]

WRAPPED = ("schedule", "update_from_output", "finish_requests")
QUEUES = ("waiting", "skipped_waiting", "kv_holding_waiting")  # those that any version counts


def known_versions() -> tuple[str, ...]:
    """Those of the plug-in, which is no package of this environment."""
    text = (SOURCES / "sidecar_vllm" / "steps.py").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("KNOWN_VERSIONS = ")]
    found: tuple[str, ...] = eval(line.removeprefix("KNOWN_VERSIONS = "))
    return found


def trees(version: str) -> list[ast.Module]:
    """The parsed scheduler package. Skips where the source is not there."""
    if not sources.is_complete(version):
        pytest.skip(f"no source of vLLM {version}: .venv/bin/python -m tests.vllm.scheduler_sources")
    return [ast.parse(path.read_text()) for path in sorted((sources.folder(version) / sources.SCHEDULER).glob("*.py"))]


def classes(version: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for tree in trees(version) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def methods(of: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in of.body if isinstance(node, ast.FunctionDef)}


def test_each_minor_version_that_is_taken_has_a_source_here() -> None:
    """The list of the plug-in and that of the sources say the same."""
    assert tuple(f"{version.rpartition('.')[0]}." for version in sources.VERSIONS) == known_versions()


@pytest.mark.parametrize("version", sources.VERSIONS)
def test_the_scheduler_has_what_the_plug_in_wraps(version: str) -> None:
    """Three methods of one class; a subclass with its own form calls that of its parent, where the hook is."""
    found = classes(version)
    assert set(WRAPPED) <= methods(found["Scheduler"]).keys()
    heirs = {name for name, node in found.items() if any(ast.unparse(base) == "Scheduler" for base in node.bases)}
    assert "AsyncScheduler" in heirs
    for name, node in found.items():
        if name in ("Scheduler", "SchedulerInterface"):
            continue
        for method in methods(node).keys() & set(WRAPPED):
            assert f"super().{method}(" in ast.unparse(methods(node)[method]), (name, method)


@pytest.mark.parametrize("version", sources.VERSIONS)
def test_its_counts_are_of_all_queues(version: str) -> None:
    """Its own get_request_counts, run on queues that it itself names, counts requests wherever they wait."""
    function = methods(classes(version)["Scheduler"])["get_request_counts"]
    function.returns, names = None, {}
    exec(compile(ast.Module([function], []), version, "exec"), names)
    named = [queue for queue in QUEUES if f"self.{queue}" in ast.unparse(function)]
    assert len(named) == 2
    queues = {queue: [] for queue in named}
    for at, queue in enumerate(named, 1):
        full = SimpleNamespace(running=["a"], **(queues | {queue: ["b"] * at}))
        assert names["get_request_counts"](full) == (1, at)


@pytest.mark.parametrize("version", sources.VERSIONS)
def test_a_step_says_its_tokens_and_the_core_calls_the_hook(version: str) -> None:
    """The scheduler's output has the field that is written; the core loads plug-ins, then steps."""
    fields = {
        ast.unparse(node.target) for node in classes(version)["SchedulerOutput"].body if isinstance(node, ast.AnnAssign)
    }
    assert "total_num_scheduled_tokens" in fields
    core = (sources.folder(version) / sources.CORE).read_text()
    assert core.index("load_general_plugins()") < core.index("self.scheduler.schedule(")
    assert {f"scheduler.{name}(" in core for name in WRAPPED} == {True}
