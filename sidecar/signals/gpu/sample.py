"""The numbers of one GPU: the NVML calls, their units, and what a slice of a GPU does not have.

- Fields that NVML gives in a batch are read in one call, and each field's own return code is checked. Fields that the
  batch lacks (an old driver, an unknown field) are read by single calls.
- A list of processes takes milliseconds and a lock of the whole driver: once per PROCESS_LIST_INTERVAL_S. As often the
  driver is asked for faults, and in each sample while the engine is in doubt.
- What a GPU does (GPM) is only asked while the engine is in doubt.
- A MIG slice has no utilisation. Its power and energy are those of the whole GPU, which others share: absent, never 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from sidecar.readings import RECOVERY_ACTIONS, SLOWDOWNS, Absent, Failed, GpuFaults, GpuSample, Reading, Value
from sidecar.signals.gpu.activity import ActivityMeter

T = TypeVar("T")
NvmlCall = Callable[..., Any]  # makes one NVML call

PROCESS_LIST_INTERVAL_S: Final = 30.0
FAULTS_INTERVAL_S: Final = 30.0
MAX_SLICES: Final = 16  # per GPU; NVIDIA's have at most 7

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
# NVML_FI_DEV_GET_GPU_RECOVERY_ACTION, NVML_FI_DEV_ECC_DBE_VOL_TOTAL, NVML_FI_DEV_REMAPPED_PENDING and
# NVML_FI_DEV_REMAPPED_FAILURE.
RECOVERY_FIELD: Final = 230
ECC_FIELD: Final = 4
REMAP_PENDING_FIELD: Final = 144
REMAP_FAILED_FIELD: Final = 145
FAULT_FIELDS: Final = (RECOVERY_FIELD, ECC_FIELD, REMAP_PENDING_FIELD, REMAP_FAILED_FIELD)
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
    """One GPU, or one MIG slice of it, in one NVML session."""

    index: int
    name: str
    uuid: str
    handle: Any
    whole: Any  # the handle of the GPU that a slice belongs to; `handle` for a GPU without slices
    mig: int | None = None
    error: Exception | None = None  # why there is no handle


class GpuSampler:
    """Samples the devices of one NVML session. `call` makes one call of the module `nvml`.

    `xids`: the XID errors of a GPU so far; `is_watched`: whether its driver reports any; `events`: its GPU Operational
    Events so far.
    """

    def __init__(
        self,
        nvml: Any,
        call: NvmlCall,
        xids: Callable[[int], tuple[tuple[int, int], ...]],
        is_watched: Callable[[int], bool],
        events: Callable[[int], tuple[tuple[str, int], ...]],
    ) -> None:
        self._nvml = nvml
        self._call = call
        self._xids = xids
        self._is_watched = is_watched
        self._events = events
        self._activity = ActivityMeter(nvml, call, LOST_CODES)
        self._faults: dict[str, tuple[float, Reading[GpuFaults]]] = {}  # UUID -> time and result of the last reading
        self._process_counts: dict[str, tuple[float, Reading[int]]] = {}  # UUID -> time and result of the last list

    def sample(self, device: GpuDevice, now: float, closely: bool) -> GpuSample:
        """All numbers of one device; `closely`: while the engine is in doubt. Raises NVMLError if it is lost."""
        if device.error is not None:
            raise device.error
        nvml, handle, whole = self._nvml, device.handle, device.whole
        memory = self._read(now, nvml.nvmlDeviceGetMemoryInfo, lambda m: (int(m.used), int(m.total)), handle)
        used, total = _pick(memory, 0), _pick(memory, 1)
        temperature = self._read(now, nvml.nvmlDeviceGetTemperature, float, whole, nvml.NVML_TEMPERATURE_GPU)
        clock = self._read(now, nvml.nvmlDeviceGetClockInfo, lambda megahertz: megahertz * 1_000_000, whole, SM_CLOCK)
        # The older of the function's two names, which every driver has.
        slowdowns = self._read(now, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, _decode_slowdowns, whole)
        processes = self._read_process_count(device, now)
        utilization: Reading[float] = _NO_UTILIZATION
        power: Reading[float] = _OF_THE_WHOLE
        energy: Reading[float] = _OF_THE_WHOLE
        if device.mig is None:
            batch = self._read_batch(handle, now)
            utilization = self._read(now, nvml.nvmlDeviceGetUtilizationRates, lambda rates: rates.gpu / 100, handle)
            power = batch.get(POWER_FIELD) or self._read(now, nvml.nvmlDeviceGetPowerUsage, _from_milli, handle)
            used_energy = nvml.nvmlDeviceGetTotalEnergyConsumption
            energy = batch.get(ENERGY_FIELD) or self._read(now, used_energy, _from_milli, handle)
        where, xids = (device.index, device.name, device.uuid), self._xids(device.index)
        is_watched = self._is_watched(device.index)
        return GpuSample(
            *where,
            utilization,
            used,
            total,
            power,
            temperature,
            xids,
            device.mig,
            energy,
            clock,
            slowdowns,
            processes,
            is_watched,
            self._activity.read(device.uuid, handle, whole, device.mig, now, closely),
            self._read_faults(device, now, closely),
            self._events(device.index),
        )

    def close(self) -> None:
        """Give the session's memory back."""
        self._activity.close()

    def sample_lost(self, device: GpuDevice, why: Failed) -> GpuSample:
        """The sample of a device that does not respond: every number failed, its XID errors kept."""
        where, xids = (device.index, device.name, device.uuid), self._xids(device.index)
        is_watched = self._is_watched(device.index)
        events = self._events(device.index)
        return GpuSample(
            *where, why, why, why, why, why, xids, device.mig, why, why, why, why, is_watched, why, why, events
        )

    def _read(self, now: float, function: Callable[..., Any], convert: Callable[[Any], T], *args: Any) -> Reading[T]:
        try:
            return Value(convert(self._call(function, *args)), at=now)
        except self._nvml.NVMLError as e:
            if e.value in LOST_CODES:
                raise
            return Absent(f"NVML: {e}") if e.value in UNSUPPORTED_CODES else to_failed(e)

    def _read_batch(self, handle: Any, now: float) -> dict[int, Value[float]]:
        """Power and energy, as far as this driver has them in a batch."""
        return {
            field: Value(_from_milli(number), at=now)
            for field, number in self._read_fields(handle, BATCH_FIELDS).items()
        }

    def _read_fields(self, handle: Any, wanted: tuple[int, ...]) -> dict[int, float]:
        """Those of some fields that this driver has, in one call. Raises NVMLError if the device is lost."""
        try:
            fields = self._call(self._nvml.nvmlDeviceGetFieldValues, handle, wanted)
        except self._nvml.NVMLError as e:
            if e.value in LOST_CODES:
                raise
            return {}
        return {
            int(field.fieldId): getattr(field.value, VALUE_MEMBERS[field.valueType])
            for field in fields
            if field.nvmlReturn == 0 and field.valueType in VALUE_MEMBERS
        }

    def _read_faults(self, device: GpuDevice, now: float, closely: bool) -> Reading[GpuFaults]:
        """Of the whole GPU, also for a slice: a fault of one may need all of them to be reset."""
        read_at, reading = self._faults.get(device.uuid, (float("-inf"), Absent("not read yet")))
        if closely or now - read_at >= FAULTS_INTERVAL_S:
            found = _faults_of(self._read_fields(device.whole, FAULT_FIELDS))
            reading = Absent("the driver reports no faults") if found == GpuFaults() else Value(found, at=now)
            self._faults[device.uuid] = (now, reading)
        return reading

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


def to_failed(error: Any) -> Failed:
    """An NVML error as a reading, with its remedy."""
    remedy = REMEDIES.get(error.value)
    return Failed(f"NVML: {error}" + (f": {remedy}" if remedy else ""))


def _decode_slowdowns(bits: int) -> tuple[str, ...]:
    return tuple(name for bit, name in REASON_BITS.items() if bits & bit)


def _faults_of(fields: dict[int, float]) -> GpuFaults:
    """An action that is newer than this list counts as none: what it asks for is unknown."""
    action, errors = fields.get(RECOVERY_FIELD), fields.get(ECC_FIELD)
    pending, failed = fields.get(REMAP_PENDING_FIELD), fields.get(REMAP_FAILED_FIELD)
    return GpuFaults(
        None if action is None else dict(enumerate(RECOVERY_ACTIONS)).get(int(action), RECOVERY_ACTIONS[0]),
        None if errors is None else int(errors),
        None if pending is None else bool(pending),
        None if failed is None else bool(failed),
    )


def _from_milli(number: float) -> float:
    return number / 1000


def _pick(pair: Reading[tuple[int, int]], index: int) -> Reading[int]:
    return Value(pair.value[index], at=pair.at) if isinstance(pair, Value) else pair
