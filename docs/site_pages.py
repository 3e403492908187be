"""What MkDocs does not do by itself, for mkdocs.yml. The documents are written for the repository: links lead to files.

- Documents outside docs/ become pages (PAGES); what a document links to becomes a page below files/, without search.
- `folder/*.md` in the navigation becomes the pages of that folder.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).resolve().parent.parent
DOCS: Final = "docs"
# Documents outside docs/ -> their pages.
PAGES: Final = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "plugins/vllm/README.md": "vllm-plugin.md",
}
FILES: Final = "files"
# Pages that searches of users should find last.
DEVELOPERS: Final = ("decisions/", "architecture.md", "changelog.md", "contributing.md")
DEVELOPERS_BOOST: Final = 0.2
MAX_SHOWN_BYTES: Final = 400_000
MAX_SHOWN_FILES: Final = 12
# Languages of code blocks, and what is shown as it is.
LANGUAGES: Final = {".yaml": "yaml", ".json": "json", ".py": "python", ".service": "ini", ".timer": "ini"}
PICTURES: Final = (".svg", ".png", ".webp")
_CODE: Final = re.compile(r"(^(```|~~~).*?^\2|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_LINK: Final = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill folders into the navigation."""
    config.nav = _filled(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of what lies outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    sources = [*PAGES, *(f"{DOCS}/{file.src_uri}" for file in files.documentation_pages() if file.generated_by is None)]
    wanted = {target for source in sources for target in _targets(source) if _is_file_page(target)}
    for target in sorted(wanted):
        files.append(_file_page(config, target))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to pages, and show what is for developers below what is for users in searches."""
    if page.file.src_uri.startswith(DEVELOPERS):
        page.meta["search"] = {"boost": DEVELOPERS_BOOST}
    source = _source_of(page.file.src_uri)
    return (
        markdown if source is None else _with_links(markdown, lambda link: _page_link(source, page.file.src_uri, link))
    )


def _filled(nav: Any) -> Any:
    """A navigation with its `folder/*.md` replaced, README first."""
    if isinstance(nav, dict):
        return {title: _filled(below) for title, below in nav.items()}
    if not isinstance(nav, list):
        return nav
    filled: list[Any] = []
    for entry in nav:
        if isinstance(entry, str) and entry.endswith("/*.md"):
            found = sorted((ROOT / DOCS).glob(entry), key=lambda path: (path.name != "README.md", path.name))
            filled += [path.relative_to(ROOT / DOCS).as_posix() for path in found]
        else:
            filled.append(_filled(entry))
    return filled


def _source_of(page: str) -> str | None:
    """The repository's file of a page; None for a page of a file, whose text is no document."""
    if page.startswith(f"{FILES}/"):
        return None
    return next((source for source, made in PAGES.items() if made == page), f"{DOCS}/{page}")


def _with_links(markdown: str, change: Callable[[str], str]) -> str:
    """The text with each link outside code changed."""
    parts = _CODE.split(markdown)
    # The expression has two groups: text, code, fence, text, code, fence, ...
    texts = [
        part if index % 3 else _LINK.sub(lambda m: m[1] + change(m[2]) + (m[3] or "") + m[4], part)
        for index, part in enumerate(parts)
        if index % 3 != 2
    ]
    return "".join(texts)


def _targets(source: str) -> Iterator[str]:
    """What a document links to in the repository."""
    found: list[str] = []

    def note(link: str) -> str:
        if "://" not in link:
            found.append(posixpath.normpath(posixpath.join(posixpath.dirname(source), link)))
        return link

    _with_links((ROOT / source).read_text(), note)
    return (target for target in found if (ROOT / target).exists())


def _is_file_page(target: str) -> bool:
    return target not in PAGES and not target.startswith(f"{DOCS}/") and target != DOCS


def _page_link(source: str, page: str, link: str) -> str:
    """A link of the repository as a link of the site."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if "://" in link or not (ROOT / target).exists():
        return link  # one that leads nowhere ends the build
    if target in PAGES:
        made = PAGES[target]
    elif target.startswith(f"{DOCS}/"):
        made = target.removeprefix(f"{DOCS}/")
        made = f"{made}/README.md" if (ROOT / target).is_dir() else made
    else:
        made = _file_uri(target)
    return posixpath.relpath(made, posixpath.dirname(page))


def _file_uri(target: str) -> str:
    """Where a file outside docs/ is in the site: a picture as it is, all else as a page."""
    return f"{FILES}/{target}" + ("" if target.endswith(PICTURES) else ".page.md")


def _file_page(config: MkDocsConfig, target: str) -> File:
    """The page of a file or folder."""
    path, uri = ROOT / target, _file_uri(target)
    if target.endswith(PICTURES):
        return File.generated(config, uri, content=path.read_bytes())
    if path.is_dir():
        body = _folder(path)
    elif target.endswith(".md"):
        body = _with_links(path.read_text(), lambda link: link if "://" in link else f"#{link}")
        body = _LINK.sub(lambda m: m[0] if "://" in m[2] else m[0].split("](")[0] + "]", body)
    else:
        body = _code(path)
    head = f"---\ntitle: {target}\nsearch:\n  exclude: true\n---\n\n"
    return File.generated(config, uri, content=f"{head}# `{target}`\n\nIn the repository: `{target}`.\n\n{body}\n")


def _folder(path: Path) -> str:
    """The files of a folder; their names alone where there are many."""
    below = sorted(path.iterdir(), key=lambda found: (found.is_dir(), found.name))
    files = [found for found in below if found.is_file()]
    if len(files) > MAX_SHOWN_FILES:
        return "\n".join(f"- `{found.name}`" for found in below)
    shown = [f"## `{found.name}`\n\n{_code(found)}" for found in files]
    return "\n\n".join([*shown, *(f"- `{found.name}/`" for found in below if found.is_dir())])


def _code(path: Path) -> str:
    """A file as a block of code."""
    text = path.read_text()[:MAX_SHOWN_BYTES]
    return f"````{LANGUAGES.get(path.suffix, 'text')}\n{text}\n````"
