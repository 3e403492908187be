"""Dynamo's front end and its mocker, which generates without a model: PYTHON serve_dynamo.py DIR PORT FOLDER.

They find each other by files in a new folder below FOLDER. Both end with this process. SIGUSR1 starts another mocker.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile

PLANES = ("--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq")


def main(model: str, port: str, folder: str) -> None:
    """Start both, and wait until the front end ends."""
    environ = os.environ | {"DYN_FILE_KV": tempfile.mkdtemp(prefix="discovery-", dir=folder)}
    front = (sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", port, *PLANES)
    worker = (sys.executable, "-m", "dynamo.mocker", "--model-path", model, "--model-name", "tiny", *PLANES)
    parts = [subprocess.Popen(command, env=environ) for command in (front, worker)]
    signal.signal(signal.SIGTERM, lambda *_: [part.terminate() for part in parts])
    signal.signal(signal.SIGUSR1, lambda *_: parts.append(subprocess.Popen(worker, env=environ)))
    while os.wait()[0] != parts[0].pid:  # a mocker that ended is buried
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
