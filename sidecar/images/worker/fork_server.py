"""The fork server: imports the image libraries once, keeps W workers alive, ends with its parent.

Rules: this process never touches an image, starts no thread and enters no parallel region, so that forking it is sound; it
waits in one place only, for a signal. A worker that dies is replaced; one that dies young is replaced with a pause, so that
a broken installation cannot spin. The listening socket belongs to whoever started us and outlives us: connections that wait
in its backlog meet the next server.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from sidecar.errors import StartError
from sidecar.images.protocol import ImageLimits
from sidecar.images.worker import worker
from sidecar.images.worker.gpu_channel import GPU_SOCKET_SUFFIX
from sidecar.runtime import cpu_quota, logs
from sidecar.settings import Settings, from_json

_log = logging.getLogger(__name__)

WATCHED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
POLL: Final = 1.0  # seconds between looks at whether the parent still lives
YOUNG: Final = 1.0  # seconds
PAUSE: Final = 0.25  # seconds
ENDS: Final[dict[int, str]] = {signal.SIGALRM: "past its deadline", signal.SIGKILL: "killed"}
NO_CUDA: Final = 78  # exit status of a worker that found no CUDA device (EX_CONFIG)
NO_CUDA_TEXT: Final = "--images-device cuda: no CUDA device is visible to the image worker; use --images-device cpu"
GPU_REST: Final = 60.0  # seconds after which a lost GPU is tried again


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """How many workers, and how many threads each."""

    workers: int
    threads: int
    device: str  # "auto", "cpu" or "cuda"
    gpu_memory: int  # bytes
    limits: ImageLimits


def worker_plan(settings: Settings, available: int) -> WorkerPlan:
    """Workers and threads for `available` CPUs. The process that owns a GPU comes on top: it waits most of the time."""
    workers = settings.image_workers or available
    limits = ImageLimits(settings.image_max_bytes, settings.image_max_pixels)
    return WorkerPlan(workers, max(1, available // workers), settings.images_device, settings.gpu_memory_budget, limits)


def main(listen_fd: int, settings_json: str) -> int:
    """Serve until SIGTERM or until the parent is gone; returns 0. Raises StartError where the device is not there."""
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    if not settings_json.strip():
        raise StartError("image-server: expected the settings as one line of JSON on standard input")
    chosen = from_json(settings_json)
    logs.setup(chosen.log_level)
    wanted = worker_plan(chosen, cpu_quota.quota())
    os.environ.update({name: str(wanted.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
    began = time.monotonic()
    preimport()
    _log.info("image workers: %d, ready after %.1f s of loading", wanted.workers, time.monotonic() - began)
    listening = socket.socket(fileno=listen_fd)
    listening.setblocking(True)
    door = f"{listening.getsockname()}{GPU_SOCKET_SUFFIX}" if wanted.device != "cpu" else ""
    workers: dict[int, float] = {}
    gpu = GpuProcess(wanted)
    try:
        while os.getppid() == parent:
            while len(workers) < wanted.workers:
                workers[_fork(partial(_work, listening, wanted, door))] = time.monotonic()
            if gpu.due(time.monotonic()):
                gpu.pid = _fork(partial(_own, door, wanted))
            got = signal.sigtimedwait(WATCHED, POLL)
            if (
                got is not None and got.si_signo == signal.SIGTERM
            ):  # SIGINT, which the whole group gets, is the supervisor's
                break
            gpu.reap(time.monotonic())
            _reap(workers)
    finally:
        _end([*workers, *([gpu.pid] if gpu.pid else [])])
    return 0


class GpuProcess:
    """The life of the process that owns the GPU, where one is wanted."""

    def __init__(self, wanted: WorkerPlan) -> None:
        self._device = wanted.device
        self._at = 0.0 if wanted.device != "cpu" else math.inf
        self.pid = 0

    def due(self, now: float) -> bool:
        """Whether to start it now."""
        return not self.pid and now >= self._at

    def reap(self, now: float) -> None:
        """Notice its end. Raises StartError where a GPU was asked for and none is there."""
        ended, status = os.waitpid(self.pid, os.WNOHANG) if self.pid else (0, 0)
        if not ended:
            return
        self.pid, self._at = 0, now + GPU_REST
        code = os.waitstatus_to_exitcode(status)
        if code == NO_CUDA and self._device == "cuda":
            raise StartError(NO_CUDA_TEXT)
        if code == NO_CUDA:
            self._at = math.inf
        else:
            _log.warning(
                "the GPU's process ended (%s); it is tried again in %g s",
                ENDS.get(-code, f"exit status {code}"),
                GPU_REST,
            )


def preimport() -> None:
    """Import everything a worker needs, so that a fork costs milliseconds."""
    import warnings

    from PIL import Image

    warnings.simplefilter("ignore")  # libraries warn about damaged files; the answer says so already
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it would tell what an image's metadata say
    Image.init()
    Image.MAX_IMAGE_PIXELS = None  # our own limit is checked first
    import sidecar.images.worker.pipeline  # noqa: F401


def _fork(life: Callable[[], int]) -> int:
    server = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        worker.bind_to(server)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        status = life()
    except BaseException as e:  # noqa: BLE001  the border of the process; a message could quote an image, a type cannot
        _log.error("an image worker failed: %s", type(e).__name__)
    finally:
        sys.stderr.flush()
        os._exit(status)


def _work(listening: socket.socket, wanted: WorkerPlan, door: str) -> int:
    """The life of a worker, in the worker's process."""
    import torch

    from sidecar.images.worker import pipeline
    from sidecar.images.worker.gpu_channel import GpuChannel

    torch.set_num_threads(wanted.threads)
    torch.set_grad_enabled(False)
    do = partial(pipeline.prepare_image, door=GpuChannel(door)) if door else pipeline.prepare_image
    worker.confine(wanted.limits)
    return worker.serve(listening, do, wanted.limits)


def _own(door: str, wanted: WorkerPlan) -> int:
    """The life of the process that owns the GPU, in that process."""
    import torch

    from sidecar.images.worker import gpu_server as gpu

    torch.set_grad_enabled(False)
    return gpu.serve(door, wanted.limits, wanted.gpu_memory) if gpu.visible() else NO_CUDA


def _reap(workers: dict[int, float]) -> None:
    """Forget the workers that have ended."""
    young = False
    for pid in list(workers):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            continue
        young = young or time.monotonic() - workers[pid] < YOUNG
        del workers[pid]
        code = os.waitstatus_to_exitcode(status)
        if code:
            _log.warning("an image worker ended (%s); the next one is started", ENDS.get(-code, f"exit status {code}"))
    if young:
        time.sleep(PAUSE)


def _end(workers: Sequence[int]) -> None:
    for pid in workers:
        os.kill(pid, signal.SIGKILL)  # a worker holds nothing that needs care, and may be deep in C code
    for pid in workers:
        os.waitpid(pid, 0)
