"""Metrics pages: vLLM's are recorded from the real engine, the others' are written after published names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sidecar.engines.metrics_parser import parse
from sidecar.engines.registry import KINDS, recognise
from sidecar.readings import EngineSample, RankSample

PAGES = Path(__file__).with_name("pages")

CACHE_OFF: dict[str, Any] = {"cached_tokens": 0, "cache_queries": 0}  # vLLM with --no-enable-prefix-caching

# page, kind, what is read from it; the order is EngineSample's.
READ = [
    (
        "vllm-0.32-idle.txt",
        "vllm",
        EngineSample(0, 0, 0, 0, 0, 0, 0, 1795256469.0, False, 1048576, (RankSample(0, 0, 0, 0),), **CACHE_OFF),
    ),
    (
        "vllm-0.32-busy.txt",
        "vllm",
        EngineSample(
            3,
            0,
            0.0007325112928824318,
            81,
            866,
            7,
            580,
            1795241930.4,
            False,
            1048576,
            (RankSample(0, 3, 0, 866),),
            **CACHE_OFF,
        ),
    ),
    (
        "vllm-0.32-paused.txt",
        "vllm",
        EngineSample(
            0, 0, 0, 25, 3340, 3, 839, 1795256469.0, False, 1048576, (RankSample(0, 0, 0, 3340),), **CACHE_OFF
        ),
    ),
    (
        "vllm-0.32-asleep.txt",
        "vllm",
        EngineSample(0, 0, 0, 25, 3340, 3, 839, 1795256469.0, True, 1048576, (RankSample(0, 0, 0, 3340),), **CACHE_OFF),
    ),
    (
        "vllm-0.32-two-ranks-busy.txt",
        "vllm",
        EngineSample(
            4,
            0,
            0.001220852154804053,
            25,
            2402,
            3,
            1203,
            1795256507.5,
            False,
            1048576,
            (RankSample(0, 2, 0, 1142), RankSample(1, 2, 0, 1260)),
            **CACHE_OFF,
        ),
    ),
    (
        "sglang-0.5.23.txt",
        "sglang",
        EngineSample(5, 1, 0.28, 150, 260, 8, 34, None, None, 453150, cached_tokens=64, cache_queries=100),
    ),
    (
        "sglang-0.5.23-two-ranks.txt",
        "sglang",
        EngineSample(
            7,
            2,
            0.9,
            60,
            90,
            8,
            None,
            None,
            None,
            4096,
            (RankSample(0, 3, 0, 40), RankSample(1, 4, 2, 50)),
            cache_queries=None,
        ),
    ),
    ("tgi-3.3.7.txt", "tgi", EngineSample(6, 3, None, 1400, 700, 7, 42, tokens_at_end=True)),
    ("tei-1.9.txt", "tei", EngineSample(None, 3, None, 340, None, 9, 7)),
    ("llamacpp.txt", "llamacpp", EngineSample(1, 2, None, 512, 64, None, 70, tokens_at_end=True)),
    # Recorded from it after prompts of 84, 84, 84 and 8 tokens; of the second and third 83 were cached.
    (
        "llamacpp-b10434.txt",
        "llamacpp",
        EngineSample(0, 0, None, 94, 24, None, 24, tokens_at_end=True, cached_tokens=166),
    ),
]


@pytest.mark.parametrize(("page", "kind", "sample"), READ, ids=[page for page, _, _ in READ])
def test_each_kind_reads_its_own_page(page: str, kind: str, sample: EngineSample) -> None:
    """A page as that engine writes it gives its numbers, with ranks apart, and is recognised by its series alone."""
    text = (PAGES / page).read_bytes()
    assert parse(text, KINDS[kind]) == sample
    assert recognise({"/metrics": text}) == kind


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.series])
def test_every_series_of_the_table_is_on_a_page(kind: str) -> None:
    """No row of the table names a series that no page of that engine has; what an engine dropped is named here."""
    dropped = {"llamacpp:kv_cache_usage_ratio"}
    of = "vllm" if kind == "scripted" else kind
    text = "\n".join(page.read_text() for page in PAGES.glob(f"{of}*.txt"))
    named = {series.name for options in KINDS[kind].series.values() for series in options} - dropped
    assert [name for name in named if f"\n{name}{{" not in text and f"\n{name} " not in text] == []


@pytest.mark.parametrize("page", sorted(path.name for path in PAGES.glob("*.txt")))
def test_every_page_says_where_it_comes_from(page: str) -> None:
    """The first line of a page has its origin and version, and each page is read above."""
    first = (PAGES / page).read_text().splitlines()[0]
    assert first.startswith(("# Recorded", "# Written after"))
    assert page in {name for name, _, _ in READ}


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_no_kind_reads_another_kinds_page(kind: object) -> None:
    """A page of another engine gives only what all processes publish: no foreign numbers are used."""
    for name, of, _ in READ:
        if of != kind.name and (of, kind.name) != ("vllm", "scripted"):  # type: ignore[attr-defined]
            read = parse((PAGES / name).read_bytes(), kind)  # type: ignore[arg-type]
            assert read in (EngineSample(), EngineSample(started_wall=read.started_wall))


def test_the_cached_share_is_that_of_the_engines_counters() -> None:
    """llama.cpp's prompt counter leaves the cached part out, other engines count all prompt tokens looked up."""
    page = (PAGES / "llamacpp-b10434.txt").read_bytes()
    share = parse(page, KINDS["llamacpp"]).cached_share(EngineSample(prompt_tokens=84, cached_tokens=0))
    assert share == 166 / 176  # after the first prompt: 83 of 84, 83 of 84, 0 of 8
    looked_up = EngineSample(cached_tokens=96, cache_queries=200)
    assert looked_up.cached_share(EngineSample(cached_tokens=0, cache_queries=100)) == 0.96
    assert looked_up.cached_share(EngineSample()) == 0.48 and looked_up.cached_share(looked_up) == 0
    assert EngineSample(cached_tokens=0, cache_queries=0).cached_share(looked_up) is None
    assert EngineSample(prompt_tokens=5).cached_share(EngineSample()) is None
