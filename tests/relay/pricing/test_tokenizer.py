"""Counting a prompt's tokens: exact for short texts, near for long ones, and never waited for too long."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.events import Admitted, Usage
from sidecar.load.body_scan import find
from sidecar.load.cost_model import Coefficients
from sidecar.load.estimator import ChatTemplateOverhead, Estimator
from sidecar.load.found import Found
from sidecar.load.request_shape import RequestShape
from sidecar.relay.pricing import tokenizer as counting
from sidecar.relay.pricing.charge import Pricing
from sidecar.relay.pricing.tokenizer import MAX_WAITING_COUNTS, TokenCount, TokenCounter, windows
from sidecar.settings import Settings
from sidecar.tools.doctor import machine
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine
from tests.relay.work import FAST

from ...waiting import PATIENCE


def found(payload: dict[str, Any]) -> Found:
    """What a scan finds in a body."""
    seen = find(json.dumps(payload).encode())
    assert seen is not None
    return seen


TEXT = "The quick brown fox jumps over the lazy dog, and then 3.1415 times more: f(x) = {x: 1}. "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's directory with a small byte-level BPE."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 50, trainer)
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def counter(model: Path) -> Iterator[TokenCounter]:
    loaded = counting.load_counter(str(model))
    assert loaded is not None
    loaded._deadline = 30.0  # a busy machine is not what is tested here
    yield loaded
    loaded.close()


@pytest.fixture
def slow() -> Iterator[tuple[TokenCounter, threading.Event]]:
    """A counter that counts only once it is let, and its leave."""
    leave = threading.Event()

    def encode(texts: list[str]) -> list[str]:
        assert leave.wait(PATIENCE)
        return texts

    counter = TokenCounter(encode, 0.01)
    yield counter, leave
    leave.set()
    counter.close()


async def test_a_short_text_is_counted_as_the_tokenizer_does(counter: TokenCounter, model: Path) -> None:
    """All texts, whatever script, what is no sound Unicode, and a data URL; token ids and images are not text."""
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(model / "tokenizer.json"))
    texts = [TEXT, "жизнь 你好", "", "a\ud800b", "data:image/png;base64,xxxx"]
    image = {"type": "image_url", "image_url": {"url": texts[-1]}}
    count = await counter.count(found({"prompt": texts, "messages": [{"content": [image]}], "model": "m"}))
    sound = [text.encode(errors="replace").decode() for text in texts]
    assert count == TokenCount(sum(len(own.encode(text, add_special_tokens=False)) for text in sound), True)
    assert await counter.count(found({"prompt": [1, 2, 3]})) == TokenCount(0, True)


async def test_a_long_text_is_counted_by_windows(counter: TokenCounter) -> None:
    """A hundred thousand characters cost no more than four thousand, and come out within a few percent."""
    short = await counter.count(found({"prompt": TEXT * 10}))
    long = await counter.count(found({"prompt": TEXT * 1000}))
    assert short is not None and long is not None and not long.exact
    assert abs(long.tokens - 100 * short.tokens) < 3 * short.tokens


@given(st.lists(st.text(max_size=300), max_size=12), st.integers(16, 400))
def test_windows_are_bounded_and_stand_for_the_whole(texts: list[str], whole: int) -> None:
    """Never more than `whole` characters, and their number times the factor is that of the texts."""
    seen = found({"prompt": texts})
    assert seen.texts is not None
    parts, times = windows(seen.texts, seen.characters, whole, 8)
    length, taken = sum(map(len, texts)), sum(map(len, parts))
    assert taken <= whole and taken * times == pytest.approx(length)
    assert length > whole or (parts, times) == ([text for text in texts if text], 1.0)


async def test_what_takes_too_long_is_not_waited_for(slow: tuple[TokenCounter, threading.Event]) -> None:
    """No count by the deadline, none at all while too many wait, and counts again when the thread is free."""
    counter, leave = slow
    assert (
        await asyncio.gather(*(counter.count(found({"prompt": "x"})) for _ in range(MAX_WAITING_COUNTS)))
        == [None] * MAX_WAITING_COUNTS
    )
    assert await counter.count(found({"prompt": "x"})) is None
    leave.set()
    async with asyncio.timeout(PATIENCE):
        while await counter.count(found({"prompt": "abc"})) != TokenCount(3, True):  # noqa: ASYNC110  the thread sends no signal
            await asyncio.sleep(0.01)


async def test_a_tokenizer_that_breaks_leaves_the_estimate(caplog: pytest.LogCaptureFixture) -> None:
    """No count, a line without the text, and the next request is tried again."""

    def encode(texts: list[str]) -> list[str]:
        raise ValueError(texts[0])

    counter = TokenCounter(encode, 30.0)
    assert await counter.count(found({"prompt": "secret"})) is None
    assert "ValueError" in caplog.text and "secret" not in caplog.text
    counter.close()


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_without_a_tokenizer_there_is_no_counter(tmp_path: Path, content: str | None) -> None:
    """No file, or none that can be used: a start goes on, by the ratio."""
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    assert counting.load_counter(str(tmp_path)) is None and counting.load_counter("") is None


def test_the_doctor_says_whether_tokens_are_counted(model: Path) -> None:
    """With a tokenizer they are."""
    assert machine.tokenizer(Settings(model=str(model))).level == "ok"
    assert machine.tokenizer(Settings()).level == "absent"


def test_what_a_template_adds_is_learned_as_a_line() -> None:
    """From usage and count: 7 a message and 20 on top, not ChatML's 4 and 3; without spread, only the level."""
    template = ChatTemplateOverhead()
    assert template.tokens(5) == pytest.approx(23)
    for n in range(200):
        template.add(1 + n % 5, 20 + 7 * (1 + n % 5))
    assert template.tokens(10) == pytest.approx(90, abs=1)
    for _ in range(500):
        template.add(3, 60)
    assert template.tokens(3) == pytest.approx(60, abs=1)


def test_a_counted_chat_is_exact_once_its_template_is_known() -> None:
    """After some answers the estimate is the engine's own number."""
    estimator, shape = Estimator(Coefficients()), RequestShape("m", text_bytes=400, messages=2)
    for n in range(100):
        estimator.learn(
            "t", RequestShape("m", text_bytes=400, messages=1 + n % 4), Usage(100 + 12 + 5 * (1 + n % 4), 5), 100
        )
    assert estimator.estimate("t", shape, [], 321).work.uncached == 321 + 12 + 10


@pytest.mark.parametrize("text", [TEXT, f"data:text/plain;base64,{TEXT}"])
async def test_a_request_is_held_by_its_count(rig: Callable[..., Any], counter: TokenCounter, text: str) -> None:
    """Through the relay: the estimate uses the tokenizer's count, not the ratio's; also for a data URL."""
    counted = await counter.count(found({"prompt": text}))
    assert counted is not None
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url, pricing=Pricing(Estimator(Coefficients()), None, counter))
        body = {"model": "scripted", "prompt": text, "max_tokens": 2}
        async with r.client.post(r.url + "/v1/completions", json=body) as got:
            assert got.status == 200
    assert [a.expected.uncached for a in r.emitted.of(Admitted)] == [counted.tokens] != [round(len(text) / 4)]
