"""What a GPU does, by NVML's GPM: the tensor cores, the memory and the links, from Hopper on.

- A metric is what happened between two samples. They are taken while the engine is in doubt only: each costs the driver
  some work, and a healthy engine shows by its tokens what it does.
- An older GPU, a driver without GPM or without the permission for it: absent, and asked once per NVML session.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

from sidecar.readings import Absent, GpuActivity, Reading, Value

# nvmlGpmMetricId_t: ANY_TENSOR_UTIL, DRAM_BW_UTIL (percent), NVLINK_TOTAL_RX_PER_SEC and TX (MiB a second).
TENSOR_METRIC: Final = 5
DRAM_METRIC: Final = 10
NVLINK_METRICS: Final = (60, 61)
METRICS: Final = (TENSOR_METRIC, DRAM_METRIC, *NVLINK_METRICS)
# A second sample that is later than this after the first tells of another time.
MAX_SPAN_S: Final = 10.0
MIB: Final = 1 << 20

NOT_WATCHED: Final = Absent("read while the engine is in doubt")
FIRST_SAMPLE: Final = Absent("the first of two samples")
_UNSUPPORTED: Final = Absent("this GPU has no GPM, which begins with Hopper")


@dataclass(slots=True)
class _GpmSamples:
    """Two samples of a device that take turns, and when the newer one was taken; None: there is none yet."""

    older: Any
    newer: Any
    at: float | None = None


class ActivityMeter:
    """GPM of the devices of one NVML session. `call` makes one call of `nvml`; `lost_codes` end the session."""

    def __init__(self, nvml: Any, call: Callable[..., Any], lost_codes: Collection[int]) -> None:
        self._nvml = nvml
        self._call = call
        self._lost_codes = lost_codes
        self._samples: dict[str, _GpmSamples | Absent] = {}  # by UUID

    def read(
        self, uuid: str, handle: Any, whole: Any, mig: int | None, now: float, closely: bool
    ) -> Reading[GpuActivity]:
        """What the device did since the reading before. Raises NVMLError if it is lost.

        `handle`: of the device, `whole`: of its GPU; they differ for a slice, which has a number `mig`.
        """
        if not closely:
            if isinstance(kept := self._samples.get(uuid), _GpmSamples):
                kept.at = None
            return NOT_WATCHED
        try:
            return self._measure(uuid, handle, whole, mig, now)
        except self._nvml.NVMLError as e:
            if e.value in self._lost_codes:
                raise
            self._forget(uuid, Absent(f"NVML: {e}"))
            return Absent(f"NVML: {e}")

    def close(self) -> None:
        """Free the samples."""
        for uuid in list(self._samples):
            self._forget(uuid, None)

    def _measure(self, uuid: str, handle: Any, whole: Any, mig: int | None, now: float) -> Reading[GpuActivity]:
        nvml, samples = self._nvml, self._samples.get(uuid)
        if samples is None:
            samples = self._samples[uuid] = self._open(whole)
        if isinstance(samples, Absent):
            return samples
        samples.older, samples.newer = samples.newer, samples.older
        if mig is None:
            self._call(nvml.nvmlGpmSampleGet, handle, samples.newer)
        else:
            instance = self._call(nvml.nvmlDeviceGetGpuInstanceId, handle)
            self._call(nvml.nvmlGpmMigSampleGet, whole, instance, samples.newer)
        before, samples.at = samples.at, now
        if before is None or now - before > MAX_SPAN_S:
            return FIRST_SAMPLE
        return Value(self._between(samples), at=now, seconds=now - before)

    def _open(self, whole: Any) -> _GpmSamples | Absent:
        if not self._call(self._nvml.nvmlGpmQueryDeviceSupport, whole).isSupportedDevice:
            return _UNSUPPORTED
        first = self._call(self._nvml.nvmlGpmSampleAlloc)
        try:
            return _GpmSamples(first, self._call(self._nvml.nvmlGpmSampleAlloc))
        except self._nvml.NVMLError:
            self._nvml.nvmlGpmSampleFree(first)
            raise

    def _between(self, samples: _GpmSamples) -> GpuActivity:
        wanted = self._nvml.c_nvmlGpmMetricsGet_t()
        wanted.version = self._nvml.NVML_GPM_METRICS_GET_VERSION
        wanted.sample1, wanted.sample2 = samples.older, samples.newer
        wanted.numMetrics = len(METRICS)
        for place, metric in enumerate(METRICS):
            wanted.metrics[place].metricId = metric
        got = self._call(self._nvml.nvmlGpmMetricsGet, wanted).metrics[: len(METRICS)]
        values = {metric.metricId: metric.value for metric in got if metric.nvmlReturn == 0}
        links = [values[metric] * MIB for metric in NVLINK_METRICS if metric in values]
        tensor, dram = values.get(TENSOR_METRIC), values.get(DRAM_METRIC)
        return GpuActivity(
            None if tensor is None else tensor / 100,
            None if dram is None else dram / 100,
            sum(links) if links else None,
        )

    def _forget(self, uuid: str, why: Absent | None) -> None:
        """Free a device's samples. `why`: why it is not asked again until NVML is opened again."""
        samples = self._samples.pop(uuid, None)
        if isinstance(samples, _GpmSamples):
            for sample in (samples.older, samples.newer):
                try:
                    self._call(self._nvml.nvmlGpmSampleFree, sample)
                except self._nvml.NVMLError:
                    continue
        if why is not None:
            self._samples[uuid] = why
