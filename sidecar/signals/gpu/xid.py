"""XID errors: events of the driver, counted per GPU and number on a thread of their own.

- Counts survive NVML sessions. At most MAX_XIDS_PER_GPU numbers have counts of their own; later ones count as number 0.
- A driver without such events (WSL, some virtual GPUs) gives no counts; nothing else is affected.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence
from typing import Any, Final

from sidecar.signals.gpu.sample import GpuDevice

MAX_XIDS_PER_GPU: Final = 32
# Maximum wait inside NVML, and so the time that `end` may need.
EVENT_WAIT_MS: Final = 1000
_NO_EVENT_CODE: Final = 10

_log = logging.getLogger(__name__)


class XidWatch:
    """Counts the XID errors of one NVML session after another, until `stopping` is set."""

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._counts: dict[int, dict[int, int]] = {}
        self._watched: frozenset[int] = frozenset()
        self._thread: threading.Thread | None = None

    def counts(self, index: int) -> tuple[tuple[int, int], ...]:
        """(xid, count) of one GPU since the start, sorted by xid."""
        with self._lock:
            return tuple(sorted(self._counts.get(index, {}).items()))

    def is_watched(self, index: int) -> bool:
        """Whether the driver reports XID errors of this GPU."""
        return index in self._watched

    def begin(self, nvml: Any, devices: Sequence[GpuDevice]) -> None:
        """Watch these GPUs until `end`. Returns at once."""
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, args=(nvml, devices, self._ended), name="nvml-xid", daemon=True
        )
        self._thread.start()

    def end(self, timeout_s: float = 2 * EVENT_WAIT_MS / 1000) -> bool:
        """Stop watching. False if the thread hangs in NVML."""
        self._ended.set()
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _watch(self, nvml: Any, devices: Sequence[GpuDevice], ended: threading.Event) -> None:
        try:
            events = nvml.nvmlEventSetCreate()
            by_address = _register(nvml, devices, events)
            self._watched = frozenset(by_address.values())
            while by_address and not (ended.is_set() or self._stopping.is_set()):
                self._wait(nvml, events, by_address)
            nvml.nvmlEventSetFree(events)
        except nvml.NVMLError as e:
            _log.info("XID events are not available: %s", e)

    def _wait(self, nvml: Any, events: Any, by_address: dict[int | None, int]) -> None:
        try:
            event = nvml.nvmlEventSetWait_v2(events, EVENT_WAIT_MS)
        except nvml.NVMLError as e:
            if e.value != _NO_EVENT_CODE:  # one of several GPUs is lost; the others still have events
                self._stopping.wait(EVENT_WAIT_MS / 1000)
            return
        if event.eventType & nvml.nvmlEventTypeXidCriticalError:
            self._count(by_address.get(_address(event.device), -1), int(event.eventData))

    def _count(self, index: int, xid: int) -> None:
        _log.warning("GPU %d reported XID %d", index, xid)
        with self._lock:
            counts = self._counts.setdefault(index, {})
            known = xid in counts or len(counts) < MAX_XIDS_PER_GPU
            counts[xid if known else 0] = counts.get(xid if known else 0, 0) + 1


def _register(nvml: Any, devices: Sequence[GpuDevice], events: Any) -> dict[int | None, int]:
    """Subscribe to each GPU that supports events. Returns GPU index by the address of its handle, as events have it."""
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
