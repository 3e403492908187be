"""The documentation as a site: it builds without a warning, and a search answers what readers ask (make site)."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 5  # results that a reader looks at

pytestmark = pytest.mark.site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, requires: Callable[[str], Path]) -> Path:
    """The whole site, built as `make site` does."""
    requires("python:mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


# --- pages ---


class Links(HTMLParser):
    """What a page refers to, and the anchors that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}
        if tag == "a" and found.get("href"):
            self.targets.append(str(found["href"]))
        if tag in ("script", "img", "link") and (source := found.get("src") or found.get("href")):
            self.loaded.append(source)


def read(page: Path) -> Links:
    links = Links()
    links.feed(page.read_text())
    return links


def test_every_document_is_a_page(site: Path) -> None:
    """Each document of docs/, and those of the root, can be read on the site."""
    documents = [p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md")]
    pages = {p.relative_to(site).as_posix() for p in site.rglob("*.html")}
    names = {(d.parent / ("index" if d.name == "README.md" else d.stem)).as_posix() + ".html" for d in documents}
    assert names - pages == set()
    assert {"index.html", "contributing.html", "security.html", "changelog.html"} <= pages


def test_links_lead_to_pages_and_anchors(site: Path) -> None:
    """Links of the repository were led to pages: none leads outside the site, and each anchor is there."""
    pages = {page.resolve(): read(page) for page in site.rglob("*.html")}
    wrong = []
    for page, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or page.name == "404.html":
                continue
            path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            path = path / "index.html" if path.is_dir() else path
            missing = not path.exists() or (
                path in pages and parts.fragment and parts.fragment not in pages[path].anchors
            )
            wrong += (
                [f"{page.relative_to(site.resolve())}: {target}"]
                if missing and unquote(parts.fragment) != "__top"
                else []
            )
    assert wrong == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """Pages load what they show from the site itself: it works without a network, and nobody learns who reads."""
    loaded = {source for page in site.rglob("*.html") for source in read(page).loaded}
    assert {source for source in loaded if urlsplit(source).netloc} == set()


# --- a reader's questions ---


@dataclass(frozen=True)
class Question:
    """What a reader wants to know, what they type, and the section and words that answer it."""

    asked: str
    typed: str
    page: str
    words: str


SRE = (
    Question("Why was my pod killed?", "engine killed", "kill-policy.html", "failing liveness"),
    Question("The alert says no_progress", "no_progress", "runbook.html#no_progress", "nothing of them was delivered"),
    Question("What do I look at first?", "first look", "runbook.html#first-look", "sidecar status"),
    Question("How do I stop automatic restarts?", "hold back restarts operator", "kill-policy.html", "operator"),
    Question("What is kept of a hang?", "diagnosis stack dump", "diagnosis.html", "py-spy"),
    Question("What does 503 engine_stalled mean?", "engine_stalled", "reference.html#errors", "engine_stalled"),
    Question(
        "How do I see the state without a browser?", "status terminal", "reference.html#in-a-terminal", "sidecar top"
    ),
    Question("Which alerts and dashboard?", "prometheus grafana alerts", "consumers.html", "rules.yaml"),
    Question("What if the sidecar itself dies?", "sidecar dies outlives restart", "kill-policy.html", "sidecar"),
    Question("The GPU reports an XID error", "xid error gpu", "telemetry.html#gpus", "XID"),
)
PLATFORM = (
    Question(
        "How do I add it to a Deployment that exists?", "inject existing deployment", "deploy-existing.html", "inject"
    ),
    Question("Which engines are supported?", "supported engines", "engines/", "SGLang"),
    Question("How do I scale with KEDA?", "keda autoscaling", "consumers.html#keda-hpa-and-forecasts", "scale-to-zero"),
    Question("How do I limit a tenant?", "tenant limits", "model-units.html#limits-of-tenants", "mu_per_minute"),
    Question("How do I bill tenants in dollars?", "billing dollars chargeback", "billing.html", "dollars"),
    Question(
        "How do traces get into my collector?",
        "opentelemetry traces collector",
        "consumers.html#opentelemetry",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
    ),
    Question("What does it cost per request?", "relay cpu per request", "performance.html", "CPU per request"),
    Question("How do I calibrate?", "calibration", "model-units.html#calibration", "sidecar calibrate"),
    Question("How can I try it?", "first hang", "first-hang.html", "No GPU"),
    Question(
        "How does it differ from Dynamo's canary?", "comparison dynamo", "comparison.html", "a canary to an idle worker"
    ),
)


@dataclass(frozen=True)
class Search:
    """The site's own index, searched as the theme's worker does: prefixes, no stemmer, titles far before texts."""

    index: Any
    sections: dict[str, dict[str, str]]

    def results(self, typed: str) -> list[str]:
        """Locations, the best first."""
        found = self.index.search(" ".join(f"{word}*" for word in typed.lower().split()))
        return [hit["ref"] for hit in found]


@pytest.fixture(scope="module")
def search(site: Path, requires: Callable[[str], Path]) -> Search:
    requires("python:lunr")
    import lunr
    from lunr.pipeline import Pipeline
    from lunr.stop_word_filter import stop_word_filter

    content = json.loads((site / "search" / "search_index.json").read_text())
    sections = {d["location"]: d for d in content["docs"]}
    plain = [
        {name: html.unescape(re.sub(r"<[^>]+>", " ", d[name])) for name in ("title", "text")} | {"ref": d["location"]}
        for d in content["docs"]
    ]
    builder = lunr.get_default_builder()
    builder.pipeline, builder.search_pipeline = Pipeline(), Pipeline()
    builder.pipeline.add(stop_word_filter)
    builder.b(0)
    builder.ref("ref")
    builder.field("title", boost=1000)
    builder.field("text")
    for document in plain:
        builder.add(document, {"boost": sections[document["ref"]].get("boost", 1)})
    return Search(
        builder.build(), {d["ref"]: d for d in plain} | {k: v for k, v in sections.items() if k not in sections}
    )


@pytest.mark.parametrize("question", [*SRE, *PLATFORM], ids=lambda q: q.typed.replace(" ", "-"))
def test_one_search_answers(question: Question, search: Search) -> None:
    """Among the first results is the section, and its text has the answer's words."""
    results = search.results(question.typed)[:SHOWN]
    answers = [r for r in results if r.startswith(question.page)]
    assert answers, f"{question.asked} {results}"
    assert any(
        question.words in search.sections[r]["text"] or question.words in search.sections[r]["title"] for r in answers
    )


def test_there_are_ten_questions_of_each() -> None:
    """Of an SRE, and of a platform engineer."""
    assert (len(SRE), len(PLATFORM)) == (10, 10)
