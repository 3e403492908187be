"""The records that describe an engine: its metrics, its canaries, its signs of sleep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sidecar.engines.canary_rows import CHAT, COMPLETIONS, EMBEDDINGS, CanaryRow

MODELS: Final = "/v1/models"


@dataclass(frozen=True, slots=True)
class Series:
    """Sample lines of a metrics page: those of `name`, with the label pair `label` if one is given.

    Alternatively, `parts` names a label that breaks a total down: only lines without it or with an empty value count.
    `at_end`: a counter that moves only when a request ends.
    """

    name: str
    label: str = ""
    parts: str = ""
    at_end: bool = False


@dataclass(frozen=True, slots=True)
class KvCapacity:
    """Source of the KV cache size of a rank in tokens: the value of `name`, or the first product of labels that exists.

    The largest rank counts: a larger request is rejected, and one that might fit must not be.
    """

    name: str
    products: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class KindSign:
    """A JSON object at `path` whose `key` is true while the engine sleeps or is paused; `means` is the reason code."""

    path: str
    key: str
    means: str


@dataclass(frozen=True, slots=True)
class KindMark:
    """A JSON object at `path` that identifies an engine: it has all `keys`, with the given value or any (None)."""

    path: str
    keys: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One engine. `series` maps a field of EngineSample to its sources; the first on the page counts.

    The engine sleeps while `awake` is 0. Any of `signs` may be missing (404); the first that is true counts.
    `is_fcfs`: of two requests of one model and priority, without a grammar or a transfer, the earlier is served first.
    `steps_compute`: `iterations` counts batches that were computed, so that a long prefill moves it.
    `has_plugin`: it loads the sidecar's plug-in, which reports its scheduler's steps.
    `canaries` are tried in this order until one passes. `priority` puts a canary before all other requests; if the
    engine's settings decide that, `read_priority` derives it from the first of `info_paths` that responds.
    `idle_fields` are members of a canary's body while nothing runs. `canary_disturbs`: each canary costs users a cache,
    or keeps a model loaded; `slots_cache`: so it is where the engine has a single slot.
    """

    name: str
    series: Mapping[str, tuple[Series, ...]] = field(default_factory=dict)
    metrics_path: str = "/metrics"
    contact_path: str = "/v1/models"  # requested if there is no page: cheap, and needs the API process only
    is_fcfs: bool = False
    steps_compute: bool = False
    has_plugin: bool = False
    page_hangs: bool = False  # the page can hang with the engine while the API responds
    awake: Series | None = None
    capacity: KvCapacity | None = None
    rank: str = ""  # the label that numbers data-parallel ranks
    signs: tuple[KindSign, ...] = ()
    wakes: bool = False  # a request wakes it, so its sleep state is polled before each canary
    canary_model: str = ""  # a name that it always accepts; else model_list.py chooses from its model list
    canaries: tuple[CanaryRow, ...] = (COMPLETIONS, CHAT, EMBEDDINGS)
    idle_fields: Mapping[str, Any] = field(default_factory=dict)
    canary_disturbs: bool = False
    slots_cache: bool = False
    model_paths: tuple[str, ...] = (MODELS,)  # of the models that can be asked; the first that exists
    identity_paths: tuple[str, ...] = ()  # what says its version and sizes, besides `model_paths`
    reports_usage: bool = True  # accepts stream_options.include_usage
    priority: int | None = None
    info_paths: tuple[str, ...] = ()
    read_priority: Callable[[bytes], int | None] | None = None
    owner: str = ""  # `owned_by` in /v1/models
    prefix: str = ""  # of its series' names
    marks: tuple[KindMark, ...] = ()


def plain(**names: str) -> dict[str, tuple[Series, ...]]:
    """Fields with one series each."""
    return {field_: (Series(name),) for field_, name in names.items()}
