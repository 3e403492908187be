"""The numbers of one GPU, asked of NVML: which calls, in which units, and what a slice of a GPU does not have.

Rules: what NVML gives in one batch of fields is asked in one call, and each field's own return code is looked at; what the batch
does not give (an old driver, an unknown field) is asked by the call of its own. Lists of processes take a lock of the whole driver
and milliseconds: once in PROCESS_PERIOD. Of a MIG slice NVML has no utilisation, and its power and energy are those of the whole
GPU, which others share: absent, never 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from sidecar.readings import SLOWDOWNS, Absent, Failed, GpuSample, Reading, Value

T = TypeVar("T")
Ask = Callable[..., Any]  # one NVML call, watched

PROCESS_PERIOD: Final = 30.0  # seconds
MAX_SLICES: Final = 16  # of one GPU; NVIDIA's have 7 at most

# NVML's codes, as numbers because the module that names them is imported only where there is a driver.
INVALID: Final = 2  # how an older driver refuses a field that it does not know
NOT_FOUND: Final = 6
NOT_HERE: Final = frozenset({3, 13})  # not supported, function not found
GONE: Final = frozenset({1, 15, 16, 18})  # uninitialised, lost, reset required, driver mismatch: ask nothing more
REMEDY: Final = {
    1: "NVML is not initialised any more; it is being restarted",
    4: "the GPU's device files may not be opened; if it worked before, a systemd daemon-reload on the node took them"
    " away: restart the pod",
    9: "the NVIDIA driver is not loaded on this node",
    13: "the driver library lacks a function that we need; update the driver",
    15: "the GPU is lost (XID 79); the node needs a reboot",
    16: "the GPU needs a reset; drain the node",
    18: "driver library and kernel module differ in version; the node needs a reboot, the pod a restart",
    999: "the driver does not say why; if it worked before, a systemd daemon-reload on the node took the devices away:"
    " restart the pod",
}

POWER: Final = 185  # NVML_FI_DEV_POWER_AVERAGE, milliwatts over a second
ENERGY: Final = 83  # NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION, millijoules since the driver was loaded
BATCH: Final = (POWER, ENERGY)
# nvmlValueType_t -> the member of nvmlValue_t that holds it.
MEMBERS: Final = {0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal", 6: "usVal"}

SM_CLOCK: Final = 1  # nvmlClockType_t
# Bits of nvmlClocksEventReasons, in the order of SLOWDOWNS.
REASON_BITS: Final = dict(zip((0x04, 0x08, 0x20, 0x40, 0x80), SLOWDOWNS, strict=True))

_OF_THE_WHOLE: Final = Absent("MIG: NVML has this number of the whole GPU only, which other slices share")
_NO_UTILIZATION: Final = Absent("MIG: NVML has no utilisation of a slice")


@dataclass(frozen=True, slots=True)
class GpuDevice:
    """One GPU, or one MIG slice of it, in one NVML session. `handle` is NVML's own; where it could not be had, `error` says why.

    `whole` is the handle of the GPU that a slice belongs to; the same as `handle` for a GPU that is not sliced.
    """

    index: int
    name: str
    uuid: str
    handle: Any
    whole: Any
    mig: int | None = None
    error: Exception | None = None


class GpuSampler:
    """Samples of one NVML session's devices. `ask` makes one call of the module `nvml`."""

    def __init__(self, nvml: Any, ask: Ask, xids: Callable[[int], tuple[tuple[int, int], ...]]) -> None:
        self._nvml = nvml
        self._ask = ask
        self._xids = xids
        self._processes: dict[str, tuple[float, Reading[int]]] = {}  # by UUID: when asked, what came

    def sample(self, device: GpuDevice, now: float) -> GpuSample:
        """Each number of one device. Raises NVMLError when it will answer nothing more."""
        if device.error is not None:
            raise device.error
        nvml, handle = self._nvml, device.handle
        sliced = device.mig is not None
        memory = self._number(now, nvml.nvmlDeviceGetMemoryInfo, lambda m: (int(m.used), int(m.total)), handle)
        batch = {} if sliced else self._batch(handle, now)
        return GpuSample(
            index=device.index,
            name=device.name,
            uuid=device.uuid,
            utilization=_NO_UTILIZATION if sliced else self._utilization(handle, now),
            memory_used=_part(memory, 0),
            memory_total=_part(memory, 1),
            power=_OF_THE_WHOLE if sliced else _thousandth(batch.get(POWER) or self._power(handle, now)),
            temperature=self._number(
                now, nvml.nvmlDeviceGetTemperature, float, device.whole, nvml.NVML_TEMPERATURE_GPU
            ),
            xid_errors=self._xids(device.index),
            mig=device.mig,
            energy=_OF_THE_WHOLE if sliced else _thousandth(batch.get(ENERGY) or self._energy(handle, now)),
            sm_clock=self._number(now, nvml.nvmlDeviceGetClockInfo, _hertz, device.whole, SM_CLOCK),
            slowdowns=self._slowdowns(device.whole, now),
            processes=self._process_count(device, now),
        )

    def lost(self, device: GpuDevice, error: Any) -> GpuSample:
        """A device that answers nothing: every number failed, its XID errors kept."""
        why = failed(error)
        return GpuSample(
            device.index, device.name, device.uuid, why, why, why, why, why, self._xids(device.index), device.mig, why, why, why, why,
        )  # fmt: skip

    def _number(self, now: float, call: Callable[..., Any], convert: Callable[[Any], T], *args: Any) -> Reading[T]:
        try:
            return Value(convert(self._ask(call, *args)), at=now)
        except self._nvml.NVMLError as e:
            if e.value in GONE:
                raise
            return Absent(f"NVML: {e}") if e.value in NOT_HERE else failed(e)

    def _batch(self, handle: Any, now: float) -> dict[int, Value[float]]:
        """The fields of BATCH that this driver gives, in NVML's units."""
        try:
            fields = self._ask(self._nvml.nvmlDeviceGetFieldValues, handle, BATCH)
        except self._nvml.NVMLError as e:
            if e.value in GONE:
                raise
            return {}
        return {
            int(field.fieldId): Value(float(getattr(field.value, MEMBERS[field.valueType])), at=now)
            for field in fields
            if field.nvmlReturn == 0 and field.valueType in MEMBERS
        }

    def _utilization(self, handle: Any, now: float) -> Reading[float]:
        return self._number(now, self._nvml.nvmlDeviceGetUtilizationRates, lambda rates: rates.gpu / 100, handle)

    def _power(self, handle: Any, now: float) -> Reading[float]:
        return self._number(now, self._nvml.nvmlDeviceGetPowerUsage, float, handle)

    def _energy(self, handle: Any, now: float) -> Reading[float]:
        return self._number(now, self._nvml.nvmlDeviceGetTotalEnergyConsumption, float, handle)

    def _slowdowns(self, handle: Any, now: float) -> Reading[tuple[str, ...]]:
        # The older of the function's two names: every driver has it.
        return self._number(now, self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons, slowdowns, handle)

    def _process_count(self, device: GpuDevice, now: float) -> Reading[int]:
        asked, reading = self._processes.get(device.uuid, (float("-inf"), Absent("not read yet")))
        if now - asked >= PROCESS_PERIOD:
            reading = self._number(now, self._nvml.nvmlDeviceGetComputeRunningProcesses, len, device.handle)
            self._processes[device.uuid] = (now, reading)
        return reading


def found(nvml: Any, ask: Ask, index: int, name: str = "", uuid: str = "") -> list[GpuDevice]:
    """GPU `index`, or the slices of it that can be seen from here. A GPU without a handle keeps the `name` and `uuid` it had."""
    try:
        whole = ask(nvml.nvmlDeviceGetHandleByIndex, index)
        name, uuid = ask(nvml.nvmlDeviceGetName, whole), ask(nvml.nvmlDeviceGetUUID, whole)
    except nvml.NVMLError as e:
        return [GpuDevice(index, name, uuid, None, None, error=e)]
    return _slices(nvml, ask, index, whole) or [GpuDevice(index, name, uuid, whole, whole)]


def _slices(nvml: Any, ask: Ask, index: int, whole: Any) -> list[GpuDevice]:
    """The MIG slices that this container was given; none where the GPU is not sliced."""
    try:
        current, _ = ask(nvml.nvmlDeviceGetMigMode, whole)
        most = ask(nvml.nvmlDeviceGetMaxMigDeviceCount, whole) if current else 0
    except nvml.NVMLError:
        return []
    slices = []
    for place in range(min(most, MAX_SLICES)):
        try:
            handle = ask(nvml.nvmlDeviceGetMigDeviceHandleByIndex, whole, place)
            name, uuid = ask(nvml.nvmlDeviceGetName, handle), ask(nvml.nvmlDeviceGetUUID, handle)
        except nvml.NVMLError:  # not found: an empty place, or the slice of another container
            continue
        slices.append(GpuDevice(index, name, uuid, handle, whole, mig=place))
    return slices


def slowdowns(bits: int) -> tuple[str, ...]:
    """The reasons in NVML's bits why the clocks are lower than they could be."""
    return tuple(name for bit, name in REASON_BITS.items() if bits & bit)


def failed(error: Any) -> Failed:
    """An NVML error as a reading, with what to do about it."""
    remedy = REMEDY.get(error.value)
    return Failed(f"NVML: {error}" + (f": {remedy}" if remedy else ""))


def _hertz(megahertz: int) -> int:
    return int(megahertz) * 1_000_000


def _thousandth(reading: Reading[float]) -> Reading[float]:
    return Value(reading.value / 1000, at=reading.at) if isinstance(reading, Value) else reading


def _part(pair: Reading[tuple[int, int]], place: int) -> Reading[int]:
    return Value(pair.value[place], at=pair.at) if isinstance(pair, Value) else pair
