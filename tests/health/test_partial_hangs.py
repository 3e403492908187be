"""Parts that hang alone while the engine works: what is found, what is ended, and what must not be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from msgspec import structs

from sidecar.events import Admitted, CanaryResult, FirstToken, RequestBlocked, RequestSize, Settled
from sidecar.health.latency_model import LatencyModel
from sidecar.health.partial_hangs import (
    MAX_ABORTS_PER_WINDOW,
    MIN_REPEATED_STUCK,
    SEVERE_AFTER_S,
    PartialHang,
    PartialHangDetector,
)
from sidecar.health.progress import Key, SilenceLimits
from sidecar.readings import EngineSample, RankSample


@dataclass
class Engine:
    """Parts next to a scripted engine; each `tick` is a second in which, unless `silent`, something progresses."""

    now: float = 1000.0
    parts: PartialHangDetector = field(default_factory=lambda: PartialHangDetector(SilenceLimits()))
    learned: LatencyModel = field(default_factory=lambda: LatencyModel(slowness=1.0, token_seconds=0.02))
    sample: EngineSample | None = None
    requests: int = 0
    ended: list[Key] = field(default_factory=list)
    finding: PartialHang | None = None

    def admit(self, prefill: float = 0.1, output: int = 100, **changes: Any) -> Key:
        self.requests += 1
        key = (0, str(self.requests))
        event = Admitted(key[1], self.now, "t", "m", "chat", True, RequestSize(1000, output=output), output, 1.0)
        self.parts.table.admit(key, structs.replace(event, **changes), prefill, 0)
        return key

    def first(self, key: Key) -> None:
        self.parts.table.first_token(key, FirstToken(key[1], self.now))
        self.deliver(key, tokens=1)

    def deliver(self, *keys: Key, tokens: int = 5) -> None:
        for key in keys:
            self.parts.deliver(key, tokens, self.now)

    def settle(self, key: Key, tokens: int = 50) -> None:
        self.parts.settle(key, Settled(key[1], self.now, "ok", 200, None, tokens, 4, None, self.now, 0.0))

    def leave(self, key: Key) -> None:
        """Its client hangs up without a byte."""
        settled = Settled(key[1], self.now, "client_cancelled", 0, None, 0, 0, None, 1000.0, 0.0)
        self.parts.settle(key, settled)

    def canary(self, outcome: Any) -> None:
        self.parts.canary_ended(CanaryResult(outcome, self.now, self.now, 8.0), idle=True)

    def serve(self, **changes: Any) -> None:
        """A request that is served at once."""
        key = self.admit(**changes)
        self.first(key)
        self.settle(key)

    def decoding(self, *, tokens: int = 5) -> Key:
        key = self.admit()
        self.first(key)
        self.deliver(key, tokens=tokens)
        return key

    def tick(self, seconds: int = 1, *moving: Key, silent: bool = False, trusted: bool = True) -> None:
        for _ in range(seconds):
            self.now += 1.0
            self.deliver(*moving, tokens=1)
            self.parts.tick(self.now, None if silent else self.now, trusted=trusted)
            self.finding, ends = self.parts.judge(self.now, self.sample, self.learned)
            self.ended.extend(ends)


def test_a_stream_that_is_silent_while_others_move_is_ended_once() -> None:
    """Its own silence counts, not the engine's; no one else is ended, and readiness stays."""
    e = Engine()
    stuck, other = e.decoding(), e.decoding()
    e.tick(55, other)
    assert e.ended == []
    e.tick(60, other)
    assert e.ended == [stuck]
    assert e.finding is None


def test_no_stream_is_stuck_while_the_whole_engine_or_the_sidecar_hangs() -> None:
    """The clock of parts stands still in a silence of all, and while the sidecar itself is unhealthy."""
    e = Engine()
    e.decoding(), e.decoding()
    e.tick(600, silent=True)
    e.tick(600, trusted=False)
    e.tick(5)
    assert e.ended == [] and e.finding is None


def test_a_client_that_does_not_read_keeps_its_own_answer_waiting() -> None:
    """Backpressure is no silence of the engine; the count restarts once it is over."""
    e = Engine()
    slow, other = e.decoding(), e.decoding()
    e.parts.table.block(slow, RequestBlocked(slow[1], e.now, True))
    e.tick(600, other)
    assert e.ended == []
    e.parts.table.block(slow, RequestBlocked(slow[1], e.now, False))
    e.tick(50, other)
    assert e.ended == []
    e.tick(30, other)
    assert e.ended == [slow]


def test_a_request_that_waits_is_never_ended_and_overtaking_withdraws_readiness() -> None:
    """Waiting in turn may take minutes; being passed by later ones of the same kind may not."""
    e = Engine()
    e.parts.table.is_fcfs = True
    running = e.decoding()
    e.admit()
    e.tick(300, running)
    assert e.finding is None
    for _ in range(3):
        e.decoding()
    e.tick(1, running)
    assert e.ended == [] and e.finding is not None and e.finding.reason == "request_overtaken"
    e.tick(600, running)
    assert e.finding is not None and not e.finding.severe, "the engine serves others: no restart"


def test_requests_that_come_together_are_served_in_any_order() -> None:
    """Of eight at once the first may be the last in the engine's queue: its front end reads them on several threads."""
    e = Engine()
    e.parts.table.is_fcfs = True
    running = e.decoding()
    first, *others = (e.admit() for _ in range(8))
    e.tick(100, running)
    for key in others:
        e.first(key)
        e.settle(key)
        e.tick(30, running)
        assert e.finding is None
    for _ in range(3):
        e.serve()
    e.tick(1, running)
    assert e.finding is not None and e.finding.reason == "request_overtaken", "these came later"
    assert first in e.parts.table.streams


@pytest.mark.parametrize("later", [{"priority": -5}, {"model": "adapter-2"}, {"reorders": True}])
def test_requests_of_another_lane_may_go_first(later: dict[str, Any]) -> None:
    """Priority scheduling, adapters and grammars reorder the queue of a healthy engine."""
    e = Engine()
    e.parts.table.is_fcfs = True
    running = e.decoding()
    e.admit()
    for _ in range(9):
        e.serve(**later)
        e.tick(30, running)
    assert e.ended == [] and e.finding is None


def test_overtaking_proves_nothing_where_the_order_is_not_known() -> None:
    """SGLang's lpm serves the longest cached prefix first."""
    e = Engine()
    running = e.decoding()
    e.admit()
    for _ in range(9):
        e.serve()
        e.tick(30, running)
    assert e.ended == [] and e.finding is None


def test_a_stream_that_may_have_been_put_back_into_the_queue_is_not_ended() -> None:
    """Priority scheduling preempts: while requests wait, only later ones of its lane show that it is stuck."""
    e = Engine(sample=EngineSample(running=4, waiting=2, kv_usage=0.3))
    e.parts.table.is_fcfs = True
    stuck, other = e.decoding(), e.decoding()
    for _ in range(4):
        e.serve(priority=-5)
        e.tick(60, other)
    assert e.ended == []
    for _ in range(3):
        e.serve()
    e.tick(1, other)
    assert e.ended == [stuck]


def test_users_who_leave_unserved_withdraw_readiness_until_something_is_delivered() -> None:
    """Zombies may hold all slots and move every counter: for users nothing moves."""
    e = Engine()
    for _ in range(3):
        key = e.admit()
        e.tick(30)
        e.leave(key)
    e.tick(200)
    assert e.finding is not None and e.finding.reason == "work_unserved" and not e.finding.severe
    e.serve()
    e.tick(1)
    assert e.finding is None


def test_what_the_engine_generates_for_nobody_withdraws_readiness() -> None:
    """Its detokenizer hangs: each new request moves the counter of tokens, and no client gets one."""
    e = Engine()
    generated = 0.0
    for second in range(120):
        served = second < 20
        key = e.admit(output=60, max_output=60)
        if served:
            e.first(key)
            e.settle(key, tokens=60)
        generated += 60
        before, e.sample = e.sample, EngineSample(generation_tokens=generated, running=1, waiting=0)
        e.tick(1)
        e.parts.table.read(e.sample, e.now, before, canary=False)
        assert served is False or e.finding is None
    assert e.finding is not None and e.finding.reason == "work_unserved" and not e.finding.severe


def test_users_who_leave_together_are_one_process_that_ends() -> None:
    """A batch client that stops takes all its requests with it."""
    e = Engine()
    keys = [e.admit() for _ in range(12)]
    e.tick(30)
    for key in keys:
        e.leave(key)
    e.tick(1)
    assert e.finding is None


def test_users_who_leave_at_once_or_are_served_are_no_finding() -> None:
    """A stop button is no fault of the engine."""
    e = Engine()
    for _ in range(9):
        key = e.admit()
        e.tick(1)
        e.leave(key)
    running = e.decoding()
    for _ in range(9):
        key = e.admit()
        e.tick(30, running)
        e.leave(key)
    e.tick(1)
    assert e.finding is None or e.finding.reason != "work_unserved"


def test_connections_of_which_some_are_never_answered_are_a_finding() -> None:
    """One of two API processes hangs: half of the canaries starve, the others pass."""
    e = Engine()
    for n in range(8):
        e.canary("ok" if n % 2 else "starved")
        e.tick(7)
    assert e.finding is not None and e.finding.reason == "connection_silent"
    for _ in range(8):
        e.canary("ok")
    e.tick(1)
    assert e.finding is None


def test_canaries_of_an_idle_time_restart_no_engine_that_serves_now() -> None:
    """They are not asked while users are served, so what they found grows old; it is forgotten after five minutes."""
    e = Engine()
    for n in range(8):
        e.canary("ok" if n % 2 else "starved")
    running = e.decoding()
    e.tick(250, running)
    assert e.finding is not None and e.finding.reason == "connection_silent" and not e.finding.severe
    e.tick(60, running)
    assert e.finding is None


def test_a_hang_and_its_end_are_no_silent_connection() -> None:
    """Canaries that starve in a row and pass in a row are of the whole engine."""
    e = Engine()
    for outcome in ("ok", "ok", "starved", "starved", "starved", "ok", "ok"):
        e.canary(outcome)
    e.tick(1)
    assert e.finding is None or e.finding.reason != "connection_silent"


def test_prefill_done_meanwhile_explains_a_silence() -> None:
    """Where prefills go first, decodes starve for as long as prefills take: nothing is stuck."""
    e = Engine()
    e.decoding(), e.decoding()
    for _ in range(200):
        e.first(e.admit(prefill=1.0))
        e.tick(1)
    assert e.ended == [] and e.finding is None


def test_an_answer_that_is_held_back_gets_the_time_of_its_tokens() -> None:
    """A tool call is often buffered until it is whole."""
    e = Engine(learned=LatencyModel(slowness=1.0, token_seconds=0.1))
    key = e.admit(output=2000)
    e.first(key)
    other = e.decoding()
    e.tick(180, other)
    assert e.ended == []


def test_preempted_streams_get_more_time_while_the_cache_is_full() -> None:
    """Under memory pressure an engine puts streams back into its queue."""
    e = Engine(sample=EngineSample(running=9, waiting=4, kv_usage=0.97))
    e.parts.table.is_fcfs = True
    stuck, other = e.decoding(), e.decoding()
    e.tick(5, other)
    for _ in range(3):
        e.serve()
    e.tick(200, other)
    assert e.ended == []
    e.tick(200, other)
    assert e.ended == [stuck]


def test_stuck_streams_that_repeat_are_a_finding_and_only_some_are_ended() -> None:
    """Distinct requests within a window withdraw readiness; the number that is ended is bounded."""
    e = Engine()
    for _ in range(MAX_ABORTS_PER_WINDOW + 5):
        e.decoding()
    other = e.decoding()
    e.tick(90, other)
    assert e.finding is not None and e.finding.reason == "stream_stuck" and not e.finding.severe
    assert len(e.ended) == len(set(e.ended)) == MAX_ABORTS_PER_WINDOW >= MIN_REPEATED_STUCK
    e.tick(int(SEVERE_AFTER_S), other)
    assert e.finding is not None and e.finding.severe, "most of the open requests have been stuck for long"


def test_first_tokens_without_any_other_are_decodes_that_stall() -> None:
    """Prefill at full speed and no decode: one finding for all, and no stream is ended for it."""
    e = Engine()
    for n in range(80):
        if n % 2 == 0:
            e.first(e.admit())
        e.tick(1)
    assert e.finding is not None and e.finding.reason == "decode_stalled" and not e.finding.severe
    e.tick(int(SEVERE_AFTER_S) + 1)
    assert e.finding.severe and e.ended == []
    e.decoding()
    e.tick(1)
    assert e.finding is None


@pytest.mark.parametrize(("prefill", "cause"), [(0.1, "decode_stalled"), (1.0, "")])
def test_prefills_that_go_first_are_no_decodes_that_stalled(prefill: float, cause: str) -> None:
    """A whole engine that hangs at the end of a burst of prefills gets no reason of a part."""
    e = Engine()
    e.decoding()
    for _ in range(20):
        e.first(e.admit(prefill=prefill))
        e.tick(1)
    e.tick(10, silent=True)
    assert e.parts.suspected_cause(e.learned) == cause


def ranks(*rows: tuple[float, float]) -> EngineSample:
    """(running, generation tokens) by rank."""
    return EngineSample(running=1, ranks=tuple(RankSample(n, r, 0, g) for n, (r, g) in enumerate(rows)))


def test_a_rank_with_work_that_generates_nothing_while_others_do_is_silent() -> None:
    """Its own counter stands and it has work; an idle rank, or one whose counter moves, is well."""
    e = Engine()
    for n in range(59):
        e.sample = ranks((2, 100), (3, 100 + n), (0, 50))
        e.tick(1)
        assert e.finding is None
    for n in range(10):
        e.sample = ranks((2, 100), (3, 200 + n), (0, 50))
        e.tick(1)
    assert e.finding is not None and e.finding.reason == "rank_silent" and "rank 0" in e.finding.detail
    e.sample = None
    e.tick(1)
    assert e.finding is None, "a page that cannot be read proves nothing"


def test_a_rank_whose_gauge_froze_at_nothing_is_silent_if_a_request_is() -> None:
    """A rank that stopped may say that it has no work; the request that waits for it says otherwise."""
    e = Engine()
    other = e.decoding()
    for n in range(100):
        e.sample = ranks((0, 100), (3, 100 + n))
        e.tick(1, other)
    assert e.finding is None, "an idle rank is well"
    e.admit()
    for n in range(200):
        e.sample = ranks((0, 100), (3, 200 + n))
        e.tick(1, other)
    assert e.finding is not None and e.finding.reason == "rank_silent" and "rank 0" in e.finding.detail


def test_a_long_prefill_explains_a_silent_rank() -> None:
    """A 600k-token prompt keeps one rank's counter still for minutes."""
    e = Engine()
    e.admit(prefill=80.0)
    for n in range(200):
        e.sample = ranks((1, 100), (3, 100 + n))
        e.tick(1)
        assert e.finding is None


def test_admission_that_stands_while_requests_end_is_a_finding() -> None:
    """Places became free, requests wait, none is admitted; while none ends, a full batch explains it."""
    e = Engine(sample=EngineSample(running=4, waiting=2, kv_usage=0.3))
    running = [e.decoding() for _ in range(6)]
    e.admit()
    e.tick(100, *running)
    assert e.finding is None
    for key in running[:4]:
        e.settle(key)
    e.tick(2, *running[4:])
    assert e.finding is not None and e.finding.reason == "admission_stalled"


def test_a_prompt_that_never_fits_is_named_once_while_the_queue_stands() -> None:
    """Only while the page shows that nothing runs, requests wait, and the engine has been silent for a while."""
    e = Engine()
    full = EngineSample(running=0, waiting=2, kv_capacity_tokens=900)
    assert e.parts.oversized_prompt.find(full, 20.0) is None
    e.requests = 6
    key = e.admit()  # 1000 tokens
    assert e.parts.oversized_prompt.find(EngineSample(running=1, waiting=2, kv_capacity_tokens=900), 20.0) is None
    assert e.parts.oversized_prompt.find(EngineSample(running=0, waiting=2, kv_capacity_tokens=2000), 20.0) is None
    assert e.parts.oversized_prompt.find(full, 2.0) is None
    e.admit(expected=RequestSize(100_000, prompts=200, sequences=200))  # many prompts, none of which is large
    assert e.parts.oversized_prompt.find(full, 20.0) == key
    assert e.parts.oversized_prompt.find(full, 20.0) is None


def test_a_restarted_engine_starts_without_findings() -> None:
    """What the old process left stuck is not the new one's."""
    e = Engine()
    for _ in range(MIN_REPEATED_STUCK + 1):
        e.decoding()
    other = e.decoding()
    e.tick(90, other)
    assert e.finding is not None
    e.parts.reset()
    e.tick(1, other)
    assert e.finding is None


def test_a_request_that_waited_in_the_relay_is_new_when_it_is_sent_on() -> None:
    """Those that were served while it waited did not overtake it in the engine, and it has not waited there."""
    e = Engine()
    waiting, other = e.admit(), e.decoding()
    e.parts.table.block(waiting, RequestBlocked(waiting[1], e.now, True))
    for _ in range(30):
        e.settle(e.decoding())
        e.tick(10, other)
    e.parts.table.block(waiting, RequestBlocked(waiting[1], e.now, False))
    e.tick(100, other)
    assert (e.ended, e.finding) == ([], None)
