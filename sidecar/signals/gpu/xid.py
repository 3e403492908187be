"""XID errors: events of the driver, counted per GPU and number.

At most MAX_XIDS_PER_GPU numbers have counts of their own; later ones count as number 0. A driver without such events
(WSL, some virtual GPUs) gives no counts; nothing else is affected.
"""

from __future__ import annotations

import ctypes
import logging
from collections import Counter, defaultdict
from contextlib import suppress
from typing import Any, Final

from sidecar.signals.gpu.sample import GpuDevice, NvmlCall

MAX_XIDS_PER_GPU: Final = 32
MAX_EVENTS: Final = 64  # per poll; what is left waits in the driver for the next one
POLL_MS: Final = 1

_log = logging.getLogger(__name__)


class XidWatch:
    """Counts the XID errors of one NVML session after another. `call` makes one call of the module `nvml`."""

    def __init__(self, nvml: Any, call: NvmlCall) -> None:
        self._nvml = nvml
        self._call = call
        self._events: Any = None
        self._indexes: dict[int | None, int] = {}  # GPU by the address of its handle, as events have it
        self._counts: defaultdict[int, Counter[int]] = defaultdict(Counter)

    def counts(self, index: int) -> tuple[tuple[int, int], ...]:
        """(xid, count) of one GPU since the start, sorted by xid."""
        return tuple(sorted(self._counts[index].items()))

    def begin(self, devices: list[GpuDevice]) -> None:
        """Subscribe to each GPU that supports events."""
        nvml, self._indexes = self._nvml, {}
        try:
            self._events = self._call(nvml.nvmlEventSetCreate)
        except nvml.NVMLError as e:
            _log.info("XID events are not available: %s", e)
            return
        for index, whole in {device.index: device.whole for device in devices if device.whole is not None}.items():
            try:
                self._call(nvml.nvmlDeviceRegisterEvents, whole, nvml.nvmlEventTypeXidCriticalError, self._events)
                self._indexes[_address(whole)] = index
            except nvml.NVMLError as e:
                _log.info("XID events of GPU %d are not available: %s", index, e)

    def poll(self, wait_ms: int = POLL_MS) -> None:
        """Count the events that have arrived, and what arrives within `wait_ms`."""
        for _ in range(MAX_EVENTS if self._indexes else 0):
            try:
                event = self._call(self._nvml.nvmlEventSetWait_v2, self._events, wait_ms)
            except self._nvml.NVMLError:  # none, or one of several GPUs is lost; the others still have events
                return
            if event.eventType & self._nvml.nvmlEventTypeXidCriticalError:
                self._count(self._indexes.get(_address(event.device), -1), int(event.eventData))

    def end(self) -> None:
        """Count what came last, and unsubscribe."""
        self.poll()
        if self._indexes:
            with suppress(self._nvml.NVMLError):
                self._call(self._nvml.nvmlEventSetFree, self._events)

    def _count(self, index: int, xid: int) -> None:
        _log.warning("GPU %d reported XID %d", index, xid)
        counts = self._counts[index]
        counts[xid if xid in counts or len(counts) < MAX_XIDS_PER_GPU else 0] += 1


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value
