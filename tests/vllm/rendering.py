"""The real vLLM's renderer as a process: `vllm launch render`, which answers /render without an engine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from ..ports import free_port
from . import environment, processes
from .processes import Engine

MAX_MODEL_LEN = 4096


@contextlib.contextmanager
def renderer(models: Path, name: str, log: Path, max_model_len: int = MAX_MODEL_LEN) -> Iterator[Engine]:
    """vLLM's renderer of a model, by its name within the folder `models`: that name is part of its image hashes."""
    port = free_port()
    command = [
        str(environment.python()),
        "-m",
        "vllm.entrypoints.launchers.render.entry",
        *("--model", name, "--served-model-name", processes.MODEL, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", str(max_model_len)),
    ]
    url = f"http://127.0.0.1:{port}"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"} | processes.ENGINE_ENV
    with processes.running(command, log, env, cwd=models) as process:
        processes.wait_for(lambda: processes.http_status(f"{url}/health") == 200, process, log, processes.START_SECONDS)
        yield Engine(url, models / name, psutil.Process(process.pid))
