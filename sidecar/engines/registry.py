"""What differs between engines, as one literal table, and how one is told from another.

A row names only what the engine publishes; what it does not publish stays absent (None in EngineSample), never 0. An engine
that cannot be told apart is `openai`: nothing is read from its metrics, and its canary is what any OpenAI-compatible server
takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from sidecar.engines.engine_type import EngineKind, KindMark
from sidecar.engines.llamacpp import LLAMACPP
from sidecar.engines.openai import OPENAI
from sidecar.engines.sglang import SGLANG
from sidecar.engines.tgi import TGI
from sidecar.engines.vllm import SCRIPTED, VLLM
from sidecar.readings import EngineIdentity

# The order of recognition: /version, vLLM's mark, says least, so it is looked at last.
KINDS: Final[dict[str, EngineKind]] = {kind.name: kind for kind in (SCRIPTED, SGLANG, TGI, LLAMACPP, VLLM, OPENAI)}
FIRST_LOOK: Final = ("/v1/models", "/metrics")
FLAGS: Final = ("cache_dtype", "block_size", "enable_prefix_caching", "gpu_memory_utilization")  # of vLLM's page
# vLLM's Rust front end (0.33), by its models' owner and a key of /version: it decodes no PNM, as prepared images come.
RUST_OWNER: Final = "vllm-frontend-rs"
RUST_VERSION: Final = "rust_frontend_version"
NO_PNM: Final = "images pass as they came: vLLM's Rust front end does not read the form in which prepared ones are sent"
MODELS: Final = 1000  # names of an engine that are looked at
NAME: Final = 128  # characters of one, and of a version
CLOSER_LOOK: Final = tuple(mark.path for kind in KINDS.values() for mark in kind.marks)


def recognise(pages: Mapping[str, bytes]) -> str:
    """Which row of KINDS an engine is, from what it answered with 200: path -> body.

    The owner of its models decides, then the series on its metrics page, then its marks; "openai" where none says anything.
    """
    owners = _owners(pages.get("/v1/models", b""))
    page = pages.get("/metrics", b"")
    by_owner = (name for name, kind in KINDS.items() if kind.owner in owners)
    by_series = (name for name, kind in KINDS.items() if kind.prefix and _has_series(page, kind.prefix.encode()))
    by_mark = (
        name for name, kind in KINDS.items() if any(_marked(pages.get(mark.path, b""), mark) for mark in kind.marks)
    )
    return next(by_owner, None) or next(by_series, None) or next(by_mark, "openai")


def identity(pages: Mapping[str, bytes]) -> EngineIdentity:
    """The names of its models, its version and settings, from the bodies of /v1/models, /version and /metrics; empty where they do not say."""
    cards = _object(pages.get("/v1/models", b"")).get("data")
    names = [card.get("id") for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []
    versions = _object(pages.get("/version", b""))
    version = versions.get("version")
    rust = RUST_OWNER in _owners(pages.get("/v1/models", b"")) or RUST_VERSION in versions
    models = tuple(name[:NAME] for name in names[:MODELS] if isinstance(name, str))
    settings = tuple(f"{name}={value}" for name, value in flags(pages.get("/metrics", b"")).items())
    return EngineIdentity(models, version[:NAME] if isinstance(version, str) else "", flags=settings, prepared=not rust)


def flags(page: bytes) -> dict[str, str]:
    """The settings that change what a request costs, of vLLM's `cache_config_info`."""
    line = re.search(rb"(?m)^vllm:cache_config_info\{(.*)\}", page)
    labels = dict(re.findall(r'(\w+)="([^"]*)"', line[1].decode("utf-8", "replace"))) if line else {}
    return {name: labels[name][:32] for name in FLAGS if name in labels}


def _owners(body: bytes) -> set[str]:
    """All `owned_by` of a model list; empty where the body is no such list."""
    try:
        return {card["owned_by"] for card in _object(body)["data"]} - {""}
    except (KeyError, TypeError):
        return set()


def _has_series(page: bytes, prefix: bytes) -> bool:
    """Whether a line of the page begins with the prefix (its colon may be `_`); a mention inside a line does not count."""
    return any(page.startswith(p) or b"\n" + p in page for p in (prefix, prefix.replace(b":", b"_")))


def _marked(body: bytes, mark: KindMark) -> bool:
    found = _object(body)
    return all(key in found and value in (None, found[key]) for key, value in mark.keys.items())


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
