"""Serve a model by the llama.cpp that the package xllamacpp brings: PYTHON serve_xllamacpp.py DIR PORT."""

from __future__ import annotations

import signal
import sys

import xllamacpp


def main(folder: str, port: int) -> None:
    chosen = xllamacpp.CommonParams()
    chosen.model.path = f"{folder}/tiny.gguf"
    chosen.mmproj.path = f"{folder}/tiny.mmproj.gguf"
    chosen.model_alias = {"tiny"}
    chosen.hostnames, chosen.port = ["127.0.0.1"], port
    chosen.n_parallel, chosen.n_ctx, chosen.cpuparams.n_threads = 4, 16384, 1
    chosen.endpoint_metrics = True
    server = xllamacpp.Server(chosen)
    print(f"serving at {server.listening_address}", flush=True)
    signal.pause()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    main(sys.argv[1], int(sys.argv[2]))
