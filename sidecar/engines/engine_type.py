"""The records that describe one engine: what its metrics are called, how it takes a canary, where it says that it rests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"
EMBEDDINGS: Final = "/v1/embeddings"


@dataclass(frozen=True, slots=True)
class Series:
    """Sample lines of a metrics page: those of `name`, with the label pair `label` where one is given.

    Instead, `parts` may name a label whose non-empty values break a total down: such lines are left out, the total stays.
    `at_end`: a counter that moves only when a request ends.
    """

    name: str
    label: str = ""
    parts: str = ""
    at_end: bool = False


@dataclass(frozen=True, slots=True)
class KvCapacity:
    """Where the tokens of a rank's KV cache stand: the value of `name`, or a product of labels, the first of `products` that is there.

    Of ranks that differ the largest counts: a request is ended that exceeds it, and one that might fit must not be.
    """

    name: str
    products: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class KindSign:
    """A JSON object at `path` whose `key` is true while the engine rests on purpose; `means` is the reason code."""

    path: str
    key: str
    means: str


@dataclass(frozen=True, slots=True)
class KindMark:
    """A JSON object at `path` by which an engine is known: it has all of `keys`, with the value that is given, or any (None)."""

    path: str
    keys: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One engine. `series` maps a field of EngineSample to what it is read from: the first that the page has.

    The engine sleeps while `awake` is 0. Any of `signs` may be missing (404) on a given engine; the first that is true counts.
    `canary_paths` are tried in this order until one passes. `priority` puts a canary before all other requests; where the
    engine's own settings decide that, `read_priority` makes it of the JSON at the first of `info_paths` that answers.
    """

    name: str
    series: Mapping[str, tuple[Series, ...]] = field(default_factory=dict)
    metrics_path: str = "/metrics"
    contact_path: str = "/v1/models"  # asked where there is no page: answered by the API process alone, and cheap
    page_hangs: bool = False  # the page can hang with the engine while the API answers
    awake: Series | None = None
    capacity: KvCapacity | None = None
    rank: str = ""  # the label that numbers data-parallel ranks
    signs: tuple[KindSign, ...] = ()
    wakes: bool = False  # a request wakes it from its sleep, so it is looked at before each canary
    canary_model: str = ""  # a name that it always takes; else models.py chooses of its model list
    canary_paths: tuple[str, ...] = (COMPLETIONS, CHAT, EMBEDDINGS)
    tells_usage: bool = True  # takes stream_options.include_usage
    priority: int | None = None
    info_paths: tuple[str, ...] = ()
    read_priority: Callable[[bytes], int | None] | None = None
    honours_uuid: bool = False  # an image part's `uuid` is its cache key
    owner: str = ""  # `owned_by` in /v1/models
    prefix: str = ""  # of its series' names
    marks: tuple[KindMark, ...] = ()


def plain(**names: str) -> dict[str, tuple[Series, ...]]:
    """Fields that are read from one series each."""
    return {field_: (Series(name),) for field_, name in names.items()}
