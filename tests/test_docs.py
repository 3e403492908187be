"""The documents: complete, true to the code, and without dead links."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import click
import pytest

from sidecar import __main__, __version__
from sidecar.control.admin_api import make_app
from sidecar.events import STATES
from sidecar.health.kill_policy import HOLDS
from sidecar.health.reasons import REASON_TEXTS, STATE_TEXTS
from sidecar.report.metrics import METRICS
from sidecar.settings import REMOVED, Settings, format_key

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
REFERENCE = (DOCS / "reference.md").read_text()
ARCHITECTURE = (DOCS / "architecture.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "plugins").rglob("*.md")])
MAX_README_BYTES = 7000
MAX_PICTURE_BYTES = 200_000
FOLDERS = "sidecar|kernels|tests|docs|deploy|benchmarks|plugins"  # whose paths are checked where a document names them


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
    emptied = re.sub(r"(<!-- generated: settings -->\n).*?(<!-- end -->)", r"\1\2", REFERENCE, flags=re.DOTALL)
    assert emptied != REFERENCE and generate.filled(emptied) == REFERENCE
    marks = [m[1] for d in DOCUMENTS for m in re.finditer(r"<!-- generated: (\w+) -->", d.read_text())]
    assert sorted(marks) == sorted(generate.BLOCKS), "each part stands in one place"


def test_the_diagram_has_every_verdict(generate: ModuleType) -> None:
    """Each verdict can be entered, and the picture shows how."""
    entered = set(re.findall(r"--> (\w+)", generate.diagram()))
    assert entered == set(STATES)


def test_the_pictures_show_what_production_decides(generate: ModuleType) -> None:
    """Readiness goes at the floor and liveness at the kill bound, after a canary; each picture is shown."""
    drawn = generate.pictures()
    found, settings = drawn["hang"](), Settings()
    assert settings.silence_floor < found.unready <= settings.silence_floor + 1
    assert settings.silence_kill < found.unlive <= settings.silence_kill + 1
    ((sent, ended),) = found.canaries
    assert sent < found.unready < ended <= found.unlive
    assert max(drawn["levels"](is_stuck=True)) == 0 < min(drawn["levels"](is_stuck=False)[1:])
    shown = re.findall(r"\(assets/(\w+\.svg)\)", (DOCS / "verdict.md").read_text())
    assert sorted(shown) == sorted(drawn["drawings"]())


def test_the_reference_names_every_command() -> None:
    """A command without a word in the reference does not exist for users."""
    context = click.Context(__main__.cli)
    names = [
        n
        for n in __main__.cli.list_commands(context)
        if not getattr(__main__.cli.get_command(context, n), "hidden", False)
    ]
    assert len(names) >= 6
    assert [n for n in names if f"`sidecar {n}`" not in REFERENCE] == []


def test_the_reference_names_every_endpoint() -> None:
    """Every route of the admin application is in the table, and those of the relay."""
    paths = {resource.canonical for resource in make_app(None).router.resources()}  # type: ignore[arg-type]  # routes need no loop
    assert "/livez" in paths
    assert [p for p in paths if f"`GET {p}`" not in REFERENCE] == []
    assert "`POST /v1/preprocess`" in REFERENCE


def test_the_reference_names_every_setting_and_metric() -> None:
    """Flags with their names, metrics with theirs."""
    assert [f.name for f in fields(Settings) if f"`{format_key(f.name)}`" not in REFERENCE] == []
    assert [m.name for m in METRICS if f"`{m.name}`" not in REFERENCE] == []


def test_the_runbook_has_a_paragraph_for_every_reason() -> None:
    """Each code that a verdict, a hold or an abort can have is explained in four steps, and no other code is."""
    runbook = (DOCS / "runbook.md").read_text()
    parts = dict(re.findall(r"^### `(\w+)`\n\n(.+?)(?=\n\n|\Z)", runbook, re.MULTILINE | re.DOTALL))
    assert sorted(parts) == sorted([*REASON_TEXTS, *STATE_TEXTS, *(code for code, _, _ in HOLDS)])
    for code, text in parts.items():
        steps = re.findall(r"(?:Means|Done|Look at|Do):", " ".join(text.split()))
        assert steps == ["Means:", "Done:", "Look at:", "Do:"], code


def test_the_readme_is_short() -> None:
    """The README sells; what it would explain stands in docs/, and its pictures load quickly."""
    assert len(README.encode()) <= MAX_README_BYTES
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / p).stat().st_size <= MAX_PICTURE_BYTES for p in pictures)


# --- the map ---


def tree() -> Iterator[str]:
    """The paths in the tree of architecture.md; a folder ends with a slash."""
    block = ARCHITECTURE.split("## The tree")[1].split("```")[1]
    parents: list[str] = []
    for line in block.strip("\n").splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name]
        yield "".join(parents)


def test_the_map_names_every_module() -> None:
    """Each file of sidecar/ and kernels/ has one line in the tree of architecture.md, and each line its file."""
    listed = list(tree())
    assert len(listed) == len(set(listed))
    assert [path for path in listed if not (ROOT / path).exists() or (ROOT / path).is_dir() != path.endswith("/")] == []
    files = [p.relative_to(ROOT) for top in ("sidecar", "kernels") for p in (ROOT / top).rglob("*.*")]
    written = {str(p) for p in files if p.suffix in {".py", ".html", ".css", ".js"} and p.name != "__init__.py"}
    assert sorted(path for path in written - set(listed) if not path.startswith("sidecar/kernels/")) == []


def test_every_line_of_the_map_says_something() -> None:
    """A path alone explains nothing, and a long line is no map."""
    block = ARCHITECTURE.split("## The tree")[1].split("```")[1]
    lines = block.strip("\n").splitlines()
    files = [line for line in lines if not line.split()[0].endswith("/")]
    assert [line for line in files if len(line.split()) < 2] == []
    assert max(map(len, lines)) <= 120


def defined(path: Path) -> set[str]:
    """The functions, classes and methods of a file, methods as `Class.method`."""
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, functions | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, functions)}
    return names


def test_every_step_of_the_map_is_there() -> None:
    """A function that is named after its file is defined in it."""
    steps = re.findall(rf"`((?:{FOLDERS})/[\w/]+\.py)`\s+`([A-Za-z_][\w.]*)`", ARCHITECTURE)
    assert len(steps) > 30
    assert [(path, name) for path, name in steps if name not in defined(ROOT / path)] == []


def test_the_map_has_its_parts() -> None:
    """Nine steps of a request, seven of a verdict, a glossary, and the questions that file names answer."""

    def section(title: str) -> str:
        return ARCHITECTURE.split(f"## {title}\n")[1].split("\n## ")[0]

    assert len(re.findall(r"^\d\. ", section("A request in 9 steps"), re.MULTILINE)) == 9
    assert len(re.findall(r"^\d\. ", section("A verdict in 7 steps"), re.MULTILINE)) == 7
    assert section("Words").count("\n| ") >= 25
    for question in ("stream is stuck", "request with an image", "tenant's limit", "worker see", "metric", "to disk"):
        assert question in section("Where is ...?"), question


# --- what documents name ---


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_every_path_that_is_named_exists(document: Path) -> None:
    """A path of this repository in a document leads to a file or folder; the changelog tells of what was."""
    named = re.findall(rf"`((?:{FOLDERS})/[\w.*/-]*)", document.read_text())
    missing = [path for path in named if not list(ROOT.glob(path.rstrip("/")))]
    assert document.name == "CHANGELOG.md" or missing == []


def test_every_flag_in_a_document_exists() -> None:
    """No document names a flag that no command takes; the changelog and the decisions may name a removed one.

    Flags of other programs are listed here.
    """
    others = {
        "--host",
        "--port",
        "--build-arg",
        "--enable-prompt-tokens-details",
        "--check",
        "--enable-metrics",
        "--metrics",
        *(
            "--mm-processor-kwargs",
            "--media-io-kwargs",
            "--tokenizer-mode",
            "--enable-scale-out",
            "--no-mm-device-do-normalize",
            "--mm-processor-cache-gb",
            "--no-enable-prefix-caching",
        ),  # vLLM
        *("--nonblocking", "--locals"),  # py-spy
        "--cache-ram",  # llama.cpp
        "--set",  # helm
    }
    context = click.Context(__main__.cli)
    commands = [__main__.cli.get_command(context, name) for name in __main__.cli.list_commands(context)]
    commands += [below for c in commands if isinstance(c, click.Group) for below in c.commands.values()]
    known = {o for c in commands if c for p in c.params for o in p.opts} | {"--help", "--version"} | others
    programs = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    for program in [*programs, ROOT / "kernels/compile_cubins.py"]:
        known |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', program.read_text()))
    removed = {f"--{name}" for name in REMOVED}
    for document in [d for d in DOCUMENTS if "engines" not in d.parts]:
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", document.read_text()))
        history = document.name == "CHANGELOG.md" or document.parent.name == "decisions"
        assert used - known - (removed if history else set()) == set(), document.name


def test_every_benchmark_can_run_with_the_others() -> None:
    """`make bench ARGS=--write` ends at the first that does not take it; it leaves gpu_*.py to docs/gpu-day.md."""
    programs = [p for p in (ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text()]
    programs = [p for p in programs if not p.name.startswith("gpu_")]
    assert len(programs) > 10
    assert [p.name for p in programs if '"--write"' not in p.read_text()] == []


def test_every_command_behind_a_figure_can_be_typed() -> None:
    """A benchmark or a test that a document cites is there, and takes the flags that it is cited with."""
    for document in DOCUMENTS:
        for path, more in re.findall(r"\b((?:benchmarks|examples|tests)/[\w/]+\.py)([^`\n]*)`", document.read_text()):
            source = (ROOT / path).read_text()
            for flag in re.findall(r"--[a-z-]+", more):
                assert f'"{flag}"' in source, f"{document.name}: {path} {flag}"


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as the repository's host makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_links_lead_somewhere_and_paths_are_of_no_machine(document: Path) -> None:
    """Relative links lead to files, their anchors to headings, and no path of a developer's machine is in the text."""
    text = document.read_text()
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [path for path, _, _ in links if path and not (document.parent / path).exists()] == []
    pages = [(document.parent / path if path else document, anchor) for path, _, anchor in links if anchor]
    assert [f"{page.name}#{anchor}" for page, anchor in pages if anchor not in anchors(page)] == []
    assert re.findall(r"(?<![\w.])/(?:home|root|work|Users)/", text) == []


def test_the_changelog_knows_this_version() -> None:
    """The version that is installed has a section, below an `Unreleased` one."""
    sections = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == "Unreleased" and __version__ in sections


def test_pyproject_readme_and_dockerfile_agree_on_the_version() -> None:
    """One version, wherever it is written."""
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
    for name in ("README.md", "docs/kubernetes.md", "Dockerfile"):
        assert set(re.findall(r"inference-sidecar:([\d.]+)", (ROOT / name).read_text())) == {__version__}


def test_every_decision_is_in_the_index() -> None:
    """The index names each page by its title, in order."""
    folder = ROOT / "docs" / "decisions"
    pages = sorted(p for p in folder.glob("*.md") if p.name != "README.md")
    titles = [p.read_text().splitlines()[0].removeprefix("# ") for p in pages]
    listed = re.findall(r"^- \[(.+)\]\((.+)\)$", (folder / "README.md").read_text(), re.MULTILINE)
    assert listed == [(title, page.name) for title, page in zip(titles, pages, strict=True)]
