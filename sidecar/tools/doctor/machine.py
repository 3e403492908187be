"""Checks of this machine and of the configured files. Each check is a function of the settings and runs on a thread.

Checks leave nothing behind. What may hang or is heavy (NVML, image libraries) has a timeout; those
libraries run in their own process.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from sidecar.control.state_dir import StateDir
from sidecar.errors import SidecarError
from sidecar.health.probes import VERDICT_STALE_S
from sidecar.images.worker import gpu_access, gpu_exit, landlock, sandbox
from sidecar.kernels import families
from sidecar.launch import preflight
from sidecar.load import body_scan
from sidecar.load.tenant_limits import TenantLimit
from sidecar.readings import Absent, Failed, GpuSample, Value
from sidecar.relay.pricing import tokenizer as counting
from sidecar.report.usage_database import UsageDatabase
from sidecar.runtime import cpu_quota, open_files
from sidecar.settings import Settings
from sidecar.signals import limits_file
from sidecar.signals.gpu.activity import FIRST_SAMPLE
from sidecar.signals.gpu.poller import GpuSignal
from sidecar.tools.doctor.finding import DoctorFinding

SHM_DIR: Final = Path("/dev/shm")
# A container's default is 64 MiB.
MIN_SHM_BYTES: Final = 1 << 30
# A container's default of 1024 files serves 480.
MIN_CONNECTIONS: Final = 1000
# From a cold disk.
IMPORT_TIMEOUT_S: Final = 60.0
NVML_TIMEOUT_S: Final = 6.0
_GPU_CODE: Final = "import sys; from sidecar.images.worker import gpu_access; gpu_access.print_answer(sys.argv[1])"
_IMPORT_CODE: Final = (
    "import PIL; from sidecar.images.worker import decode, pipeline; from sidecar.kernels import fused; "
    "print(PIL.__version__, 'simplejpeg' if decode.simplejpeg else 'Pillow', fused.level(), fused.refused() or '-')"
)


def coefficients(chosen: Settings) -> DoctorFinding:
    """The coefficients file, if there is one."""
    try:
        co = preflight.choose_coefficients(chosen)
    except (SidecarError, OSError) as e:
        return DoctorFinding("fail", str(e), "correct the file, or leave --coefficients away")
    if not chosen.coefficients:
        remedy = "measure them with `sidecar calibrate`, and give --coefficients FILE"
        return DoctorFinding("warn", f"{co.source}; not measured", remedy)
    said = f"{co.fingerprint} ({co.source})"
    if co.no_capacity:
        return DoctorFinding("warn", f"{said}; its capacity is a lower bound", co.no_capacity)
    return DoctorFinding("ok", said)


def state_dir(chosen: Settings) -> DoctorFinding:
    """Whether the directory is writable and its clock right: probes depend on the files' age."""
    new = not Path(chosen.state_dir).exists()
    try:
        state = StateDir(chosen.state_dir)
        with tempfile.NamedTemporaryFile(dir=state.path) as file:
            skew = Path(file.name).stat().st_mtime - time.time()
    except (SidecarError, OSError) as e:
        return DoctorFinding("fail", str(e), "mount an emptyDir there, or name another directory")
    if new:
        with contextlib.suppress(OSError):
            state.path.rmdir()
    if abs(skew) > VERDICT_STALE_S / 2:
        text = f"file times there are off by {skew:+.0f} s, so probes by file age cannot work"
        return DoctorFinding("fail", text, "use an emptyDir, not a network volume")
    return DoctorFinding("ok", f"{chosen.state_dir} is writable")


def ports(chosen: Settings) -> DoctorFinding:
    """Whether both ports are free."""
    try:
        for name, address in (("listen", chosen.listen), ("admin", chosen.admin)):
            preflight.bind(name, address).close()
        if chosen.orca_grpc:
            preflight.reserve("orca-grpc", chosen.orca_grpc, "grpc", "orca").close()
    except SidecarError as e:
        return DoctorFinding("fail", str(e), "or is a sidecar already running?")
    return DoctorFinding("ok", f"{chosen.listen[1]} and {chosen.admin[1]} are free")


def limits(chosen: Settings) -> DoctorFinding:
    """The file of tenant limits, if there is one."""
    if not chosen.tenant_limits:
        return DoctorFinding("absent", "no --tenant-limits: tenants are not limited")
    try:
        found = limits_file.read_limits(chosen.tenant_limits)
    except SidecarError as e:
        return DoctorFinding("fail", str(e), "correct the file, or leave --tenant-limits away")
    others = "each other one has the default" if found.default != TenantLimit() else "others have no limit"
    return DoctorFinding("ok", f"tenants with limits of their own: {len(found.tenants)}; {others}")


def usage_database(chosen: Settings) -> DoctorFinding:
    """The database of usage records, if there is one: whether it answers, and has or lets make the tables."""
    if not chosen.usage_url:
        return DoctorFinding("absent", "no --usage-url: usage records are kept in the state directory only")
    try:
        preflight.check_usage(chosen)
    except SidecarError as e:
        return DoctorFinding("fail", str(e))
    database = UsageDatabase(chosen.usage_url, "")
    try:
        database.check()
    except Exception as e:  # noqa: BLE001  psycopg.Error, of a module that may not be there to name it
        return DoctorFinding("fail", database.explain(e), "until it answers, rows wait in the state directory")
    return DoctorFinding("ok", "the database takes usage records")


def bodies(chosen: Settings) -> DoctorFinding:
    """Whether request bodies of any length are read."""
    if body_scan.is_compiled():
        return DoctorFinding("ok", "request bodies are read by the compiled scanner")
    what = (
        f"the compiled scanner is missing: request bodies of over {body_scan.MAX_PYTHON_BYTES >> 10} KiB are not read"
    )
    return DoctorFinding("warn", what, "install a C++ compiler, then the package from source")


def tokenizer(chosen: Settings) -> DoctorFinding:
    """Whether prompt tokens are counted or estimated."""
    if not chosen.model or not (Path(chosen.model) / counting.TOKENIZER_FILE).is_file():
        text = f"prompt tokens are estimated: no --model directory with a {counting.TOKENIZER_FILE}"
        return DoctorFinding("absent", text)
    if importlib.util.find_spec("tokenizers") is None:
        remedy = "pip install 'inference-sidecar[tokenizer]'"
        return DoctorFinding("absent", "prompt tokens are estimated: the extra is not installed", remedy)
    counter = counting.load_counter(chosen.model)
    if counter is None:
        what = f"{counting.TOKENIZER_FILE} cannot be read: prompt tokens are estimated"
        return DoctorFinding("warn", what, "correct the file")
    counter.close()
    return DoctorFinding("ok", f"prompt tokens are counted by {counting.TOKENIZER_FILE}")


def model(chosen: Settings) -> DoctorFinding:
    """The model's directory and its image processor."""
    if not chosen.model:
        what = "no --model: images pass through untouched"
        return DoctorFinding("absent", what, "give the model's directory: --model DIR")
    spec = families.explain(chosen.model)
    if isinstance(spec, str):
        text = f"images pass through untouched: {spec}"
        return DoctorFinding("warn" if chosen.images != "off" else "absent", text)
    if not spec.inline:
        made = "its tensors by /v1/preprocess; in requests images pass" if spec.tensors else "images pass"
        text = f"image processor known: {made}, since no resized image gives what the original gives"
        return DoctorFinding("ok", text)
    return DoctorFinding("ok", f"image processor known ({type(spec).__name__.removesuffix('Spec')})")


def images(chosen: Settings) -> DoctorFinding:
    """Whether images can be prepared: the extra is installed and loads."""
    why = preflight.explain_images_off(chosen)
    if why:
        if chosen.images not in ("inline", "shm"):
            return DoctorFinding("absent", f"off: {why}")
        return DoctorFinding("fail", f"off: {why}", f"or --images off, instead of {chosen.images}")
    command = (sys.executable, "-W", "ignore", "-c", _IMPORT_CODE)
    within = IMPORT_TIMEOUT_S
    try:
        child = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=within)
    except subprocess.TimeoutExpired:
        return DoctorFinding(
            "fail", f"the image libraries do not load within {within:.0f} s", "check disk and CPU limits"
        )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        remedy = "install what fits together: pip install -c constraints.txt 'inference-sidecar[images]'"
        return DoctorFinding("fail", f"the image libraries do not load: {last[:200]}", remedy)
    pillow, decoder, kernel, refused = child.stdout.split()
    text = f"{chosen.images}; Pillow {pillow}, JPEG by {decoder}, kernel {kernel}"
    if refused != "-":
        text += f": its {refused} form gives other bits on this CPU and is not used"
        return DoctorFinding("warn", text, "please report the CPU's name; results are right, only slower")
    return DoctorFinding("ok", text)


def images_sandbox(chosen: Settings) -> DoctorFinding:
    """Whether this machine's kernel can confine the image workers."""
    if preflight.explain_images_off(chosen):
        return DoctorFinding("absent", "images are off")
    if missing := sandbox.probe():
        remedy = "take a kernel with Landlock (5.13), and a container runtime that permits nested seccomp filters"
        return DoctorFinding(
            "warn", f"image workers are confined less than they could be: {'; '.join(missing)}", remedy
        )
    return DoctorFinding("ok", f"seccomp filter, Landlock version {landlock.version()}")


def images_gpu(chosen: Settings) -> DoctorFinding:
    """Whether images can be resized on a GPU here, by the answers of CUDA's driver and of NVML."""
    if preflight.explain_images_off(chosen):
        return DoctorFinding("absent", "images are off")
    if chosen.images_device == "cpu":
        return DoctorFinding("absent", "--images-device cpu")
    command = (sys.executable, "-W", "ignore", "-c", _GPU_CODE, chosen.images_device)
    try:
        child = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=IMPORT_TIMEOUT_S)
        code, detail, free = json.loads(child.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return DoctorFinding(
            "warn", "CUDA's driver does not answer", "look at dmesg for XID errors; --images-device cpu does without"
        )
    if code:
        what, remedy = gpu_exit.PERMANENT.get(gpu_exit.of_status(code), ("the GPU failed", "look at dmesg"))
        text = f"{what} ({detail[:200]})" if detail else what
        return DoctorFinding("fail" if chosen.images_device == "cuda" else "absent", text, remedy)
    if not gpu_access.has_room(free, chosen.gpu_memory_budget):
        what = f"{detail}: only {free >> 20} MiB are free, so images are resized on the CPU until more are"
        return DoctorFinding("warn", what, "lower the engine's share of the memory, or --gpu-memory-budget")
    earned = ", if that saves CPU time: measured at the first image" if chosen.images_device == "auto" else ""
    return DoctorFinding("ok", f"images are resized on {detail}{earned}")


def gpu(chosen: Settings) -> DoctorFinding:
    """The GPUs that NVML reports."""
    signal = GpuSignal()
    signal.closely = True
    signal.start()
    until = time.monotonic() + NVML_TIMEOUT_S
    while (reading := signal.read()) == Absent("not read yet") and time.monotonic() < until:
        time.sleep(0.05)
    asyncio.run(signal.stop())
    if isinstance(reading, Absent):
        return DoctorFinding("absent", reading.reason)
    if isinstance(reading, Failed):
        return DoctorFinding("warn", reading.error, "see the message; the verdict works without it")
    return DoctorFinding("ok", ", ".join(f"{g.label}: {g.name} ({hang_signs(g)})" for g in reading.value))


def hang_signs(gpu: GpuSample) -> str:
    """Which of a GPU's numbers that tell a hang from work can be read here."""
    readings = {
        "power": gpu.power,
        "kernels": gpu.utilization,
        "tensor cores and memory": gpu.activity,
        "faults": gpu.faults,
    }
    there = [name for name, found in readings.items() if isinstance(found, Value) or found == FIRST_SAMPLE]
    return f"shows a hang by {', '.join(there)}" if there else "shows nothing of a hang"


def cpu(chosen: Settings) -> DoctorFinding:
    """The usable CPUs, and whether the settings fit them."""
    usable, wanted = cpu_quota.quota(), max(chosen.workers, chosen.image_workers if chosen.images != "off" else 0)
    if wanted > usable:
        what = f"{wanted} processes of one kind for {usable} usable CPUs"
        return DoctorFinding("warn", what, "lower --workers or --image-workers")
    return DoctorFinding("ok", f"{usable} usable of {os.cpu_count()} on the node")


def files(chosen: Settings) -> DoctorFinding:
    """How many clients the limit of open files lets a relay serve at a time."""
    limit = open_files.attainable()
    most = open_files.max_connections(limit)
    text = f"{limit} per process: {most} client connections per relay process"
    if most < MIN_CONNECTIONS:
        return DoctorFinding("warn", text, "raise the hard limit: ulimit -Hn, LimitNOFILE=, or the container runtime's")
    return DoctorFinding("ok", text)


def shm(chosen: Settings) -> DoctorFinding:
    """The size of /dev/shm, which engines with several GPUs need."""
    try:
        total = shutil.disk_usage(SHM_DIR).total
    except OSError:
        return DoctorFinding("absent", f"no {SHM_DIR}")
    text = f"{SHM_DIR} has {total >> 20} MiB"
    if total < MIN_SHM_BYTES:
        text += " here; an engine with tensor parallelism needs more in its container"
        return DoctorFinding("warn", text, "mount an emptyDir of medium Memory there")
    return DoctorFinding("ok", text)
