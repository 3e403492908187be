"""The process tree of one sidecar: all startup checks, then the role of each process.

    supervisor ── control, relay 0 .. N-1, image server, load reports, the engine's runner

- A fault that can be found before the first process starts ends the startup.
- The sockets and the directory of the Unix sockets belong to the supervisor and outlive every other process. A relay
  that lost its control process reconnects to the next one through the same socket; meanwhile, probes wait in the
  kernel's queue.
- Control and relays are forked, so they share what is imported here. The image server is a fresh interpreter, because
  no other process needs what it imports.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import uvloop

from sidecar import settings
from sidecar.control import process as control_process
from sidecar.control.state_dir import StateDir
from sidecar.engines.registry import PLUGIN_KINDS
from sidecar.errors import StartError
from sidecar.images.shm_cache import SHM_DIR, CacheFolder
from sidecar.launch import engine_plugin
from sidecar.launch.engine_runner import STOP_GRACE_S, EngineRunner
from sidecar.launch.preflight import (
    bind,
    bind_unix,
    check_certificate,
    check_render,
    check_usage,
    choose_coefficients,
    choose_image_mode,
    read_image_key,
    reserve,
)
from sidecar.load import cost_model
from sidecar.relay import process as relay_process
from sidecar.relay.pricing import tenant_accounts
from sidecar.report import orca_server
from sidecar.runtime import locked_folder, open_files
from sidecar.runtime.supervisor import Role, Supervisor
from sidecar.settings import Settings
from sidecar.signals import limits_file

_log = logging.getLogger("sidecar")

SOCKETS_PREFIX: Final = "sidecar-sockets-"
# What the interpreter, the linker, torch, CUDA and Triton read. Other variables, which may hold secrets, are left out.
IMAGE_SERVER_VARIABLES: Final = (
    "PATH", "HOME", "TMPDIR", "TZ", "LANG", "LC_", "LD_", "PYTHON", "VIRTUAL_ENV", "MALLOC_",
    "GLIBC_TUNABLES", "XDG_CACHE_HOME", "CUDA", "NVIDIA_", "TRITON_", "TORCH", "PYTORCH_", "ATEN_",
    "OMP_", "GOMP_", "KMP_", "MKL_",
)  # fmt: skip
IMAGE_SERVER_NICE: Final = 5  # the longest and least urgent work: where cores are scarce, probes and streams go first
STOP_MARGIN_S: Final = 10.0  # beyond the drain, in which every process must have ended

# Runs a process; a SidecarError becomes one line and an exit code.
ExitCodeRunner = Callable[[Callable[[], int]], int]


def main(chosen: Settings, run_to_exit_code: ExitCodeRunner, command: Sequence[str] = ()) -> int:
    """Serve until SIGTERM or SIGINT, drain, return the exit code. Raises UsageError and StartError at startup.

    `command` starts the engine; without one, it runs elsewhere.
    """
    open_files.raise_limit()  # of all processes: many shells and runtimes allow 1024
    check_certificate(chosen)
    check_usage(chosen)
    check_render(chosen)
    coefficients = choose_coefficients(chosen)
    image_key = read_image_key(chosen)
    chosen = replace(chosen, images=choose_image_mode(chosen))

    def guarded(run: Callable[[int], int]) -> Callable[[int], int]:
        return lambda restarts: run_to_exit_code(partial(run, restarts))

    with ExitStack() as stack:
        listener = stack.enter_context(bind("listen", chosen.listen))
        admin = stack.enter_context(bind("admin", chosen.admin))
        # Port 0 has become a real one.
        chosen = replace(chosen, listen=listener.getsockname()[:2], admin=admin.getsockname()[:2])
        folder = stack.enter_context(socket_folder())
        control = stack.enter_context(bind_unix(folder / "control"))
        run = guarded(partial(_run_control, chosen, coefficients, admin, control))
        roles = [Role("control", "control", run, (admin, control))]
        keys = image_key, secrets.token_bytes(32)
        context = relay_process.RelayContext(chosen, coefficients, str(folder / "control"), *keys)
        if chosen.tenant_limits:
            limits = limits_file.read_limits(chosen.tenant_limits)
            (folder / "accounts").write_bytes(b"")
            os.truncate(folder / "accounts", tenant_accounts.table_bytes(chosen.workers))
            context = replace(context, accounts=str(folder / "accounts"), limits=limits)
        plugin = ""
        if chosen.engine_kind in ("auto", *PLUGIN_KINDS):
            plugin = engine_plugin.write(str(StateDir(chosen.state_dir).path))
        if chosen.images != "off":
            cache = CacheFolder(SHM_DIR, chosen.image_cache_bytes, needed=chosen.images in ("auto", "shm"))
            stack.callback(cache.close)
            if cache.why:
                _log.warning("%s: prepared images are neither cached nor handed over there: %s", SHM_DIR, cache.why)
            context = replace(
                context, image_socket=str(folder / "images"), image_cache=cache.path, image_cache_bytes=cache.bytes
            )
            jobs = stack.enter_context(bind_unix(folder / "images"))
            roles.append(Role("images", "image server", partial(_exec_image_server, chosen, jobs), (jobs,)))
        if chosen.orca_grpc:
            reserved = stack.enter_context(reserve("orca-grpc", chosen.orca_grpc, "grpc", "orca"))
            address = reserved.getsockname()[:2]
            run = guarded(lambda restarts: orca_server.main(address, context.control))
            roles.append(Role("reports", "load reports", run, (reserved,)))
        for index in range(chosen.workers):
            run = guarded(partial(_run_relay, replace(context, index=index), listener))
            roles.append(Role("relay", f"relay {index}", run, (listener,)))
        if command:
            runner = EngineRunner(command, chosen.state_dir, plugin)
            roles.append(Role("engine", "engine runner", guarded(runner.run), ()))
        return Supervisor(roles, chosen.drain_seconds + STOP_MARGIN_S, STOP_GRACE_S if command else 0.0).run()


@contextmanager
def socket_folder() -> Iterator[Path]:
    """The folder of the Unix sockets, for this user only. Raises StartError."""
    try:
        parent = tempfile.gettempdir()
        locked_folder.sweep(parent, SOCKETS_PREFIX)
        path, lock = locked_folder.make(parent, SOCKETS_PREFIX)
    except OSError as e:
        text = "no directory for the sidecar's sockets can be made"
        raise StartError(f"{text} ({e.strerror}); mount an emptyDir at /tmp, or set TMPDIR") from None
    try:
        yield Path(path)
    finally:
        locked_folder.remove(path, lock)


# --- the body of each process; `restarts` counts its earlier starts ---


def _run_control(
    chosen: Settings, coefficients: cost_model.Coefficients, admin: socket.socket, control: socket.socket, restarts: int
) -> int:
    report_serving = partial(os.kill, os.getppid(), signal.SIGUSR1)
    uvloop.run(control_process.run(chosen, coefficients, admin, control, report_serving))
    return 0


def _run_relay(context: relay_process.RelayContext, listener: socket.socket, restarts: int) -> int:
    return relay_process.main(replace(context, restarts=restarts), listener)


def _exec_image_server(chosen: Settings, jobs: socket.socket, restarts: int) -> int:
    """Become the image server. It reads the settings from stdin, and no secret is among what it gets."""
    reading, writing = os.pipe()
    os.write(writing, settings.to_json(replace(chosen, engine_key="")).encode() + b"\n")  # less than a pipe holds
    os.close(writing)
    os.dup2(reading, 0)
    jobs.set_inheritable(True)
    os.nice(IMAGE_SERVER_NICE)
    command = [sys.executable, "-m", "sidecar", "image-server", "--listen-fd", str(jobs.fileno())]
    os.execve(sys.executable, command, {k: v for k, v in os.environ.items() if k.startswith(IMAGE_SERVER_VARIABLES)})
