"""The fork server: imports the image libraries once, keeps the workers running, ends with its parent.

Rules: this process never touches an image, starts no thread and enters no parallel region, so that forking it is safe.
It waits in one place only, for a signal. A worker that dies is replaced; if it dies young, after a pause, so that a
broken installation cannot spin. The listening socket belongs to the parent and outlives this process: connections in
its backlog reach the next server.
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
from pathlib import Path
from typing import Final

from sidecar.errors import StartError
from sidecar.images.protocol import Data, Frame, ImageJob, ImageLimits, VideoJob
from sidecar.images.worker import gpu_exit, sandbox, worker
from sidecar.images.worker.gpu_channel import GPU_SOCKET_SUFFIX
from sidecar.images.worker.gpu_exit import GpuExit
from sidecar.runtime import cpu_quota, logs, own_gpu_use
from sidecar.runtime.limited_log import LimitedLog
from sidecar.runtime.own_gpu_use import OwnGpuUse
from sidecar.settings import Settings, from_json

_log = logging.getLogger(__name__)

WATCHED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
PARENT_POLL_INTERVAL_S: Final = 1.0
MIN_LIFE_S: Final = 1.0
RESTART_PAUSE_S: Final = 0.25
SIGNAL_TEXTS: Final[dict[int, str]] = {
    signal.SIGALRM: "past its deadline",
    signal.SIGPROF: "past its CPU time",
    signal.SIGXCPU: "past its CPU time",
    signal.SIGKILL: "killed",
}
# A GPU process that lived this long had a working GPU: its end is not one more failure in a row.
SOUND_LIFE_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """How many workers, and what they and the GPU process may use."""

    workers: int
    device: str  # "auto", "cpu" or "cuda"
    gpu_memory: int  # bytes
    limits: ImageLimits


def worker_plan(settings: Settings, available: int) -> WorkerPlan:
    """The plan for `available` CPUs. A GPU process is not counted: it waits most of the time."""
    workers = settings.image_workers or available
    limits = ImageLimits(settings.image_max_bytes, settings.image_max_pixels)
    return WorkerPlan(workers, settings.images_device, settings.gpu_memory_budget, limits)


def main(listen_fd: int, settings_json: str) -> int:
    """Serve until SIGTERM or until the parent exits; returns 0. Raises StartError if the device is missing."""
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    if not settings_json.strip():
        raise StartError("image-server: expected the settings as one line of JSON on standard input")
    chosen = from_json(settings_json)
    logs.setup(chosen.log_level)
    plan = worker_plan(chosen, cpu_quota.quota())
    start = time.monotonic()
    preimport()
    _log.info("image workers: %d, ready after %.1f s of loading", plan.workers, time.monotonic() - start)
    if missing := sandbox.probe():
        _log.warning("image workers are confined less than they could be: %s", "; ".join(missing))
    listening = socket.socket(fileno=listen_fd)
    listening.setblocking(True)
    workers: dict[int, float] = {}
    gpu, limited = GpuProcess(plan, f"{listening.getsockname()}{GPU_SOCKET_SUFFIX}"), LimitedLog(_log)
    try:
        while os.getppid() == parent:
            try:
                while len(workers) < plan.workers:
                    workers[_fork(partial(_serve_images, listening, plan, gpu.path))] = time.monotonic()
                if gpu.is_due(time.monotonic()):
                    gpu.started(_fork(partial(_serve_gpu, gpu.listening, plan)), time.monotonic())
            except OSError as e:  # too many processes, or too little memory: that can pass
                limited.error("fork", "cannot start an image worker (%s); trying again", e.strerror)
            received = signal.sigtimedwait(WATCHED, PARENT_POLL_INTERVAL_S)
            # SIGINT goes to the whole process group; the supervisor handles it
            if received is not None and received.si_signo == signal.SIGTERM:
                break
            gpu.reap(time.monotonic())
            _reap(workers)
    finally:
        _kill([*workers, *([gpu.pid] if gpu.pid else [])])
    return 0


class GpuProcess:
    """Starts and restarts the process that owns the GPU, if one is configured. Its socket outlives it.

    `path` is where workers connect; "" if there is no GPU. Next to it lies what control is to know of it.
    """

    def __init__(self, plan: WorkerPlan, path: str) -> None:
        self._device = plan.device
        self._start_at = self._started_at = 0.0
        self._failures = 0  # in a row
        self.pid, self.path = 0, path
        self._use_path = own_gpu_use.next_to(path)
        self._failed_at: float | None = None
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if plan.device == "cpu":
            self._give_up()
        else:
            Path(path).unlink(missing_ok=True)
            self.listening.bind(path)
            self.listening.listen()

    def is_due(self, now: float) -> bool:
        """True if the process must be started now."""
        return not self.pid and now >= self._start_at

    def started(self, pid: int, now: float) -> None:
        """Note the process that was started."""
        self.pid, self._started_at = pid, now
        own_gpu_use.write(self._use_path, OwnGpuUse(True, self._failed_at))

    def reap(self, now: float) -> None:
        """Collect the exited process, which has said why. Raises StartError if a GPU is required and there is none."""
        ended, status = os.waitpid(self.pid, os.WNOHANG) if self.pid else (0, 0)
        if not ended:
            return
        self.pid = 0
        code = os.waitstatus_to_exitcode(status)
        exit = gpu_exit.of_status(code)
        self._failed_at = now if exit is GpuExit.LOST else self._failed_at
        own_gpu_use.write(self._use_path, OwnGpuUse(False, self._failed_at))
        self._failures = 1 if now - self._started_at >= SOUND_LIFE_S else self._failures + 1
        pause = gpu_exit.retry_after(exit, self._failures)
        self._start_at = now + pause
        if exit is GpuExit.RELEASED:
            self._failures = 0
        elif exit in gpu_exit.PERMANENT:
            if self._device == "cuda":
                raise StartError(f"--images-device cuda: {gpu_exit.describe(exit)}; or use --images-device cpu")
            self._give_up()
        else:
            _log.warning("GPU process ended (%s); trying again in %.0f s", _describe_exit(code), pause)

    def _give_up(self) -> None:
        """Close the socket: workers that are connected see it, and later ones do without."""
        self._start_at, self.path = math.inf, ""
        self.listening.close()


def preimport() -> None:
    """Import everything a worker needs, so that a fork costs milliseconds."""
    import warnings

    from PIL import Image

    warnings.simplefilter("ignore")  # libraries warn about damaged files, which the reply reports
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it would log metadata of images
    Image.init()
    Image.MAX_IMAGE_PIXELS = None  # the sidecar's own limit is checked first
    import sidecar.images.worker.pipeline
    import sidecar.images.worker.video_pipeline  # noqa: F401
    from sidecar.images.worker import video_warm_up, warm_up

    warm_up.preimport()
    video_warm_up.preimport()


def _fork(serve: Callable[[], int]) -> int:
    server = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        worker.bind_to(server)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        status = serve()
    except BaseException as e:  # noqa: BLE001  the process boundary; a message could quote an image, a type cannot
        _log.error("image worker failed: %s", type(e).__name__)
    finally:
        sys.stderr.flush()
        os._exit(status)


def _serve_images(listening: socket.socket, plan: WorkerPlan, gpu_path: str) -> int:
    """Run a worker, in its own process."""
    from sidecar.images.worker import pipeline, video_pipeline, video_warm_up, warm_up
    from sidecar.images.worker.gpu_channel import GpuChannel

    warm_up.run(pipeline.run_job, plan.limits)
    video_warm_up.run(video_pipeline.run_job, plan.limits, warm_up.WARM_UP_TIMEOUT_S)
    gpu = GpuChannel(gpu_path) if gpu_path else None
    if gpu is not None:
        gpu.open()
    worker.confine(plan.limits, (listening.fileno(), *(gpu.descriptors if gpu else ())))

    def prepare(job: ImageJob | VideoJob, payload: bytearray, into: memoryview | None) -> tuple[Frame, Data]:
        if isinstance(job, VideoJob):
            return video_pipeline.run_job(job, payload, worker.limit_cpu)
        return pipeline.run_job(job, payload, into, gpu=gpu, on_size=worker.limit_cpu)

    return worker.serve(listening, prepare, plan.limits, lambda: gpu is not None and gpu.lost)


def _serve_gpu(listening: socket.socket, plan: WorkerPlan) -> int:
    """Run the process that owns the GPU."""
    from sidecar.images.worker import gpu_server

    return gpu_server.serve(listening, plan.limits, plan.gpu_memory, plan.device)


def _reap(workers: dict[int, float]) -> None:
    """Collect the workers that have exited."""
    young = False
    for pid in list(workers):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            young = time.monotonic() - workers.pop(pid) < MIN_LIFE_S or young
            if code := os.waitstatus_to_exitcode(status):
                _log.warning("image worker ended (%s); starting another", _describe_exit(code))
    if young:
        time.sleep(RESTART_PAUSE_S)


def _describe_exit(code: int) -> str:
    return SIGNAL_TEXTS.get(-code, f"exit status {code}")


def _kill(workers: Sequence[int]) -> None:
    for pid in workers:
        os.kill(pid, signal.SIGKILL)  # a worker has no state to save, and may be inside C code
    for pid in workers:
        os.waitpid(pid, 0)
