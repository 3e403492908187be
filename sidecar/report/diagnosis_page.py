"""A diagnosis as an HTML page: what the engine's processes did, their stacks, and the rest of the bundle.

Rules: every text is escaped. No scripts, nothing loaded from elsewhere. A bundle of an older version may lack parts.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any, Final

STYLE: Final = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem 1.25rem 3rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } h3 { font-size: 1rem; margin-bottom: .3rem; }
pre { overflow: auto; max-height: 30rem; padding: .6rem .8rem; border: 1px solid #8886; border-radius: 6px;
  font-size: 13px; }
.summary { font-size: 1.15rem; font-weight: 600; }
.soft { opacity: .75; }
summary { cursor: pointer; }
"""


def source_hash(block: bytes) -> str:
    """A script or style as a source of a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(block).digest()).decode()}'"


def page_headers(allowed: str) -> dict[str, str]:
    """Response headers of a page that may load only what is `allowed`."""
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; {allowed}"
    return {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}


HEADERS = page_headers(f"style-src {source_hash(STYLE.encode())}") | {"Cache-Control": "no-store", "Vary": "Accept"}
_SHOWN: Final = ("at", "verdict", "reason", "detail", "summary", "complete", "processes")


def render(id: str, bundle: Mapping[str, Any]) -> str:
    """The page of one bundle."""
    taken = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(bundle.get("at") or 0))
    state = "" if bundle.get("complete", True) else " · incomplete: the second sample was not written"
    head = f"{taken} · {bundle.get('verdict', '')} · {bundle.get('reason', '')}{state}"
    body = [
        f"<h1>Diagnosis {escape(id)}</h1><p class=soft>{escape(head)}</p>",
        f"<p class=summary>{escape(bundle.get('summary') or 'no summary')}</p>",
        f"<p>{escape(str(bundle.get('detail', '')))}</p>",
        "<h2>The engine’s processes</h2>",
        *_processes(bundle.get("processes", [])),
        "<h2>Everything else</h2>",
        *(_folded(name.replace("_", " "), _text(bundle[name])) for name in bundle if name not in _SHOWN),
    ]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Diagnosis {escape(id)}</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def _processes(processes: Any) -> Iterable[str]:
    if isinstance(processes, dict):  # an absent or failed reading, with its reason
        yield f"<p>{escape(' '.join(map(str, processes.values())))}</p>"
        return
    for process in processes:
        of = f"pid {int(process['pid'])}, {escape(str(process['role']))}"
        yield f"<h3>{escape(str(process['name']))} <span class=soft>{of}</span></h3>"
        yield f"<p>{escape(str(process['symptom']))}</p>"
        for i, stack in enumerate(process["stacks"]):
            text = stack.get("text", "no stacks: " + str(stack.get("failed", "")))
            yield f"<p class=soft>{('first', 'second')[i > 0]} dump</p><pre>{escape(text)}</pre>"
        yield _folded("kernel view", _text(process["looks"]))


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)
