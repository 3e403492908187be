"""The tree of processes of one sidecar: what it needs before any of them starts, and what each of them is.

    supervisor ── control, relay 0 .. N-1, image server, load reports

Rules: whatever can be found wrong before the first process starts ends the start here. The sockets, and the directory that
the Unix sockets lie in, belong to the supervisor and outlive every other process: a relay that lost its control process finds
the next one behind the same socket, a kubelet that asks meanwhile waits in the kernel's queue. Control and relays are forked
from what is imported here, once; the image server is a fresh interpreter, because what it imports is nobody else's.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import uvloop

from sidecar import settings
from sidecar.control import process as app
from sidecar.images.shm_cache import SHM_DIR, CacheFolder
from sidecar.launch.preflight import bind, coefficients, image_mode, reserve, unix
from sidecar.load import cost_model
from sidecar.relay import process
from sidecar.relay.pricing import quota, tenant_accounts
from sidecar.report import orca_server
from sidecar.runtime.supervisor import Role, Supervisor
from sidecar.settings import Settings

_log = logging.getLogger("sidecar")

NICE = 5  # image work is the longest and the least urgent: where cores are short, probes and streams go first
MARGIN = 10.0  # seconds beyond the drain in which everything must have ended

Border = Callable[
    [Callable[[], int]], int
]  # runs the life of a process; errors of ours become one line and an exit code


def main(chosen: Settings, border: Border) -> int:
    """Serve until SIGTERM or SIGINT; then drain and return the exit code. Raises UsageError and StartError before that."""
    prices = coefficients(chosen)
    chosen = replace(chosen, images=image_mode(chosen))
    with ExitStack() as stack:
        listener = stack.enter_context(bind("listen", chosen.listen))
        admin = stack.enter_context(bind("admin", chosen.admin))
        # what port 0 became
        chosen = replace(chosen, listen=listener.getsockname()[:2], admin=admin.getsockname()[:2])
        folder = Path(tempfile.mkdtemp(prefix="sidecar-"))  # mode 0700
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        joining = stack.enter_context(unix(folder / "control"))
        roles = [
            Role(
                "control",
                "control",
                _guarded(border, partial(_control, chosen, prices, admin, joining)),
                (admin, joining),
            )
        ]
        place = process.RelayContext(chosen, prices, str(folder / "control"), secrets.token_bytes(32))
        if chosen.tenant_limits:
            limits = quota.read(chosen.tenant_limits)
            (folder / "accounts").write_bytes(b"")
            os.truncate(folder / "accounts", tenant_accounts.size(chosen.workers))
            place = replace(place, accounts=str(folder / "accounts"), limits=limits)
        if chosen.images != "off":
            kept = CacheFolder(SHM_DIR, chosen.image_cache_bytes, needed=chosen.images == "shm")
            stack.callback(kept.close)
            if kept.why:
                _log.warning("%s: prepared images are not kept, nor handed over there: %s", SHM_DIR, kept.why)
            place = replace(
                place, image_socket=str(folder / "images"), image_cache=kept.path, image_cache_bytes=kept.bytes
            )
            jobs = stack.enter_context(unix(folder / "images"))
            roles.append(Role("images", "image server", partial(_image_server, chosen, jobs), (jobs,)))
        if chosen.orca_grpc:
            reserved = stack.enter_context(reserve("orca-grpc", chosen.orca_grpc, "grpc", "orca"))
            run = _guarded(border, partial(_reports, reserved.getsockname()[:2], place.control))
            roles.append(Role("reports", "load reports", run, (reserved,)))
        for index in range(chosen.workers):
            run = _guarded(border, partial(_relay, replace(place, index=index), listener))
            roles.append(Role("relay", f"relay {index}", run, (listener,)))
        return Supervisor(roles, chosen.drain_seconds + MARGIN).run()


# --- what each process does; each gets how often it was started again ---


def _guarded(border: Border, run: Callable[[int], int]) -> Callable[[int], int]:
    return lambda restarts: border(partial(run, restarts))


def _control(
    chosen: Settings, prices: cost_model.Coefficients, admin: socket.socket, joining: socket.socket, restarts: int
) -> int:
    serving = partial(os.kill, os.getppid(), signal.SIGUSR1)
    uvloop.run(app.run(chosen, prices, app.ListeningSockets(admin, joining), serving))
    return 0


def _relay(place: process.RelayContext, listener: socket.socket, restarts: int) -> int:
    return process.main(replace(place, restarts=restarts), listener)


def _reports(address: tuple[str, int], control: str, restarts: int) -> int:
    return orca_server.main(address, control)


def _image_server(chosen: Settings, jobs: socket.socket, restarts: int) -> int:
    """Becomes the image server, with the settings on its standard input: they hold a key, so no argument may."""
    reading, writing = os.pipe()
    os.write(writing, settings.to_json(chosen).encode() + b"\n")  # far less than a pipe takes at once
    os.close(writing)
    os.dup2(reading, 0)
    jobs.set_inheritable(True)
    os.nice(NICE)
    os.execv(sys.executable, [sys.executable, "-m", "sidecar", "image-server", "--listen-fd", str(jobs.fileno())])
