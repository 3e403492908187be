"""Accounts of tenants: one for all relay processes, through crashes, and bounded."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from sidecar.limits import Limit, Refusal
from sidecar.relay import accounts
from sidecar.relay.accounts import Accounts, Lease

LIMIT = Limit(mu_per_minute=60.0, mu_in_flight=10.0, burst_mu=5.0)
Open = Callable[[int], Accounts]

SPEND = """
import sys
from sidecar.limits import Limit
from sidecar.relay.accounts import Accounts, Lease
path, index = sys.argv[1], int(sys.argv[2])
own = Accounts(path, 2, index)
print("ready", flush=True)
sys.stdin.readline()
taken = sum(isinstance(own.take("acme", Limit(60.0, None, 500.0), 1.0, 1.0, 0.0), Lease) for _ in range(600))
print(taken)
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "accounts"
    path.write_bytes(b"")
    os.truncate(path, accounts.size(2))
    return path


@pytest.fixture
def relay(table: Path) -> Iterator[Open]:
    """A function: relay index -> its view of the table of two."""
    opened: list[Accounts] = []

    def open_(index: int) -> Accounts:
        opened.append(Accounts(str(table), 2, index))
        return opened[-1]

    yield open_
    for own in opened:
        own.close()


def taken(own: Accounts, tenant: str, now: float, mu: float = 1.0, limit: Limit = LIMIT) -> Lease:
    lease = own.take(tenant, limit, mu, mu, now)
    assert isinstance(lease, Lease)
    return lease


def test_two_relays_spend_from_one_bucket(relay: Open) -> None:
    """What one takes the other cannot; other tenants are untouched."""
    first, second = relay(0), relay(1)
    for n in range(5):
        taken((first, second)[n % 2], "acme", 0.0)
    for own in (first, second):
        assert own.take("acme", LIMIT, 1.0, 1.0, 0.0) == Refusal("mu_per_minute", 1.0)
    taken(first, "other", 0.0)
    taken(second, "acme", 1.0)


def test_a_settlement_puts_back_or_leaves_a_debt(relay: Open) -> None:
    """A cheaper request refunds, a dearer one must be earned first; what was in flight is free either way."""
    own = relay(0)
    cheap, dear = taken(own, "acme", 0.0, 2.0), taken(own, "acme", 0.0, 3.0)
    own.settle(cheap, 0.5, 0.0)
    taken(own, "acme", 0.0, 1.5)
    own.settle(dear, 13.0, 0.0)
    assert own.take("acme", LIMIT, 1.0, 1.0, 0.0) == Refusal("mu_per_minute", pytest.approx(11.0))


def test_in_flight_is_the_sum_over_relays_and_a_dead_ones_share_is_freed(relay: Open) -> None:
    """Reservations of all processes count; the next process of the same index begins without its predecessor's."""
    limit = Limit(mu_in_flight=10.0)
    dying, living = relay(0), relay(1)
    taken(dying, "acme", 0.0, 6.0, limit)
    lease = taken(living, "acme", 0.0, 4.0, limit)
    assert living.take("acme", limit, 1.0, 1.0, 0.0) == Refusal("mu_in_flight", None)
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
    assert own.take("acme", LIMIT, 1.0, 1.0, 1.0) == Refusal("mu_in_flight", None)
    own.settle(spilled, 100.0, 1.0)
    taken(own, "acme", 1.0)


def test_any_number_of_tenants_fits_and_nobody_who_owes_is_forgotten(relay: Open) -> None:
    """Rows that are full and idle are lost without loss; a tenant in debt keeps its row while thousands pass by."""
    own = relay(0)
    own.settle(taken(own, "debtor", 0.0, 5.0), 500.0, 0.0)
    for n in range(3 * accounts.ROWS):
        own.settle(taken(own, f"tenant-{n}", 10.0 * n / accounts.ROWS), 1.0, 10.0 * n / accounts.ROWS)
    assert isinstance(own.take("debtor", LIMIT, 1.0, 1.0, 40.0), Refusal)


def test_tenants_without_a_row_share_one(relay: Open) -> None:
    """A flood of names that all owe cannot make room for itself: the rest share one bucket."""
    own = relay(0)
    admitted = sum(isinstance(own.take(f"tenant-{n}", LIMIT, 5.0, 5.0, 0.0), Lease) for n in range(3 * accounts.ROWS))
    assert admitted <= accounts.ROWS


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
    spent = [int(child.communicate(timeout=30)[0]) for child in children]
    assert sum(spent) == 500


def test_a_process_that_was_stopped_in_its_turn_holds_up_nobody(relay: Open, table: Path) -> None:
    """A lock that stays taken is passed over within milliseconds, and the request is admitted."""
    own = relay(0)
    hold = "import fcntl,sys; f=open(sys.argv[1],'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
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
    child.wait(timeout=10)


def test_one_relay_needs_no_file() -> None:
    """Without a path the table is memory of this process."""
    own = Accounts("", 1, 0)
    own.settle(taken(own, "acme", 0.0), 1.0, 0.0)
    own.close()
