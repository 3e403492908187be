"""Accounts of tenants: one for all relay processes, through crashes, and bounded."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, rule

from sidecar.load.tenant_limits import LimitExceeded, TenantLimit, TokenBucket, charge, check, refill
from sidecar.relay.pricing import tenant_accounts
from sidecar.relay.pricing.tenant_accounts import TenantAccounts, TenantCharge

from ...waiting import PATIENCE

LIMIT = TenantLimit(mu_per_minute=60.0, mu_in_flight=10.0, burst_mu=5.0)
Open = Callable[[int], TenantAccounts]

SPEND = """
import sys
from sidecar.load.tenant_limits import TenantLimit
from sidecar.relay.pricing import tenant_accounts
from sidecar.relay.pricing.tenant_accounts import TenantAccounts, TenantCharge
path, index = sys.argv[1], int(sys.argv[2])
tenant_accounts.LOCK_TIMEOUT_S = 60.0  # a holder that a busy machine takes off its core keeps its turn
own = TenantAccounts(path, 2, index)
print("ready", flush=True)
sys.stdin.readline()
limit = TenantLimit(60.0, None, 500.0)
taken = sum(isinstance(own.take("acme", limit, 1.0, 1.0, 0.0), TenantCharge) for _ in range(600))
print(taken)
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "accounts"
    path.write_bytes(b"")
    os.truncate(path, tenant_accounts.table_bytes(2))
    return path


@pytest.fixture
def relay(table: Path) -> Iterator[Open]:
    """A function: relay index -> its view of the table of two."""
    opened: list[TenantAccounts] = []

    def open_(index: int) -> TenantAccounts:
        opened.append(TenantAccounts(str(table), 2, index))
        return opened[-1]

    yield open_
    for own in opened:
        own.close()


def taken(own: TenantAccounts, tenant: str, now: float, mu: float = 1.0, limit: TenantLimit = LIMIT) -> TenantCharge:
    lease = own.take(tenant, limit, mu, mu, now)
    assert isinstance(lease, TenantCharge)
    return lease


def test_two_relays_spend_from_one_bucket(relay: Open) -> None:
    """What one takes the other cannot; other tenants are untouched."""
    first, second = relay(0), relay(1)
    for n in range(5):
        taken((first, second)[n % 2], "acme", 0.0)
    for own in (first, second):
        assert own.take("acme", LIMIT, 1.0, 1.0, 0.0) == LimitExceeded("mu_per_minute", 1.0)
    taken(first, "other", 0.0)
    taken(second, "acme", 1.0)


def test_a_settlement_puts_back_or_leaves_a_debt(relay: Open) -> None:
    """A cheaper request refunds, a dearer one must be earned first; what was in flight is free either way."""
    own = relay(0)
    cheap, dear = taken(own, "acme", 0.0, 2.0), taken(own, "acme", 0.0, 3.0)
    own.settle(cheap, 0.5, 0.0)
    taken(own, "acme", 0.0, 1.5)
    own.settle(dear, 13.0, 0.0)
    assert own.take("acme", LIMIT, 1.0, 1.0, 0.0) == LimitExceeded("mu_per_minute", pytest.approx(11.0))


def test_in_flight_is_the_sum_over_relays_and_a_dead_ones_share_is_freed(relay: Open) -> None:
    """Reservations of all processes count; the next process of the same index begins without its predecessor's."""
    limit = TenantLimit(mu_in_flight=10.0)
    dying, living = relay(0), relay(1)
    taken(dying, "acme", 0.0, 6.0, limit)
    lease = taken(living, "acme", 0.0, 4.0, limit)
    assert living.take("acme", limit, 1.0, 1.0, 0.0) == LimitExceeded("mu_in_flight", None)
    relay(0)
    taken(living, "acme", 0.0, 6.0, limit)
    living.settle(lease, 1.0, 0.0)
    taken(living, "acme", 0.0, 4.0, limit)


def test_spilled_requests_are_in_flight_and_take_nothing_from_the_bucket(relay: Open) -> None:
    """What was idle is given on top: it is no debt."""
    own = relay(0)
    for _ in range(5):
        taken(own, "acme", 0.0)
    spilled = own.spill("acme", LIMIT, 5.0, 0.0)
    assert own.take("acme", LIMIT, 1.0, 1.0, 1.0) == LimitExceeded("mu_in_flight", None)
    own.settle(spilled, 100.0, 1.0)
    taken(own, "acme", 1.0)


def test_any_number_of_tenants_fits_and_nobody_who_owes_is_forgotten(relay: Open) -> None:
    """Rows that are full and idle are lost without loss; a tenant in debt keeps its row while thousands pass by."""
    own = relay(0)
    own.settle(taken(own, "debtor", 0.0, 5.0), 500.0, 0.0)
    for n in range(3 * tenant_accounts.ROWS):
        own.settle(taken(own, f"tenant-{n}", 10.0 * n / tenant_accounts.ROWS), 1.0, 10.0 * n / tenant_accounts.ROWS)
    assert isinstance(own.take("debtor", LIMIT, 1.0, 1.0, 40.0), LimitExceeded)


def test_tenants_without_a_row_share_one(relay: Open) -> None:
    """A flood of names that all owe cannot make room for itself: the rest share one bucket."""
    own = relay(0)
    admitted = sum(
        isinstance(own.take(f"tenant-{n}", LIMIT, 5.0, 5.0, 0.0), TenantCharge) for n in range(3 * tenant_accounts.ROWS)
    )
    assert admitted <= tenant_accounts.ROWS


def test_processes_that_race_admit_no_more_than_the_bucket_holds(table: Path) -> None:
    """Two processes spend from one bucket at once, and not a unit is spent twice."""
    command = [sys.executable, "-c", SPEND, str(table)]
    children = [
        subprocess.Popen([*command, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for n in range(2)
    ]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    spent = [int(child.communicate(timeout=PATIENCE)[0]) for child in children]
    assert sum(spent) == 500


def test_a_process_that_was_stopped_in_its_turn_holds_up_nobody(relay: Open, table: Path) -> None:
    """A lock that stays taken is passed over within milliseconds, and the request is admitted."""
    own = relay(0)
    hold = (
        "import fcntl,sys; f=open(sys.argv[1],'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", hold, str(table)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with closing(child.stdin), closing(child.stdout):  # type: ignore[arg-type, type-var]
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with table.open("r+b") as file, pytest.raises(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        began = time.monotonic()
        taken(own, "acme", 0.0)
        assert time.monotonic() - began < 5.0
    child.wait(timeout=PATIENCE)


def test_one_relay_needs_no_file() -> None:
    """Without a path the table is memory of this process."""
    own = TenantAccounts("", 1, 0)
    own.settle(taken(own, "acme", 0.0), 1.0, 0.0)
    own.close()


def quarters(low: int, high: int) -> st.SearchStrategy[float]:
    """Numbers that sum without rounding."""
    return st.integers(low, high).map(lambda n: n / 4)


class Interleavings(RuleBasedStateMachine):
    """Any order of requests, ends, relay deaths and time gives the same as one account per tenant without processes."""

    leases = Bundle("leases")
    limits = TenantLimit(mu_per_minute=120.0, mu_in_flight=8.0, burst_mu=10.0)

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "accounts"
        path.write_bytes(b"")
        os.truncate(path, tenant_accounts.table_bytes(2))
        self.path, self.now = str(path), 0.0
        self.relays = [TenantAccounts(self.path, 2, n) for n in range(2)]
        self.buckets: dict[str, TokenBucket] = {}
        self.count = 0
        self.open: dict[
            str, dict[int, tuple[int, float]]
        ] = {}  # tenant -> number of its lease -> (relay, MU in flight)

    @rule(
        target=leases,
        relay=st.integers(0, 1),
        tenant=st.sampled_from(["a", "b", "c"]),
        mu=st.floats(0.1, 12),
        more=st.floats(0, 3),
    )
    def ask(self, relay: int, tenant: str, mu: float, more: float) -> object:
        bucket = refill(self.buckets.get(tenant, TokenBucket(10.0, self.now)), self.limits, self.now)
        in_flight = self.open.setdefault(tenant, {})
        expected = check(self.limits, bucket, sum(held for _, held in in_flight.values()), mu, mu + more)
        found = self.relays[relay].take(tenant, self.limits, mu, mu + more, self.now)
        if expected is not None:
            assert isinstance(found, LimitExceeded) and found.what == expected.what
            return None
        assert isinstance(found, TenantCharge)
        self.buckets[tenant] = charge(bucket, self.limits, mu)
        self.count += 1
        in_flight[self.count] = relay, mu + more
        return self.count, relay, tenant, found

    @rule(lease=consumes(leases), actual=quarters(0, 80))
    def settle(self, lease: tuple[int, int, str, TenantCharge] | None, actual: float) -> None:
        if lease is None or lease[0] not in self.open[lease[2]]:
            return  # refused, or it died with its process
        number, relay, tenant, found = lease
        self.relays[relay].settle(found, actual, self.now)
        bucket = refill(self.buckets[tenant], self.limits, self.now)
        self.buckets[tenant] = charge(bucket, self.limits, actual - found.mu)
        del self.open[tenant][number]

    @rule(relay=st.integers(0, 1))
    def die(self, relay: int) -> None:
        """Its successor finds the charges, and none of what it had open."""
        self.relays[relay].close()
        self.relays[relay] = TenantAccounts(self.path, 2, relay)
        for tenant, leases in self.open.items():
            self.open[tenant] = {n: lease for n, lease in leases.items() if lease[0] != relay}

    @rule(seconds=quarters(0, 20))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def teardown(self) -> None:
        for relay in self.relays:
            relay.close()
        self.folder.cleanup()


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=40)
