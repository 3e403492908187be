"""XID errors and GPU Operational Events: counted per GPU on a thread of their own, as the driver reports them.

- Counts survive NVML sessions. At most MAX_XIDS_PER_GPU numbers have counts of their own; later ones count as number 0.
- An XID names no process. One that comes while a process of the sidecar's own uses the GPU waits for OWN_FAULT_S: if
  that process fails meanwhile, it was its fault and is not the engine's.
- A driver without such events (WSL, some virtual GPUs) gives no counts; nothing else is affected. One without GPU
  Operational Events gives XIDs alone.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sidecar.readings import EVENT_SEVERITIES
from sidecar.runtime.own_gpu_use import OwnGpuUse
from sidecar.signals.gpu.sample import GpuDevice

MAX_XIDS_PER_GPU: Final = 32
MAX_WAITING_XIDS: Final = 64
# Maximum wait inside NVML, and so the time that `end` may need.
EVENT_WAIT_MS: Final = 1000
# While an XID may be of a process of ours.
OWN_WAIT_MS: Final = 100
# A process sees its fault at its next call, and its parent that it ended within the second.
OWN_FAULT_S: Final = 1.5
_NO_EVENT_CODE: Final = 10
# nvmlOperationalEventSeverity_t.
_RECOVERABLE, _FATAL = 30, 40

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _WaitingXid:
    """An XID that may be of a process of ours."""

    index: int
    xid: int
    at: float


class XidWatch:
    """Counts the events of one NVML session after another, until `stopping` is set.

    `own`: what the sidecar's own processes do with the GPU; `clock`: monotonic seconds.
    """

    def __init__(self, stopping: threading.Event, own: Callable[[], OwnGpuUse], clock: Callable[[], float]) -> None:
        self._stopping = stopping
        self._own = own
        self._clock = clock
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._counts: dict[int, dict[int, int]] = {}
        self._events: dict[int, dict[str, int]] = {}
        self._waiting: list[_WaitingXid] = []  # of the thread
        self._watched: frozenset[int] = frozenset()
        self._thread: threading.Thread | None = None

    def counts(self, index: int) -> tuple[tuple[int, int], ...]:
        """(xid, count) of one GPU since the start, sorted by xid."""
        with self._lock:
            return tuple(sorted(self._counts.get(index, {}).items()))

    def events(self, index: int) -> tuple[tuple[str, int], ...]:
        """(severity, count) of one GPU's Operational Events since the start; empty where the driver has none."""
        with self._lock:
            return tuple(sorted(self._events.get(index, {}).items()))

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
            by_uuid = _register_operational(nvml, devices, events)
            self._watched = frozenset(by_address.values())
            while by_address and not (ended.is_set() or self._stopping.is_set()):
                self._wait(nvml, events, by_address, by_uuid)
                self._count_waiting()
            nvml.nvmlEventSetFree(events)
        except nvml.NVMLError as e:
            _log.info("XID events are not available: %s", e)
        except Exception:  # noqa: BLE001 - a faulty binding costs the events alone
            _log.exception("XID events: unexpected error")

    def _wait(self, nvml: Any, events: Any, by_address: dict[int | None, int], by_uuid: dict[str, int]) -> None:
        timeout_ms = OWN_WAIT_MS if self._waiting else EVENT_WAIT_MS
        try:
            if by_uuid:
                self._on_event(nvml, _wait_for_any(nvml, events, timeout_ms), by_uuid)
                return
            event = nvml.nvmlEventSetWait_v2(events, timeout_ms)
        except nvml.NVMLError as e:
            if e.value != _NO_EVENT_CODE:  # one of several GPUs is lost; the others still have events
                self._stopping.wait(EVENT_WAIT_MS / 1000)
            return
        if event.eventType & nvml.nvmlEventTypeXidCriticalError:
            self._on_xid(by_address.get(_address(event.device), -1), int(event.eventData))

    def _on_event(self, nvml: Any, event: Any, by_uuid: dict[str, int]) -> None:
        index = by_uuid.get(event.uuid, -1)
        if event.dataType == nvml.NVML_EVENT_DATA_TYPE_GPU_OPERATIONAL_EVENT:
            severity = EVENT_SEVERITIES[event.severity >= _FATAL]
            _log.warning("GPU %d reported a %s event, code %d", index, severity, event.moduleEventCode)
            with self._lock:
                counts = self._events.setdefault(index, {})
                counts[severity] = counts.get(severity, 0) + 1
        elif event.eventType & nvml.nvmlEventTypeXidCriticalError:
            self._on_xid(index, int(event.eventData))

    def _on_xid(self, index: int, xid: int) -> None:
        """Count it, or let it wait while a process of ours may be its cause."""
        now, own = self._clock(), self._own()
        is_recent = own.failed_at is not None and now - own.failed_at <= OWN_FAULT_S
        if (own.running or is_recent) and len(self._waiting) < MAX_WAITING_XIDS:
            self._waiting.append(_WaitingXid(index, xid, now))
        else:
            self._count(index, xid)

    def _count_waiting(self) -> None:
        """Drop the XIDs around a fault of ours, and count those that have waited for one in vain."""
        if not self._waiting:
            return
        now, failed_at = self._clock(), self._own().failed_at
        still = []
        for one in self._waiting:
            if failed_at is not None and abs(one.at - failed_at) <= OWN_FAULT_S:
                _log.warning("GPU %d reported XID %d, by a process of the sidecar: not counted", one.index, one.xid)
            elif now - one.at >= OWN_FAULT_S:
                self._count(one.index, one.xid)
            else:
                still.append(one)
        self._waiting = still

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


def _register_operational(nvml: Any, devices: Sequence[GpuDevice], events: Any) -> dict[str, int]:
    """Subscribe to what a GPU must recover from. Returns GPU index by UUID; empty where the driver has no such events.

    With any, all events of the set come in their form, which has no handle.
    """
    by_uuid: dict[str, int] = {}
    try:
        for device in devices:
            if device.whole is None:
                continue
            uuid = nvml.nvmlDeviceGetUUID(device.whole)
            wanted = nvml.c_nvmlGpuOperationalEventConfig_v1_t(
                uuid, nvml.NVML_GPU_OPERATIONAL_EVENT_LOG_LEVEL_WARNING, _RECOVERABLE
            )
            nvml.nvmlEventSetRegisterGpuOperationalEvents_v1(events, wanted)
            by_uuid[uuid] = device.index
    except (nvml.NVMLError, AttributeError) as e:  # an older driver, or older bindings
        _log.info("GPU Operational Events are not available: %s", e)
    return by_uuid


def _wait_for_any(nvml: Any, events: Any, timeout_ms: int) -> Any:
    wanted = nvml.c_nvmlEventSetWait_v3_t()
    wanted.timeoutMs = timeout_ms
    nvml.nvmlEventSetWait_v3(events, wanted)
    return wanted


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value
