"""Generated against delivered tokens: in large batches, with events that hold several tokens, read at odd moments."""

from __future__ import annotations

import random

import pytest

from sidecar.events import Admitted, FirstToken, RequestSize
from sidecar.health.latency_model import LatencyModel
from sidecar.health.partial_hangs import PartialHangDetector
from sidecar.health.progress import Key, Progress, SilenceLimits
from sidecar.readings import EngineSample

RATE = 25.0  # tokens per second of each running sequence
FLUSH = 0.2  # seconds between a relay's reports


class Batch:
    """Streams of one engine next to the detector: each is reported at its own moments, the page is seen later."""

    def __init__(self, others: int, tokens: float, seed: int) -> None:
        self.random = random.Random(seed)
        self.now, self.generated, self.due = 1000.0, 0.0, 1000.0
        self.scrape: tuple[float, EngineSample] | None = None
        self.before: EngineSample | None = None
        self.tokens = tokens  # of an event
        self.parts, self.learned = PartialHangDetector(SilenceLimits()), LatencyModel(slowness=1.0, token_seconds=0.04)
        self.others = [self.begin(str(n)) for n in range(others)]
        self.ended: list[Key] = []

    def begin(self, id: str) -> Key:
        event = Admitted(id, self.now, "t", "m", "chat", True, RequestSize(100, output=100), None, 1.0)
        self.parts.table.admit((0, id), event, 0.1, 0)
        self.parts.table.first_token((0, id), FirstToken(id, self.now))
        return (0, id)

    def run(self, seconds: float, hidden: int = 0, stuck: int = 0) -> None:
        """Time in which `hidden` more sequences get tokens that are not delivered, and `stuck` ones get none."""
        for n in range(round(seconds / FLUSH)):
            due = sorted((self.now + FLUSH * self.random.random(), key) for key in self.others)
            for at, key in due:
                self.parts.deliver(key, round(RATE * FLUSH / self.tokens), at)
            self.now += FLUSH
            self.generated += RATE * FLUSH * (len(self.others) + hidden)
            running = len(self.others) + hidden + stuck
            self.page(EngineSample(running=running, waiting=0, generation_tokens=self.generated))
            if n % 2:
                self.parts.tick(self.now, self.now, trusted=True)
                self.ended += self.parts.judge(self.now, None, self.learned)[1]

    def page(self, sample: EngineSample) -> None:
        """A page is made about once a second, and seen 0.4 s later."""
        if self.scrape is None and self.now >= self.due:
            self.scrape = (self.now, sample)
            self.due = self.now + 1.0 + 0.3 * self.random.random()
        elif self.scrape is not None and self.now >= self.scrape[0] + 0.4:
            self.parts.table.read(self.scrape[1], self.scrape[0], self.before, canary=False)
            self.before, self.scrape = self.scrape[1], None


@pytest.mark.parametrize(("others", "tokens"), [(1, 1.0), (1, 2.5), (8, 1.0), (8, 2.5), (64, 1.0), (64, 2.5)])
def test_one_silent_stream_of_a_batch_that_is_worked_for_is_left_alone(others: int, tokens: float) -> None:
    """The counter moves by one part in 65 more than what is delivered, for ten minutes."""
    for seed in range(2):
        batch = Batch(others, tokens, seed)
        batch.run(300)
        batch.begin("silent")
        batch.run(600, hidden=1)
        assert batch.ended == []


@pytest.mark.parametrize("others", [8, 64])
def test_events_that_hold_fewer_tokens_than_before_take_nothing_from_a_silent_stream(others: int) -> None:
    """Under less load an engine sends each token by itself: what was measured before no longer holds."""
    batch = Batch(others, 2.5, 1)
    batch.run(300)
    batch.begin("silent")
    batch.tokens = 1.0
    batch.run(600, hidden=1)
    assert batch.ended == []


@pytest.mark.parametrize(("others", "tokens"), [(1, 1.0), (1, 2.5), (8, 1.0), (8, 2.5), (64, 1.0)])
def test_one_silent_stream_of_a_batch_that_is_stuck_is_ended(others: int, tokens: float) -> None:
    """The counter moves by no more than what is delivered: it is ended within two minutes, and no other is."""
    for seed in range(2):
        batch = Batch(others, tokens, seed)
        batch.run(300)
        key = batch.begin("silent")
        batch.run(120, stuck=1)
        assert batch.ended == [key]


def test_processes_that_take_turns_behind_one_port_generate_nothing_by_that() -> None:
    """Each page is compared with the one before of the same process."""
    parts, progress = PartialHangDetector(SilenceLimits()), Progress(SilenceLimits())
    for n in range(20):
        page = EngineSample(running=1, waiting=0, generation_tokens=1000.0 if n % 2 else 500.0)
        progress.engine(page, 10.0 + n)
        parts.table.read(page, 10.0 + n, progress.before, canary=False)
    assert parts.table.balance.level <= 500, "only the first turn looks like growth"
