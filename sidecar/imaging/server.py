"""The fork server: imports the image libraries once, keeps W workers alive, ends with its parent.

Rules: this process never touches an image, starts no thread and enters no parallel region, so that forking it is sound; it
waits in one place only, for a signal. A worker that dies is replaced; one that dies young is replaced with a pause, so that
a broken installation cannot spin. The listening socket belongs to whoever started us and outlives us: connections that wait
in its backlog meet the next server.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Final

from sidecar import cpus
from sidecar.errors import StartError
from sidecar.jobs import Limits
from sidecar.settings import Settings, from_json

_log = logging.getLogger("sidecar.imaging")

WATCHED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
POLL: Final = 1.0  # seconds between looks at whether the parent still lives
YOUNG: Final = 1.0  # seconds
PAUSE: Final = 0.25  # seconds
ENDS: Final[dict[int, str]] = {signal.SIGALRM: "past its deadline", signal.SIGKILL: "killed"}
NO_CUDA: Final = 78  # exit status of a worker that found no CUDA device (EX_CONFIG)
NO_CUDA_TEXT: Final = "--images-device cuda: no CUDA device is visible to the image worker; use --images-device cpu"


@dataclass(frozen=True, slots=True)
class Plan:
    """How many workers, and how many threads each."""

    workers: int
    threads: int
    cuda: bool
    gpu_memory: int  # bytes
    limits: Limits


def plan(settings: Settings, available: int) -> Plan:
    """Workers and threads for `available` CPUs. `auto` is the CPU; one worker owns a GPU."""
    cuda = settings.images_device == "cuda"
    workers = 1 if cuda else settings.image_workers or available
    limits = Limits(settings.image_max_bytes, settings.image_max_pixels)
    return Plan(workers, max(1, available // workers), cuda, settings.gpu_memory_budget, limits)


def main(listen_fd: int, settings_json: str) -> int:
    """Serve until SIGTERM or until the parent is gone; returns 0. Raises StartError where the device is not there."""
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    if not settings_json.strip():
        raise StartError("image-server: expected the settings as one line of JSON on standard input")
    wanted = plan(from_json(settings_json), cpus.quota())
    os.environ.update({name: str(wanted.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
    warm()
    listening = socket.socket(fileno=listen_fd)
    listening.setblocking(True)
    workers: dict[int, float] = {}
    try:
        while os.getppid() == parent:
            while len(workers) < wanted.workers:
                workers[_fork(listening, wanted)] = time.monotonic()
            got = signal.sigtimedwait(WATCHED, POLL)
            if (
                got is not None and got.si_signo == signal.SIGTERM
            ):  # SIGINT, which the whole group gets, is the supervisor's
                break
            _reap(workers)
    finally:
        _end(workers)
    return 0


def warm() -> None:
    """Import everything a worker needs, so that a fork costs milliseconds."""
    import warnings

    from PIL import Image

    warnings.simplefilter("ignore")  # libraries warn about damaged files; the answer says so already
    Image.init()
    Image.MAX_IMAGE_PIXELS = None  # our own limit is checked first
    import sidecar.imaging.work  # noqa: F401


def _fork(listening: socket.socket, wanted: Plan) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        status = _work(listening, wanted)
    except BaseException as e:  # noqa: BLE001  the border of the process; a message could quote an image, a type cannot
        _log.error("an image worker failed: %s", type(e).__name__)
    finally:
        sys.stderr.flush()
        os._exit(status)


def _work(listening: socket.socket, wanted: Plan) -> int:
    """The life of a worker, in the worker's process."""
    import torch

    from sidecar.imaging import work, worker

    torch.set_num_threads(wanted.threads)
    torch.set_grad_enabled(False)
    worker.confine(wanted.limits, memory=not wanted.cuda)
    if not wanted.cuda:
        return worker.serve(listening, work.run, wanted.limits)
    from sidecar.imaging import gpu

    return gpu.serve(listening, wanted.limits, wanted.gpu_memory) if gpu.visible() else NO_CUDA


def _reap(workers: dict[int, float]) -> None:
    """Forget the workers that have ended. Raises StartError for one that found no device."""
    young = False
    for pid in list(workers):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            continue
        young = young or time.monotonic() - workers[pid] < YOUNG
        del workers[pid]
        code = os.waitstatus_to_exitcode(status)
        if code == NO_CUDA:
            raise StartError(NO_CUDA_TEXT)
        if code:
            _log.warning("an image worker ended (%s); the next one is started", ENDS.get(-code, f"exit status {code}"))
    if young:
        time.sleep(PAUSE)


def _end(workers: dict[int, float]) -> None:
    for pid in workers:
        os.kill(pid, signal.SIGKILL)  # a worker holds nothing that needs care, and may be deep in C code
    for pid in workers:
        os.waitpid(pid, 0)
