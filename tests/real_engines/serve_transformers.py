"""`transformers serve` of one model under the name `tiny`: PYTHON serve_transformers.py DIR PORT FOLDER.

The server names a model by its path, so it is started in FOLDER, where a link has that name.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(model: str, port: str, folder: str) -> None:
    """Become the server."""
    link = Path(folder) / "tiny"
    if not link.exists():
        link.symlink_to(model)
    os.chdir(folder)
    served = ("serve", "tiny", "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", port)
    os.execv(sys.executable, (sys.executable, "-m", "transformers.cli.transformers", *served))


if __name__ == "__main__":
    main(*sys.argv[1:])
