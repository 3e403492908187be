"""The numbers of one GPU: the NVML calls, their units, and what a slice of a GPU does not have.

- Fields that NVML gives in a batch are read in one call, and each field's own return code is checked. Fields that the
  batch lacks (an old driver, an unknown field) are read by single calls.
- A list of processes takes milliseconds and a lock of the whole driver: once per PROCESS_LIST_INTERVAL_S.
- A MIG slice has no utilisation. Its power and energy are those of the whole GPU, which others share: absent, never 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from sidecar.readings import SLOWDOWNS, Absent, Failed, GpuSample, Reading, Value

T = TypeVar("T")
# Makes one NVML call.
NvmlCall = Callable[..., Any]

PROCESS_LIST_INTERVAL_S: Final = 30.0
# Per GPU; NVIDIA's have at most 7.
MAX_SLICES: Final = 16

# NVML's codes as numbers, because pynvml is imported only if there is a driver.
# Not supported, function not found.
UNSUPPORTED_CODES: Final = frozenset({3, 13})
# Uninitialised, lost, reset required, driver mismatch: every further call would fail.
LOST_CODES: Final = frozenset({1, 15, 16, 18})
REMEDIES: Final = {
    1: "NVML is not initialised; it is being restarted",
    4: "no permission for the GPU's device files; if it worked before, a systemd daemon-reload on the node removed"
    " them: restart the pod",
    9: "the NVIDIA driver is not loaded on this node",
    13: "the driver library lacks a required function; update the driver",
    15: "the GPU is lost (XID 79); the node needs a reboot",
    16: "the GPU needs a reset; drain the node",
    18: "driver library and kernel module differ in version; the node needs a reboot, the pod a restart",
    999: "the driver gives no reason; if it worked before, a systemd daemon-reload on the node removed the devices:"
    " restart the pod",
}

# NVML_FI_DEV_POWER_AVERAGE, milliwatts over a second.
POWER_FIELD: Final = 185
# NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION, millijoules since the driver was loaded.
ENERGY_FIELD: Final = 83
BATCH_FIELDS: Final = (POWER_FIELD, ENERGY_FIELD)
# nvmlValueType_t -> member of nvmlValue_t.
VALUE_MEMBERS: Final = {0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal", 6: "usVal"}

# nvmlClockType_t.
SM_CLOCK: Final = 1
# Bits of nvmlClocksEventReasons, in the order of SLOWDOWNS.
REASON_BITS: Final = dict(zip((0x04, 0x08, 0x20, 0x40, 0x80), SLOWDOWNS, strict=True))

_OF_THE_WHOLE: Final = Absent("MIG: NVML has this number only for the whole GPU, which other slices share")
_NO_UTILIZATION: Final = Absent("MIG: NVML has no utilisation for a slice")


@dataclass(frozen=True, slots=True)
class GpuDevice:
    """One GPU, or one MIG slice of it, in one NVML session.

    `handle` is NVML's; `error` is set if there is none. `whole` is the handle of the GPU that a slice belongs to, or
    `handle` for a GPU without slices.
    """

    index: int
    name: str
    uuid: str
    handle: Any
    whole: Any
    mig: int | None = None
    error: Exception | None = None


class GpuSampler:
    """Samples the devices of one NVML session. `call` makes one call of the module `nvml`."""

    def __init__(self, nvml: Any, call: NvmlCall, xids: Callable[[int], tuple[tuple[int, int], ...]]) -> None:
        self._nvml = nvml
        self._call = call
        self._xids = xids
        self._process_counts: dict[str, tuple[float, Reading[int]]] = {}  # UUID -> time and result of the last list

    def sample(self, device: GpuDevice, now: float) -> GpuSample:
        """All numbers of one device. Raises NVMLError if it no longer responds."""
        if device.error is not None:
            raise device.error
        nvml, handle = self._nvml, device.handle
        is_slice = device.mig is not None
        memory = self._read(now, nvml.nvmlDeviceGetMemoryInfo, lambda m: (int(m.used), int(m.total)), handle)
        batch = {} if is_slice else self._read_batch(handle, now)
        return GpuSample(
            index=device.index,
            name=device.name,
            uuid=device.uuid,
            utilization=_NO_UTILIZATION if is_slice else self._read_utilization(handle, now),
            memory_used=_pick(memory, 0),
            memory_total=_pick(memory, 1),
            power=_OF_THE_WHOLE if is_slice else _from_milli(batch.get(POWER_FIELD) or self._read_power(handle, now)),
            temperature=self._read(now, nvml.nvmlDeviceGetTemperature, float, device.whole, nvml.NVML_TEMPERATURE_GPU),
            xid_errors=self._xids(device.index),
            mig=device.mig,
            energy=_OF_THE_WHOLE
            if is_slice
            else _from_milli(batch.get(ENERGY_FIELD) or self._read_energy(handle, now)),
            sm_clock=self._read(now, nvml.nvmlDeviceGetClockInfo, _to_hertz, device.whole, SM_CLOCK),
            slowdowns=self._read_slowdowns(device.whole, now),
            processes=self._read_process_count(device, now),
        )

    def sample_lost(self, device: GpuDevice, error: Any) -> GpuSample:
        """The sample of a device that does not respond: every number failed, its XID errors kept."""
        reason = to_failed(error)
        return GpuSample(
            index=device.index,
            name=device.name,
            uuid=device.uuid,
            utilization=reason,
            memory_used=reason,
            memory_total=reason,
            power=reason,
            temperature=reason,
            xid_errors=self._xids(device.index),
            mig=device.mig,
            energy=reason,
            sm_clock=reason,
            slowdowns=reason,
            processes=reason,
        )

    def _read(self, now: float, function: Callable[..., Any], convert: Callable[[Any], T], *args: Any) -> Reading[T]:
        try:
            return Value(convert(self._call(function, *args)), at=now)
        except self._nvml.NVMLError as e:
            if e.value in LOST_CODES:
                raise
            return Absent(f"NVML: {e}") if e.value in UNSUPPORTED_CODES else to_failed(e)

    def _read_batch(self, handle: Any, now: float) -> dict[int, Value[float]]:
        """The fields of the batch that this driver has, in NVML's units."""
        try:
            fields = self._call(self._nvml.nvmlDeviceGetFieldValues, handle, BATCH_FIELDS)
        except self._nvml.NVMLError as e:
            if e.value in LOST_CODES:
                raise
            return {}
        return {
            int(field.fieldId): Value(float(getattr(field.value, VALUE_MEMBERS[field.valueType])), at=now)
            for field in fields
            if field.nvmlReturn == 0 and field.valueType in VALUE_MEMBERS
        }

    def _read_utilization(self, handle: Any, now: float) -> Reading[float]:
        return self._read(now, self._nvml.nvmlDeviceGetUtilizationRates, lambda rates: rates.gpu / 100, handle)

    def _read_power(self, handle: Any, now: float) -> Reading[float]:
        return self._read(now, self._nvml.nvmlDeviceGetPowerUsage, float, handle)

    def _read_energy(self, handle: Any, now: float) -> Reading[float]:
        return self._read(now, self._nvml.nvmlDeviceGetTotalEnergyConsumption, float, handle)

    def _read_slowdowns(self, handle: Any, now: float) -> Reading[tuple[str, ...]]:
        # The older of the function's two names, which every driver has.
        return self._read(now, self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons, decode_slowdowns, handle)

    def _read_process_count(self, device: GpuDevice, now: float) -> Reading[int]:
        read_at, reading = self._process_counts.get(device.uuid, (float("-inf"), Absent("not read yet")))
        if now - read_at >= PROCESS_LIST_INTERVAL_S:
            reading = self._read(now, self._nvml.nvmlDeviceGetComputeRunningProcesses, len, device.handle)
            self._process_counts[device.uuid] = (now, reading)
        return reading


def find_devices(nvml: Any, call: NvmlCall, index: int, name: str = "", uuid: str = "") -> list[GpuDevice]:
    """GPU `index`, or its visible slices. Without a handle it gets the given `name` and `uuid`."""
    try:
        whole = call(nvml.nvmlDeviceGetHandleByIndex, index)
        name, uuid = call(nvml.nvmlDeviceGetName, whole), call(nvml.nvmlDeviceGetUUID, whole)
    except nvml.NVMLError as e:
        return [GpuDevice(index, name, uuid, None, None, error=e)]
    return _find_slices(nvml, call, index, whole) or [GpuDevice(index, name, uuid, whole, whole)]


def _find_slices(nvml: Any, call: NvmlCall, index: int, whole: Any) -> list[GpuDevice]:
    """The MIG slices that this container was given; none if the GPU is not sliced."""
    try:
        current, _ = call(nvml.nvmlDeviceGetMigMode, whole)
        count = call(nvml.nvmlDeviceGetMaxMigDeviceCount, whole) if current else 0
    except nvml.NVMLError:
        return []
    slices = []
    for slot in range(min(count, MAX_SLICES)):
        try:
            handle = call(nvml.nvmlDeviceGetMigDeviceHandleByIndex, whole, slot)
            name, uuid = call(nvml.nvmlDeviceGetName, handle), call(nvml.nvmlDeviceGetUUID, handle)
        except nvml.NVMLError:  # an empty slot, or the slice of another container
            continue
        slices.append(GpuDevice(index, name, uuid, handle, whole, mig=slot))
    return slices


def decode_slowdowns(bits: int) -> tuple[str, ...]:
    """NVML's reasons for lowered clocks, by name."""
    return tuple(name for bit, name in REASON_BITS.items() if bits & bit)


def to_failed(error: Any) -> Failed:
    """An NVML error as a reading, with its remedy."""
    remedy = REMEDIES.get(error.value)
    return Failed(f"NVML: {error}" + (f": {remedy}" if remedy else ""))


def _to_hertz(megahertz: int) -> int:
    return int(megahertz) * 1_000_000


def _from_milli(reading: Reading[float]) -> Reading[float]:
    return Value(reading.value / 1000, at=reading.at) if isinstance(reading, Value) else reading


def _pick(pair: Reading[tuple[int, int]], index: int) -> Reading[int]:
    return Value(pair.value[index], at=pair.at) if isinstance(pair, Value) else pair
