"""Used, failed and idle GPU time are the hours of all GPUs, their dollars the invoice, whatever happens in a day."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from sidecar.events import Admitted, Outcome, RequestSize, Settled
from sidecar.load.cost_model import Coefficients, unit_ms
from sidecar.load.gpu_price import GpuPrice
from sidecar.load.ledger import Ledger
from sidecar.report.fan_out import FanOut
from sidecar.report.metrics import Metrics
from sidecar.report.tracing import Tracing
from sidecar.report.usage_query import read
from sidecar.report.usage_rows import DAY_S, HOUR_S, IDLE, NO_CLIENT, UsageSums
from sidecar.report.usage_store import LATE_S, MAX_GAP_S, USAGE_FILE, UsageStore

CO, PRICE = Coefficients(), GpuPrice(8, 2.5)
PRICED = CO.fingerprint, unit_ms(CO)
NOON = 1_800_000_000 // DAY_S * DAY_S + DAY_S // 2
OUTCOMES: tuple[Outcome, ...] = ("ok", "ok", "ok", "ok", "client_cancelled", "engine_error", "stalled")


class Pod:
    """One pod's control process, its usage records, and a simulated clock: monotonic `now` and `wall` time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now, self.count, self.price = folder, 1000.0, 0, PRICE
        self.start()

    @property
    def wall(self) -> float:
        return NOON - 1000.0 + self.now

    def start(self) -> None:
        self.store, self.ledger = UsageStore(self.folder, 35, 64 << 20), Ledger(CO)
        tracing = Tracing("", "0")
        self.fan_out = FanOut(Metrics(), tracing, self.store, self.ledger.labels, lambda work: (), *PRICED)
        self.second()

    def second(self) -> None:
        """What the control loop does each second."""
        self.store.elapse(self.now, self.wall, self.price, CO.fingerprint)
        if self.store.is_due:
            self.store.write(self.store.take(), self.wall)

    def end(self) -> None:
        self.store.elapse(self.now, self.wall, self.price, CO.fingerprint)
        self.store.write(self.store.take(), self.wall)

    def request(self, outcome: Outcome, size: RequestSize, tenant: str) -> None:
        self.count += 1
        id = str(self.count)
        self.ledger.apply(0, Admitted(id, self.now, tenant, "m", "chat", True, size, None, 1.0))
        done = Settled(id, self.now + 3, outcome, 200, None, size.output, 900, self.now + 1, self.now, 0.0)
        settlement = self.ledger.apply(0, done)
        assert settlement is not None
        self.fan_out.on_settlement(settlement, self.price, self.wall)

    def sums(self, by: tuple[str, ...], since: float = 0.0, until: float = 2e9) -> dict[tuple[str, ...], UsageSums]:
        return dict(read(self.folder / USAGE_FILE, since, until, by))


def test_a_day_adds_up_to_the_invoice(tmp_path: Path) -> None:
    """Traffic by day and night, failures, control killed and restarted: within 1 % of 24 hours of 8 GPUs, $480."""
    rng, pod = random.Random(7), Pod(tmp_path)
    begun = pod.now
    while pod.now < begun + DAY_S:
        pod.now += 20.0
        for _ in range(rng.choice((0, 1, 5, 9)) if (pod.now - begun) % DAY_S < DAY_S / 2 else 0):
            size = RequestSize(rng.randrange(20_000), output=rng.randrange(2000))
            pod.request(rng.choice(OUTCOMES), size, rng.choice("abc"))
        pod.second()
        if rng.random() < 0.004:  # killed: what was not written is lost; or ended; a while later there is another one
            if rng.random() < 0.5:
                pod.end()
            pod.now += rng.choice((1.0, 20.0, 300.0))
            pod.start()
    pod.end()
    sums = pod.sums(("outcome",))
    used = sum(s.gpu_seconds for (outcome,), s in sums.items() if outcome in ("ok", "client_cancelled"))
    failed = sum(s.gpu_seconds for (outcome,), s in sums.items() if outcome in ("engine_error", "stalled"))
    idle = sums[IDLE,].gpu_seconds
    hours = (pod.now - begun) / HOUR_S * 8
    assert used > 0.05 * idle and failed > 0.01 * idle, "the day shows what it should"
    assert (used + failed + idle) / HOUR_S == pytest.approx(hours, rel=0.01)
    assert sum(s.dollars for s in sums.values()) == pytest.approx(hours * 2.5, rel=0.01)
    by_hour = [s.gpu_seconds for s in pod.sums(("hour",)).values()]
    assert all(total == pytest.approx(8 * HOUR_S, rel=0.02) for total in by_hour[1:-1]), "each hour does, too"


def test_a_request_subtracts_its_time_from_idle_time(tmp_path: Path) -> None:
    """What is idle is what is left; its row has no tenant, and is no request."""
    pod = Pod(tmp_path)
    pod.now += 60.0
    pod.request("ok", RequestSize(3500, output=300), "a")
    pod.end()
    sums = pod.sums(("tenant", "outcome"))
    used = 8 * unit_ms(CO) / 1000
    assert sums["a", "ok"].gpu_seconds == pytest.approx(used)
    assert sums[NO_CLIENT, IDLE].gpu_seconds == pytest.approx(60 * 8 - used)
    assert sums[NO_CLIENT, IDLE].requests == 0 and sums[NO_CLIENT, IDLE].mu == 0


def test_joules_are_those_of_all_gpus(tmp_path: Path) -> None:
    """Requests and idle time share what was drawn; where no power is known there are no joules, not 0."""
    pod = Pod(tmp_path)
    pod.now += 30.0
    pod.end()
    assert pod.sums(())["all",].joules is None
    drawn = 0.0
    for watts in (700.0, 120.0, 650.0):
        pod.price = replace(PRICE, watts=watts)
        pod.now += 30.0
        drawn += 30.0 * 8 * watts
        pod.request("ok", RequestSize(9000, output=300), "a")
        pod.second()
    pod.end()
    sums = {outcome: s.joules for (outcome,), s in pod.sums(("outcome",)).items()}
    assert sums["ok"] and sums[IDLE] and sums["ok"] + sums[IDLE] == pytest.approx(drawn)
    used = pod.sums(("outcome",))["ok",].gpu_seconds
    assert sums["ok"] == pytest.approx(used * (700 + 120 + 650) / 3)


def test_time_between_two_processes_is_the_pods(tmp_path: Path) -> None:
    """A restart of some minutes is counted; a file unused for more than an hour is not from this pod."""
    pod = Pod(tmp_path)
    pod.end()
    for gap, counted in ((300.0, 300.0), (MAX_GAP_S + 60.0, 0.0)):
        before = sum(s.gpu_seconds for s in pod.sums(()).values())
        pod.now += gap
        pod.start()
        pod.end()
        assert sum(s.gpu_seconds for s in pod.sums(()).values()) - before == pytest.approx(8 * counted)


def test_a_clock_that_jumps_counts_no_time(tmp_path: Path) -> None:
    """Time is what passed, not what a clock was set to; a start before the last end counts none."""
    store = UsageStore(tmp_path, 35, 64 << 20)
    for now, wall in ((10.0, NOON), (20.0, NOON + 5000.0), (30.0, NOON - 100.0)):
        store.elapse(now, wall, PRICE, "f")
    store.write(store.take(), NOON)
    again = UsageStore(tmp_path, 35, 64 << 20)
    again.elapse(5.0, NOON - 3000.0, PRICE, "f")
    again.write(again.take(), NOON)
    assert read(tmp_path / USAGE_FILE, 0, 2e9, ())[0][1].gpu_seconds == pytest.approx(8 * 20)


def test_what_was_written_late_does_not_change_what_is_final(tmp_path: Path) -> None:
    """After a disk was full for hours, usage counts when it is written; nothing is lost."""
    pod = Pod(tmp_path)
    pod.end()
    pod.request("ok", RequestSize(3500, output=300), "a")
    taken = pod.store.take()
    pod.now += 3 * HOUR_S
    pod.store.restore(taken)
    pod.end()
    assert pod.sums(("outcome",), until=pod.wall - LATE_S).keys() == set()
    assert pod.sums(("outcome",))["ok",].requests == 1
    assert sum(s.gpu_seconds for s in pod.sums(()).values()) == pytest.approx(3 * HOUR_S * 8)
