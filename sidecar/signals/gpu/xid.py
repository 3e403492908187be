"""XID errors, which the driver reports as events: counted per GPU and number on a thread of their own.

Rules: counts last over NVML sessions; the numbers told apart are bounded, rarer ones count as 0; where the driver has no
such events (WSL, some virtual GPUs) there are no counts, and nothing else suffers.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence
from typing import Any, Final, Protocol

MAX_XIDS: Final = 32  # XID numbers told apart per GPU
WAIT_MS: Final = 1000  # longest wait inside NVML, and so the longest that an end has to wait
_TIMEOUT: Final = 10  # NVML's code for "no event"

_log = logging.getLogger(__name__)


class HasHandle(Protocol):
    """A GPU of the session; `whole` is its handle, None where NVML gave none; slices share one."""

    @property
    def index(self) -> int: ...
    @property
    def whole(self) -> Any: ...


class XidWatch:
    """Counts the XID errors of one NVML session after another, until `stopping` is set."""

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._counts: dict[int, dict[int, int]] = {}
        self._thread: threading.Thread | None = None

    def counts(self, index: int) -> tuple[tuple[int, int], ...]:
        """(xid, count) of one GPU since the start, by xid."""
        with self._lock:
            return tuple(sorted(self._counts.get(index, {}).items()))

    def begin(self, nvml: Any, devices: Sequence[HasHandle]) -> None:
        """Watch these GPUs until `end`. Returns at once."""
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, args=(nvml, devices, self._ended), name="nvml-xid", daemon=True
        )
        self._thread.start()

    def end(self, seconds: float = 2 * WAIT_MS / 1000) -> bool:
        """Stop to watch, within `seconds`. False where NVML holds the thread."""
        self._ended.set()
        if self._thread is None:
            return True
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _watch(self, nvml: Any, devices: Sequence[HasHandle], ended: threading.Event) -> None:
        try:
            events = nvml.nvmlEventSetCreate()
            by_address = _register(nvml, devices, events)
            while by_address and not (ended.is_set() or self._stopping.is_set()):
                self._wait(nvml, events, by_address)
            nvml.nvmlEventSetFree(events)
        except nvml.NVMLError as e:
            _log.info("XID events are not available: %s", e)

    def _wait(self, nvml: Any, events: Any, by_address: dict[int | None, int]) -> None:
        try:
            event = nvml.nvmlEventSetWait_v2(events, WAIT_MS)
        except nvml.NVMLError as e:
            if e.value != _TIMEOUT:  # one GPU of several is lost; the others still have events
                self._stopping.wait(WAIT_MS / 1000)
            return
        if event.eventType & nvml.nvmlEventTypeXidCriticalError:
            self._count(by_address.get(_address(event.device), -1), int(event.eventData))

    def _count(self, index: int, xid: int) -> None:
        _log.warning("GPU %d reported XID %d", index, xid)
        with self._lock:
            counts = self._counts.setdefault(index, {})
            known = xid in counts or len(counts) < MAX_XIDS
            counts[xid if known else 0] = counts.get(xid if known else 0, 0) + 1


def _register(nvml: Any, devices: Sequence[HasHandle], events: Any) -> dict[int | None, int]:
    """Subscribe to each GPU that can; GPU index by the address of its handle, which is what an event carries."""
    registered: dict[int | None, int] = {}
    for device in devices:
        if device.whole is None or _address(device.whole) in registered:
            continue
        try:
            nvml.nvmlDeviceRegisterEvents(device.whole, nvml.nvmlEventTypeXidCriticalError, events)
            registered[_address(device.whole)] = device.index
        except nvml.NVMLError as e:
            _log.info("XID events of GPU %d are not available: %s", device.index, e)
    return registered


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value
