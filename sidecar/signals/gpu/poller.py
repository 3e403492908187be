"""GPUs through NVML.

Rules: NVML has hung in the field, so every call to it is made on threads of its own, and whoever reads gets the last
reading at once; a call that does not come back makes the reading fail, not the reader wait. A number that a GPU does not
have (MIG, an old driver) is absent, one that could not be read is failed, and neither touches the others. A lost GPU keeps
its place with failed numbers, so that the XID errors that explain it stay visible. Where there is no driver library, the
thread ends and costs nothing.
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
from sidecar.signals.gpu.sample import GpuDevice, GpuSampler, failed, found
from sidecar.signals.gpu.xid import XidWatch

LIBRARY: Final = "libnvidia-ml.so.1"
READ_TIMEOUT_S: Final = 5.0  # seconds; a call takes milliseconds, and tens of them while the driver wakes a GPU
FIRST_RETRY: Final = 1.0
LONGEST_RETRY: Final = 60.0

_log = logging.getLogger(__name__)


class GpuSignal:
    """Reads all GPUs once per `period` seconds between `start` and `stop`."""

    def __init__(
        self, *, period: float = 1.0, patience: float = READ_TIMEOUT_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._period = period
        self._patience = patience
        self._clock = clock
        self._reading: Reading[tuple[GpuSample, ...]] = Absent("not read yet")
        self._asked: float | None = None  # when the NVML call in progress began
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)
        self._nvml: Any = None
        self._known: dict[int, tuple[str, str]] = {}  # name and UUID by index, once they were read
        self._xids = XidWatch(self._stopping)

    def start(self) -> None:
        """Begin to read. Returns at once."""
        self._thread.start()

    def read(self) -> Reading[tuple[GpuSample, ...]]:
        """The last reading, at once; failed while a call has not come back for `patience` seconds."""
        asked = self._asked
        if asked is not None and (silent := self._clock() - asked) > self._patience:
            return Failed(f"NVML did not answer for {silent:.0f} s; see the node's kernel log for NVRM and XID lines")
        return self._reading

    async def stop(self, seconds: float = 2.0) -> bool:
        """End the threads, within `seconds`. False where NVML holds one; it is a daemon and dies with the process."""
        self._stopping.set()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, seconds)
        return not self._thread.is_alive()

    # --- on the thread ---

    def _run(self) -> None:
        try:
            self._nvml = self._ask(_load)
        except OSError:
            self._reading = Absent(f"no NVIDIA driver library ({LIBRARY})")
            return
        retry = FIRST_RETRY
        while not self._stopping.is_set():
            began = self._clock()
            self._session()
            if self._clock() - began > LONGEST_RETRY:
                retry = FIRST_RETRY
            self._stopping.wait(retry)
            retry = min(retry * 2, LONGEST_RETRY)

    def _session(self) -> None:
        """From init to shutdown. Ends when asked to, or when no GPU will answer before NVML is started anew."""
        try:
            self._ask(self._nvml.nvmlInit)
        except self._nvml.NVMLError as e:
            self._keep(failed(e))
            return
        try:
            self._poll(self._devices())
        except self._nvml.NVMLError as e:
            self._keep(failed(e))
        except Exception as e:  # noqa: BLE001 - a binding that misbehaves must not end the thread
            _log.exception("GPU signal: unexpected error")
            self._keep(Failed(f"reading failed ({type(e).__name__})"))
        finally:
            self._close()

    def _devices(self) -> list[GpuDevice]:
        """All GPUs that NVML counts, or their slices; one whose handle cannot be had keeps the name that it had before."""
        every: list[GpuDevice] = []
        for index in range(self._ask(self._nvml.nvmlDeviceGetCount)):
            every += found(self._nvml, self._ask, index, *self._known.get(index, ("", "")))
            self._known[index] = (every[-1].name, every[-1].uuid)
        return every

    def _poll(self, devices: list[GpuDevice]) -> None:
        if not devices:
            self._keep(Absent("no NVIDIA GPU is visible here"))
            return
        self._xids.begin(self._nvml, devices)
        sampler = GpuSampler(self._nvml, self._ask, self._xids.counts)
        answering = True
        while answering and not self._stopping.is_set():
            answering = self._round(sampler, devices)
            if answering:
                self._stopping.wait(self._period)

    def _round(self, sampler: GpuSampler, devices: list[GpuDevice]) -> bool:
        """One sample of each GPU. False when none of them answers any more."""
        began = self._clock()
        samples: list[GpuSample] = []
        gone = 0
        for device in devices:
            try:
                samples.append(sampler.sample(device, began))
            except self._nvml.NVMLError as e:
                gone += 1
                samples.append(sampler.lost(device, e))
        self._keep(Value(tuple(samples), at=began, seconds=self._clock() - began))
        return gone < len(devices)

    def _close(self) -> None:
        # To shut NVML down under a thread that is still inside it is undefined; then it is left as it is.
        if self._xids.end():
            with contextlib.suppress(self._nvml.NVMLError):
                self._ask(self._nvml.nvmlShutdown)

    def _ask(self, call: Callable[..., Any], *args: Any) -> Any:
        """One NVML call, under the eyes of `read`."""
        self._asked = self._clock()
        try:
            return call(*args)
        finally:
            self._asked = None

    def _keep(self, reading: Reading[tuple[GpuSample, ...]]) -> None:
        if isinstance(reading, Failed) and reading != self._reading:
            _log.warning("GPU signal: %s", reading.error)
        self._reading = reading


def _load() -> Any:
    """The module `pynvml`. Raises OSError where there is no driver library, before 3 MB of bindings are imported."""
    ctypes.CDLL(LIBRARY)
    return importlib.import_module("pynvml")
