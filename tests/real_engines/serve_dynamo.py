"""Dynamo's front end and its mocker, which generates without a model: PYTHON serve_dynamo.py DIR PORT FOLDER.

They find each other by files in FOLDER. Both end with this process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

PLANES = ("--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq")


def main(model: str, port: str, folder: str) -> None:
    """Start both, and wait for the first of them to end."""
    environ = os.environ | {"DYN_FILE_KV": f"{folder}/discovery"}
    front = (sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", port, *PLANES)
    worker = (sys.executable, "-m", "dynamo.mocker", "--model-path", model, "--model-name", "tiny", *PLANES)
    parts = [subprocess.Popen(command, env=environ) for command in (front, worker)]
    signal.signal(signal.SIGTERM, lambda *_: [part.terminate() for part in parts])
    for part in parts:
        part.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
