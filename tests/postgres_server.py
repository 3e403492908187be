"""A real PostgreSQL server on a Unix socket, with a folder of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

DEBIAN = Path("/usr/lib/postgresql")
READY = "ready to accept connections"
START_TIMEOUT_S = 60
USER = "postgres"


def find_server() -> Path | None:
    """The folder of `postgres` and `initdb`: Debian has it outside of PATH."""
    if found := shutil.which("postgres"):
        return Path(found).resolve().parent
    return next(iter(sorted(DEBIAN.glob("*/bin"), reverse=True)), None)


class PostgresServer:
    """Its data outlive `stop`, until `remove`. It refuses root, so root runs it as nobody."""

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        self._process: subprocess.Popen[str] | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # short: a socket's path has 107 bytes
        self._user = "nobody" if os.getuid() == 0 else None
        if self._user:
            shutil.chown(self.folder, self._user)
        command = [binaries / "initdb", "-D", self.folder / "data", "-U", USER, "-A", "trust", "-N", "-E", "UTF8"]
        done = subprocess.run(
            command, user=self._user, cwd="/", capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr

    @property
    def url(self) -> str:
        return f"postgresql://{USER}:secret-word@/postgres?host={self.folder}"

    def start(self) -> None:
        """Returns once it takes connections."""
        options = [
            "-c",
            "listen_addresses=",
            "-c",
            "fsync=off",
            "-c",
            "max_connections=20",
            "-c",
            "log_min_messages=log",
        ]
        self._process = subprocess.Popen(
            [self._binaries / "postgres", "-D", self.folder / "data", "-k", self.folder, *options],
            user=self._user,
            cwd="/",
            stderr=subprocess.PIPE,
            text=True,
        )
        ready = threading.Event()
        threading.Thread(target=self._read, args=(self._process, ready), daemon=True).start()
        assert ready.wait(START_TIMEOUT_S), "the server did not start"

    def _read(self, process: subprocess.Popen[str], ready: threading.Event) -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            for line in lines:
                if READY in line:
                    ready.set()

    def stop(self) -> None:
        """End it, with all connections; as a server that is gone."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(60)
            self._process = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)
