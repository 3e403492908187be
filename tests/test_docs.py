"""The documents: complete, true to the code, and without dead links."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import click
import pytest

from sidecar import __main__, __version__
from sidecar.control.admin_api import Sources, make_app
from sidecar.events import STATES
from sidecar.report.live_page import PageFeed
from sidecar.report.metrics import METRICS
from sidecar.settings import REMOVED, Settings, format_key

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """docs/generate.py, which is no package's."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_generated_is_up_to_date(generate: ModuleType) -> None:
    """`make docs` would change nothing."""
    assert [str(p.relative_to(ROOT)) for p in generate.differing()] == []


def test_a_change_of_the_code_would_be_noticed(generate: ModuleType) -> None:
    """The marks are there and are filled: a document whose generated part is emptied differs."""
    emptied = re.sub(r"(<!-- generated: settings -->\n).*?(<!-- end -->)", r"\1\2", README, flags=re.DOTALL)
    assert emptied != README and generate.filled(emptied) == README
    assert {m[1] for d in DOCUMENTS for m in re.finditer(r"<!-- generated: (\w+) -->", d.read_text())} == set(
        generate.BLOCKS
    )


def test_the_diagram_has_every_verdict(generate: ModuleType) -> None:
    """Each verdict can be entered, and the picture shows how."""
    entered = set(re.findall(r"--> (\w+)", generate.diagram()))
    assert entered == set(STATES)


def test_readme_names_every_command() -> None:
    """A command without a word in the README does not exist for users."""
    context = click.Context(__main__.cli)
    names = [
        n
        for n in __main__.cli.list_commands(context)
        if not getattr(__main__.cli.get_command(context, n), "hidden", False)
    ]
    assert len(names) >= 6
    assert [n for n in names if f"`sidecar {n}" not in README] == []


def test_readme_names_every_endpoint() -> None:
    """Every route of the admin application is in the table."""
    nothing = Sources(None, None, None, None, PageFeed(), None, None)  # type: ignore[arg-type]  # routes need no sources
    paths = {resource.canonical for resource in make_app(nothing).router.resources()}
    assert "/livez" in paths
    assert [p for p in paths if f"`GET {p}`" not in README] == []
    assert "`POST /v1/preprocess`" in README


def test_readme_names_every_setting_and_metric() -> None:
    """Flags with their names, metrics with theirs."""
    assert [f.name for f in fields(Settings) if f"`{format_key(f.name)}`" not in README] == []
    assert [m.name for m in METRICS if f"`{m.name}`" not in README] == []


def test_every_flag_in_a_document_exists() -> None:
    """Every flag in a document exists, except in changelog and decisions; flags of other programs are listed."""
    others = {
        "--host",
        "--port",
        "--build-arg",
        "--enable-prompt-tokens-details",
        "--check",
        "--enable-metrics",
        "--metrics",
        *("--mm-processor-kwargs", "--enable-scale-out", "--no-mm-device-do-normalize"),  # vLLM
        *("--nonblocking", "--locals"),  # py-spy
    }
    context = click.Context(__main__.cli)
    commands = [__main__.cli.get_command(context, name) for name in __main__.cli.list_commands(context)]
    known = {o for c in commands if c for p in c.params for o in p.opts} | {"--help", "--version"} | others
    for program in [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").glob("*.py")]:
        known |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', program.read_text()))
    documents = [d for d in DOCUMENTS if "engines" not in d.parts]
    removed = {f"--{name}" for name in REMOVED}
    for document in documents:
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", document.read_text()))
        history = document.name == "CHANGELOG.md" or document.parent.name == "decisions"
        assert used - known - (removed if history else set()) == set(), document.name


def test_every_benchmark_can_run_with_the_others() -> None:
    """`make bench ARGS=--write` ends at the first that does not take it."""
    programs = [p for p in (ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text()]
    assert len(programs) > 10
    assert [p.name for p in programs if '"--write"' not in p.read_text()] == []


def test_every_command_behind_a_figure_can_be_typed() -> None:
    """A benchmark, a test or an example that a document cites is there, and takes the flags that it is cited with."""
    for document in DOCUMENTS:
        for path, more in re.findall(r"\b((?:benchmarks|examples|tests)/[\w/]+\.py)([^`\n]*)`", document.read_text()):
            source = (ROOT / path).read_text()
            for flag in re.findall(r"--[a-z-]+", more):
                assert f'"{flag}"' in source, f"{document.name}: {path} {flag}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_links_lead_somewhere_and_paths_are_nobodys(document: Path) -> None:
    """Every relative link leads to a file, and no path of a developer's machine is in the text."""
    text = document.read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (document.parent / link).exists()] == []
    assert re.findall(r"(?<![\w.])/(?:home|root|work|Users)/", text) == []


def test_the_changelog_knows_this_version() -> None:
    """The version that is installed has a section, below an `Unreleased` one."""
    sections = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == "Unreleased" and __version__ in sections


def test_pyproject_readme_and_dockerfile_agree_on_the_version() -> None:
    """One version, wherever it is written."""
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
    for name in ("README.md", "Dockerfile"):
        assert set(re.findall(r"inference-sidecar:([\d.]+)", (ROOT / name).read_text())) == {__version__}


def test_every_decision_is_in_the_index() -> None:
    """The index names each page by its title, in order."""
    folder = ROOT / "docs" / "decisions"
    pages = sorted(p for p in folder.glob("*.md") if p.name != "README.md")
    titles = [p.read_text().splitlines()[0].removeprefix("# ") for p in pages]
    listed = re.findall(r"^- \[(.+)\]\((.+)\)$", (folder / "README.md").read_text(), re.MULTILINE)
    assert listed == [(title, page.name) for title, page in zip(titles, pages, strict=True)]
