"""Reads the GPUs through NVML.

- NVML has hung in the field. So it is called on threads of its own, and `read` returns the last reading at once: a call
  that hangs makes the reading fail, not the reader wait.
- A number that a GPU does not have (MIG, an old driver) is absent; one that could not be read is failed. Neither
  affects the others.
- What tells a hang from work (GPM, faults) is read closely while `closely` is set: while the engine is in doubt.
- A lost GPU keeps its place with failed numbers, so that the XID errors that explain it stay visible.
- Without a driver library the thread ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from sidecar.readings import Absent, Failed, GpuSample, Reading, Value
from sidecar.runtime.own_gpu_use import UNUSED, OwnGpuUse
from sidecar.signals.gpu.sample import GpuDevice, GpuSampler, find_devices, to_failed
from sidecar.signals.gpu.xid import XidWatch

LIBRARY: Final = "libnvidia-ml.so.1"
# A call takes milliseconds, and tens of them while the driver wakes a GPU.
READ_TIMEOUT_S: Final = 5.0
MIN_RETRY_INTERVAL_S: Final = 1.0
MAX_RETRY_INTERVAL_S: Final = 60.0

_log = logging.getLogger(__name__)


class GpuSignal:
    """Reads all GPUs once per `period` seconds between `start` and `stop`."""

    def __init__(
        self,
        *,
        period: float = 1.0,
        timeout_s: float = READ_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
        own: Callable[[], OwnGpuUse] = lambda: UNUSED,
    ) -> None:
        """`own`: how processes of the sidecar use the GPU; the XIDs of their faults are not counted."""
        self._period = period
        self._timeout_s = timeout_s
        self._clock = clock
        self._reading: Reading[tuple[GpuSample, ...]] = Absent("not read yet")
        self._call_started: float | None = None  # start of the NVML call in progress
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)
        self._nvml: Any = None
        self._known: dict[int, tuple[str, str]] = {}  # index -> last name and UUID
        self._xids = XidWatch(self._stopping, own, clock)
        self.closely = False

    def start(self) -> None:
        """Start reading. Returns at once."""
        self._thread.start()

    def read(self) -> Reading[tuple[GpuSample, ...]]:
        """The last reading, at once; failed while a call hangs for more than `timeout_s`."""
        started = self._call_started
        if started is not None and (silent := self._clock() - started) > self._timeout_s:
            return Failed(f"NVML did not answer for {silent:.0f} s; see the node's kernel log for NVRM and XID lines")
        return self._reading

    async def stop(self, timeout_s: float = 2.0) -> bool:
        """Stop the threads. False if one hangs in NVML: it is a daemon and ends with the process."""
        self._stopping.set()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, timeout_s)
        return not self._thread.is_alive()

    # --- on the thread ---

    def _run(self) -> None:
        try:
            self._nvml = self._call(_load)
        except OSError:
            self._reading = Absent(f"no NVIDIA driver library ({LIBRARY})")
            return
        interval = MIN_RETRY_INTERVAL_S
        while not self._stopping.is_set():
            started = self._clock()
            self._run_session()
            if self._clock() - started > MAX_RETRY_INTERVAL_S:
                interval = MIN_RETRY_INTERVAL_S
            self._stopping.wait(interval)
            interval = min(interval * 2, MAX_RETRY_INTERVAL_S)

    def _run_session(self) -> None:
        """From init to shutdown. Ends on `stop`, or when no GPU responds until NVML is initialised again."""
        try:
            self._call(self._nvml.nvmlInit)
        except self._nvml.NVMLError as e:
            self._store(to_failed(e))
            return
        try:
            self._poll(self._find_devices())
        except self._nvml.NVMLError as e:
            self._store(to_failed(e))
        except Exception as e:  # noqa: BLE001 - a faulty binding must not end the thread
            _log.exception("GPU signal: unexpected error")
            self._store(Failed(f"reading failed ({type(e).__name__})"))
        finally:
            self._close()

    def _find_devices(self) -> list[GpuDevice]:
        """All GPUs that NVML counts, or their slices. A GPU without a handle keeps its last name."""
        devices: list[GpuDevice] = []
        for index in range(self._call(self._nvml.nvmlDeviceGetCount)):
            devices += find_devices(self._nvml, self._call, index, *self._known.get(index, ("", "")))
            self._known[index] = (devices[-1].name, devices[-1].uuid)
        return devices

    def _poll(self, devices: list[GpuDevice]) -> None:
        if not devices:
            self._store(Absent("no NVIDIA GPU is visible here"))
            return
        self._xids.begin(self._nvml, devices)
        sampler = GpuSampler(self._nvml, self._call, self._xids.counts, self._xids.is_watched, self._xids.events)
        responding = True
        try:
            while responding and not self._stopping.is_set():
                responding = self._sample_all(sampler, devices)
                if responding:
                    self._stopping.wait(self._period)
        finally:
            sampler.close()

    def _sample_all(self, sampler: GpuSampler, devices: list[GpuDevice]) -> bool:
        """Sample each GPU once. False if none responds any more."""
        started = self._clock()
        samples: list[GpuSample] = []
        lost = 0
        for device in devices:
            try:
                samples.append(sampler.sample(device, started, self.closely))
            except self._nvml.NVMLError as e:
                lost += 1
                samples.append(sampler.sample_lost(device, to_failed(e)))
        self._store(Value(tuple(samples), at=started, seconds=self._clock() - started))
        return lost < len(devices)

    def _close(self) -> None:
        # Shutting NVML down while a thread is inside it is undefined.
        if self._xids.end():
            with contextlib.suppress(self._nvml.NVMLError):
                self._call(self._nvml.nvmlShutdown)

    def _call(self, call: Callable[..., Any], *args: Any) -> Any:
        """One NVML call, timed for `read`."""
        self._call_started = self._clock()
        try:
            return call(*args)
        finally:
            self._call_started = None

    def _store(self, reading: Reading[tuple[GpuSample, ...]]) -> None:
        if isinstance(reading, Failed) and reading != self._reading:
            _log.warning("GPU signal: %s", reading.error)
        self._reading = reading


def _load() -> Any:
    """Import `pynvml`, 3 MB of bindings. Raises OSError first if there is no driver library."""
    ctypes.CDLL(LIBRARY)
    return importlib.import_module("pynvml")
