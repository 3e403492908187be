"""The GPU signal against a scripted driver library, which is loaded once per process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.runtime import own_gpu_use
from sidecar.runtime.own_gpu_use import OwnGpuUse

from ..nvml_stub.build import build
from ..waiting import PATIENCE

HERE = Path(__file__).parent.parent / "nvml_stub"
FIELDS = (
    "utilization",
    "memory_used",
    "memory_total",
    "power",
    "temperature",
    "energy",
    "sm_clock",
    "slowdowns",
    "processes",
)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory, requires: Callable[[str], Path]) -> Path:
    return build(requires("gcc"), tmp_path_factory.mktemp("nvml") / "lib")


class Watched:
    """A process that prints the GPU signal's readings, and the script of its driver."""

    def __init__(self, library: Path | None, script: Path, text: str, *, timeout_s: float = PATIENCE) -> None:
        self._script = script
        self.rewrite(text)
        path = {"LD_LIBRARY_PATH": str(library)} if library else {}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", HERE / "watch.py", "0.02", str(timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "NVML_STUB_SCRIPT": str(script), **path},
        )

    def rewrite(self, text: str) -> None:
        """Replace the script in one step."""
        new = self._script.with_suffix(".new")
        new.write_text(text)
        new.replace(self._script)

    def until(self, wanted: Callable[[Any], bool]) -> Any:
        """The next reading that is wanted."""
        assert self._process.stdout is not None
        seen = []
        for line in self._process.stdout:
            seen.append(json.loads(line))
            if wanted(seen[-1]):
                return seen[-1]
        raise AssertionError(f"ended before it came; seen: {seen}")

    def stop(self) -> tuple[bool, bool]:
        """Stop it. Returns whether all threads stopped in time, and whether NVML's bindings were imported."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        stopped = self.until(lambda r: "stopped" in r)["stopped"]
        return stopped, self.until(lambda r: "bindings" in r)["bindings"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


Watch = Callable[..., Watched]


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    opened: list[Watched] = []

    def start(library: Path | None, text: str = "", **more: float) -> Watched:
        opened.append(Watched(library, tmp_path / "script", text, **more))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def values(reading: Any) -> bool:
    return isinstance(reading, list)


def failed(reading: Any) -> bool:
    return isinstance(reading, dict) and "Failed" in reading


def test_a_healthy_gpu_gives_numbers_in_base_units(stub: Path, watch: Watch) -> None:
    """NVML's percent, bytes, milliwatts and degrees become shares, bytes, watts and degrees, and the threads end."""
    watched = watch(stub)
    assert watched.until(lambda r: values(r) and r[0]["xids_watched"]) == [
        {
            "index": 0,
            "name": "Stub GPU",
            "uuid": "GPU-0",
            "utilization": 0.93,
            "memory_used": 60 << 30,
            "memory_total": 80 << 30,
            "power": 640.5,
            "temperature": 61.0,
            "xid_errors": [],
            "mig": None,
            "energy": 5000000.5,
            "sm_clock": 1_980_000_000,
            "slowdowns": ["power_cap", "thermal_hardware"],
            "processes": 2,
            "xids_watched": True,
            "activity": {"Absent": "read while the engine is in doubt"},
            "faults": {"Absent": "the driver reports no faults"},
            "events": [],
        }
    ]
    assert watched.stop() == (True, True)


@pytest.mark.skipif(
    any(Path(p, "libnvidia-ml.so.1").exists() for p in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib")),
    reason="this machine has a real driver library",
)
def test_no_driver_library_is_absent_and_costs_no_bindings(watch: Watch) -> None:
    """Without libnvidia-ml.so.1 the signal is absent, not failed, and pynvml is never imported."""
    watched = watch(None)
    assert watched.until(lambda r: "driver" in str(r)) == {"Absent": "no NVIDIA driver library (libnvidia-ml.so.1)"}
    assert watched.stop() == (True, False)


def test_no_gpu_is_absent(stub: Path, watch: Watch) -> None:
    """Where the driver counts no GPUs, the signal is absent."""
    assert watch(stub, "count 0").until(lambda r: "visible" in str(r)) == {"Absent": "no NVIDIA GPU is visible here"}


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(1, "not initialised"), (9, "not loaded"), (18, "reboot"), (999, "daemon-reload"), (13, "update the driver")],
)
def test_a_failed_init_has_a_remedy_and_is_retried(stub: Path, watch: Watch, code: int, remedy: str) -> None:
    """A failed init is a failed reading with a remedy; once it succeeds, numbers come without a restart."""
    watched = watch(stub, f"nvmlInitWithFlags {code}")
    assert remedy in watched.until(failed)["Failed"]
    watched.rewrite("")
    assert watched.until(values)[0]["utilization"] == 0.93


def test_a_lost_gpu_keeps_its_place_and_the_other_its_numbers(stub: Path, watch: Watch) -> None:
    """Of two GPUs the lost one has only failed numbers, under its own name; the other is unaffected."""
    watched = watch(stub, "count 2")
    watched.until(values)
    watched.rewrite("count 2\nlost 1")
    first, second = watched.until(lambda r: values(r) and "Failed" in str(r[1]["power"]))
    assert first["power"] == 640.5
    assert second["uuid"] == "GPU-1"
    assert all("reboot" in second[field]["Failed"] for field in FIELDS)


def test_an_xid_stays_visible_when_its_gpu_is_lost(stub: Path, watch: Watch) -> None:
    """XID 79 is counted and stays after the only GPU stops responding; the GPU may come back."""
    watched = watch(stub)
    watched.until(values)
    watched.rewrite("xid 79")
    watched.until(lambda r: values(r) and r[0]["xid_errors"] == [[79, 1]])
    watched.rewrite("xid 79\nlost 0")
    lost = watched.until(lambda r: values(r) and "Failed" in str(r[0]["power"]))[0]
    assert lost["xid_errors"] == [[79, 1]]
    watched.rewrite("xid 79")
    assert watched.until(lambda r: values(r) and r[0]["power"] == 640.5)[0]["xid_errors"] == [[79, 1]]


def test_a_number_that_the_gpu_lacks_is_absent_and_one_that_failed_is_failed(stub: Path, watch: Watch) -> None:
    """MIG has no utilisation (not supported: absent); an error in temperature is failed; the rest has values."""
    watched = watch(stub, "nvmlDeviceGetUtilizationRates 3\nnvmlDeviceGetTemperature 4")
    gpu = watched.until(values)[0]
    assert "Absent" in gpu["utilization"]
    assert "device files" in gpu["temperature"]["Failed"]
    assert (gpu["memory_used"], gpu["power"]) == (60 << 30, 640.5)


def test_what_an_old_driver_lacks_is_read_otherwise_or_absent(
    tmp_path: Path, requires: Callable[[str], Path], watch: Watch
) -> None:
    """Without batches, power is read by its own call; energy, which has none, is absent; the rest has values."""
    gpu = watch(build(requires("gcc"), tmp_path / "old", "-DOLD")).until(values)[0]
    assert gpu["power"] == 640.0
    assert "Absent" in gpu["energy"]
    assert gpu["temperature"] == 61.0


def test_each_field_of_a_batch_has_a_code_of_its_own(stub: Path, watch: Watch) -> None:
    """A field that failed in a successful batch is read by its single call, never taken for 0."""
    gpu = watch(stub, "field 2").until(values)[0]
    assert (gpu["power"], gpu["energy"]) == (640.0, 7.0)


def test_a_slice_has_its_own_memory_and_nothing_of_its_neighbours(stub: Path, watch: Watch) -> None:
    """Of a sliced GPU only visible slices are reported; numbers of the whole GPU are absent from them."""
    first, second = watch(stub, "count 2\nmig 3").until(values)
    assert (first["index"], first["mig"], first["uuid"]) == (0, 3, "MIG-0-3")
    assert (first["memory_used"], first["temperature"]) == (7 << 30, 61.0)
    assert all("MIG" in first[number]["Absent"] for number in ("utilization", "power", "energy"))
    assert (second["mig"], second["power"]) == (None, 640.5)


def test_an_xid_of_a_sliced_gpu_is_counted_once(stub: Path, watch: Watch) -> None:
    """Slices share the events of their GPU."""
    watched = watch(stub, "mig 3\nxid 31")
    assert watched.until(lambda r: values(r) and r[0]["xid_errors"])[0]["xid_errors"] == [[31, 1]]


def test_process_lists_are_read_rarely(stub: Path, watch: Watch) -> None:
    """A list of processes locks the driver: only the first of many rounds reads it."""
    watched = watch(stub)
    watched.until(values)
    watched.rewrite("processes 5\nnvmlDeviceGetTemperature 4")
    again = watched.until(lambda r: values(r) and "Failed" in str(r[0]["temperature"]))
    assert again[0]["processes"] == 2


@pytest.mark.parametrize("function", ["nvmlInitWithFlags", "nvmlDeviceGetMemoryInfo"])
def test_a_call_that_hangs_fails_the_reading_and_recovers(stub: Path, watch: Watch, function: str) -> None:
    """While NVML hangs, readers get a failure with its age instead of waiting; afterwards the numbers are back."""
    watched = watch(stub, f"hang {function}", timeout_s=0.1)
    assert re.match(r"NVML did not answer for \d+ s", watched.until(failed)["Failed"])
    watched.rewrite("")
    assert watched.until(values)[0]["power"] == 640.5
    assert watched.stop() == (True, True)


def test_stop_does_not_wait_for_a_call_that_hangs(stub: Path, watch: Watch) -> None:
    """`stop` returns False while the thread hangs in NVML, and the process can still end."""
    watched = watch(stub, "hang nvmlDeviceGetName", timeout_s=0.1)
    watched.until(failed)
    assert watched.stop() == (False, True)


def test_events_that_the_driver_lacks_cost_nothing_else(stub: Path, watch: Watch) -> None:
    """Without event sets there are no XID counts, and all numbers."""
    gpu = watch(stub, "nvmlEventSetCreate 3").until(values)[0]
    assert (gpu["xid_errors"], gpu["xids_watched"], gpu["power"]) == ([], False, 640.5)


def test_what_a_gpu_does_is_read_while_the_engine_is_in_doubt(stub: Path, watch: Watch, tmp_path: Path) -> None:
    """GPM gives shares and bytes a second between two samples, a metric that it lacks is None; then it is not read."""
    watched = watch(stub, "gpm 1\ntensor 40\ndram 25\nnvlink 100")
    assert watched.until(values)[0]["activity"] == {"Absent": "read while the engine is in doubt"}
    closely = tmp_path / "closely"
    closely.touch()
    seen = watched.until(lambda r: values(r) and "tensor" in r[0]["activity"])[0]["activity"]
    assert seen == {"tensor": 0.4, "dram": 0.25, "nvlink": float(200 << 20)}
    watched.rewrite("gpm 1\nno nvlink\nno tensor\ndram 3")
    assert watched.until(lambda r: values(r) and r[0]["activity"].get("dram") == 0.03)[0]["activity"]["tensor"] is None
    closely.unlink()
    watched.until(lambda r: values(r) and "Absent" in r[0]["activity"])
    assert watched.stop() == (True, True)


@pytest.mark.parametrize(
    ("script", "why"),
    [("gpm 0", "Hopper"), ("gpm 1\nnvmlGpmSampleGet 4", "NVML"), ("nvmlGpmQueryDeviceSupport 13", "NVML")],
)
def test_without_gpm_activity_is_absent_and_nothing_else(
    stub: Path, watch: Watch, tmp_path: Path, script: str, why: str
) -> None:
    """An older GPU, a driver that does not permit it, and one without the function."""
    (tmp_path / "closely").touch()
    gpu = watch(stub, script).until(lambda r: values(r) and why in str(r[0]["activity"]))[0]
    assert why in gpu["activity"]["Absent"] and gpu["power"] == 640.5


def test_an_old_driver_has_neither_activity_nor_faults(
    tmp_path: Path, requires: Callable[[str], Path], watch: Watch
) -> None:
    """Functions that the library lacks are absent numbers; XIDs are counted all the same."""
    (tmp_path / "closely").touch()
    watched = watch(build(requires("gcc"), tmp_path / "old", "-DOLD"), "xid 31")
    gpu = watched.until(lambda r: values(r) and r[0]["xid_errors"])[0]
    assert "Absent" in gpu["activity"] and "Absent" in gpu["faults"] and gpu["xid_errors"] == [[31, 1]]


def test_a_slice_has_its_own_activity(stub: Path, watch: Watch, tmp_path: Path) -> None:
    """By the number of its GPU instance; faults are those of the whole GPU."""
    (tmp_path / "closely").touch()
    watched = watch(stub, "mig 3\ngpm 1\ntensor 10\nrecovery 0")
    gpu = watched.until(lambda r: values(r) and "tensor" in r[0]["activity"])[0]
    assert (gpu["mig"], gpu["activity"]["tensor"], gpu["faults"]["recovery"]) == (3, 0.1, "none")


def test_faults_of_a_gpu(stub: Path, watch: Watch, tmp_path: Path) -> None:
    """What it needs, ECC and row remapping; a field that the driver lacks is None, an unknown action is "none"."""
    watched = watch(stub, "recovery 1\necc 3\nremap_pending 1")
    assert watched.until(values)[0]["faults"] == {
        "recovery": "gpu_reset",
        "ecc_uncorrected": 3,
        "remap_pending": True,
        "remap_failed": None,
    }
    watched.rewrite("recovery 99\nnvmlDeviceGetTemperature 4")
    again = watched.until(lambda r: values(r) and "Failed" in str(r[0]["temperature"]))[0]
    assert again["faults"]["recovery"] == "gpu_reset"  # read rarely without a doubt
    (tmp_path / "closely").touch()
    assert (
        watched.until(lambda r: values(r) and r[0]["faults"].get("recovery") == "none")[0]["faults"]["remap_failed"]
        is None
    )


def test_operational_events_are_counted_with_xids(stub: Path, watch: Watch) -> None:
    """A driver that has them gives both in one form."""
    watched = watch(stub, "operational 40")
    assert watched.until(lambda r: values(r) and r[0]["events"])[0]["events"] == [["fatal", 1]]
    watched.rewrite("operational 30")
    watched.until(lambda r: values(r) and r[0]["events"] == [["fatal", 1], ["recoverable", 1]])
    watched.rewrite("operational 30\nxid 48")
    assert watched.until(lambda r: values(r) and r[0]["xid_errors"])[0]["xid_errors"] == [[48, 1]]


def test_xids_of_our_own_process_are_not_counted(stub: Path, watch: Watch, tmp_path: Path) -> None:
    """Around a failure of the process that resizes images on the GPU, XIDs are its own; later ones are the engine's."""
    use = tmp_path / own_gpu_use.FILE_NAME
    own_gpu_use.write(use, OwnGpuUse(running=True))
    watched = watch(stub)
    watched.until(values)
    watched.rewrite("xid 31")
    own_gpu_use.write(use, OwnGpuUse(running=False, failed_at=time.monotonic()))
    watched.until(lambda r: "not counted" in str(r))
    own_gpu_use.write(use, OwnGpuUse(running=True, failed_at=time.monotonic() - 3600))
    watched.rewrite("xid 43")
    assert watched.until(lambda r: values(r) and r[0]["xid_errors"])[0]["xid_errors"] == [[43, 1]]
