"""What tenants have used, in memory that all relay processes share: one bucket and one count in flight per tenant and
pod.

    row      digest of the tenant's name, level and time of its bucket, the bucket's rate and burst
    column   of each relay process: its MU in flight, by row

Rules: a full row with nothing in flight carries no information and may be reused for another tenant. A tenant that
finds no row shares row 0 with others. Each process writes only its own column, and clears it when it starts, which
releases what a killed process had open. A lock keeps two processes from spending the same units. If it is held for
LOCK_TIMEOUT_S, its holder was stopped: it is bypassed until it is free, at the cost of losing another process's
charge.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from sidecar.load.tenant_limits import LimitExceeded, TenantLimit, TokenBucket, charge, check, refill

ROWS: Final = 4096
ROW_PROBES: Final = 16  # candidate rows of a tenant
LOCK_TIMEOUT_S: Final = 0.05  # microseconds are usual, but the holder can be descheduled
_LOCK_RETRY_S: Final = 0.0002
# digest, level, at, rate, burst
_ROW: Final = struct.Struct("=16sdddd")
_ROW_NUMBERS: Final = struct.Struct("=dddd")
_IN_FLIGHT_BYTES: Final = 8
_EMPTY_DIGEST: Final = bytes(16)
_SHARED_DIGEST: Final = b"shared by others"  # not the digest of any tenant
_ROUNDING_MU: Final = 1e-9  # rounding may leave this much in flight


@dataclass(frozen=True, slots=True)
class TenantCharge:
    """The charge of a request: `mu` from its tenant's bucket, `high` in flight."""

    row: int
    limit: TenantLimit
    mu: float
    high: float


def table_bytes(workers: int) -> int:
    return ROWS * (_ROW.size + _IN_FLIGHT_BYTES * workers)


class TenantAccounts:
    """The table, as relay process `index` uses it. `path`: a file of `table_bytes(workers)` bytes; "": own memory."""

    def __init__(self, path: str, workers: int, index: int) -> None:
        self._workers, self._index = workers, index
        self._lock_timeout_s = LOCK_TIMEOUT_S
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC) if path else -1
        self._table = mmap.mmap(self._fd, table_bytes(workers))
        first = ROWS * (_ROW.size + _IN_FLIGHT_BYTES * index)
        self._table[first : first + ROWS * _IN_FLIGHT_BYTES] = bytes(ROWS * _IN_FLIGHT_BYTES)
        self._in_flight = memoryview(self._table)[ROWS * _ROW.size :].cast("d")  # column after column

    def close(self) -> None:
        self._in_flight.release()
        self._table.close()
        if self._fd >= 0:
            os.close(self._fd)

    def take(self, tenant: str, limit: TenantLimit, mu: float, high: float, now: float) -> TenantCharge | LimitExceeded:
        """Charge a request, or return the limit that it exceeds."""
        with self._locked():
            row = self._row(tenant, limit, now)
            bucket = refill(self._bucket(row), limit, now)
            refused = check(limit, bucket, sum(self._in_flight[row::ROWS]), mu, high)
            if refused is not None:
                return refused
            self._put(row, charge(bucket, limit, mu), limit)
            self._add_in_flight(row, high)
            return TenantCharge(row, limit, mu, high)

    def spill(self, tenant: str, limit: TenantLimit, high: float, now: float) -> TenantCharge:
        """Admit a request over its tenant's limit: it is in flight, and takes nothing from the bucket."""
        with self._locked():
            row = self._row(tenant, limit, now)
            self._add_in_flight(row, high)
            return TenantCharge(row, TenantLimit(), 0.0, high)

    def settle(self, charged: TenantCharge, mu: float, now: float) -> None:
        """Correct the charge of a request that has ended and used `mu`."""
        with self._locked():
            bucket = refill(self._bucket(charged.row), charged.limit, now)
            if charged.limit.mu_per_minute is not None:
                self._put(charged.row, charge(bucket, charged.limit, mu - charged.mu), charged.limit)
            self._add_in_flight(charged.row, -charged.high)

    # --- rows ---

    def _row(self, tenant: str, limit: TenantLimit, now: float) -> int:
        """The row of a tenant: its own, else a free one, else the shared one."""
        digest = hashlib.blake2b(tenant.encode(errors="replace"), digest_size=16).digest()
        first = int.from_bytes(digest[:4]) % (ROWS - 1)
        rows = [1 + (first + n) % (ROWS - 1) for n in range(ROW_PROBES)]
        found = next((row for row in rows if self._digest(row) == digest), None)
        if found is None:
            found = next((row for row in rows if self._is_free(row, now)), 0)
            digest = digest if found else _SHARED_DIGEST
            if self._digest(found) != digest:
                self._table[found * _ROW.size : found * _ROW.size + 16] = digest
                self._put(found, TokenBucket(limit.burst, now), limit)
        return found

    def _is_free(self, row: int, now: float) -> bool:
        """Whether a row carries no information."""
        digest, level, at, rate, burst = _ROW.unpack_from(self._table, row * _ROW.size)
        return digest == _EMPTY_DIGEST or (level + rate * (now - at) >= burst and not any(self._in_flight[row::ROWS]))

    def _digest(self, row: int) -> bytes:
        return self._table[row * _ROW.size : row * _ROW.size + 16]

    def _bucket(self, row: int) -> TokenBucket:
        return TokenBucket(*_ROW.unpack_from(self._table, row * _ROW.size)[1:3])

    def _put(self, row: int, bucket: TokenBucket, limit: TenantLimit) -> None:
        _ROW_NUMBERS.pack_into(self._table, row * _ROW.size + 16, bucket.level, bucket.at, limit.rate, limit.burst)

    def _add_in_flight(self, row: int, mu: float) -> None:
        at = self._index * ROWS + row
        held = self._in_flight[at] + mu
        self._in_flight[at] = held if held > _ROUNDING_MU else 0.0

    @contextmanager
    def _locked(self) -> Iterator[None]:
        held = self._fd >= 0 and self._workers > 1 and self._lock()
        try:
            yield
        finally:
            if held:
                fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def _lock(self) -> bool:
        until = time.monotonic() + self._lock_timeout_s
        while True:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() >= until:
                    self._lock_timeout_s = 0.0
                    return False
                time.sleep(_LOCK_RETRY_S)
            else:
                self._lock_timeout_s = LOCK_TIMEOUT_S
                return True
