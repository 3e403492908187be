"""The plug-in for vLLM, written into the state directory, where the engine's container finds it by PYTHONPATH.

    state directory/vllm-plugin/sidecar_vllm/                   the package
                                inference_sidecar_vllm-VERSION.dist-info/   its entry point: vLLM loads it at its start
                    vllm-steps/                                 where an engine of the same user writes its steps

Rules: a user who may write there may run code in the engine, so the directory belongs to the sidecar's user, and the
engine's container mounts it read-only. Files are replaced one by one, atomically: an engine that starts meanwhile finds
the old or the new form of each. A directory that cannot be written costs the plug-in, not the start.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Final

from sidecar.runtime import safe_files
from sidecar.runtime.plugin_folders import PLUGIN_FOLDER, STEPS_FOLDER

FOLDER: Final = PLUGIN_FOLDER
SOURCES: Final = Path(__file__).parent / "plugin-sources"  # a link to plugins/vllm; a copy in a wheel
PACKAGE: Final = "sidecar_vllm"
NAME: Final = "inference_sidecar_vllm"
ENTRY_POINTS: Final = (
    f"[vllm.general_plugins]\ninference_sidecar = {PACKAGE}:register\n"
    f"[sglang.srt.plugins]\ninference_sidecar = {PACKAGE}.sglang_steps:register\n"
)

_log = logging.getLogger(__name__)


def write(state_dir: str) -> str:
    """Write the plug-in below `state_dir`. Returns the directory for PYTHONPATH, or "" if it cannot be written."""
    target = Path(state_dir) / FOLDER
    try:
        safe_files.make_folder(Path(state_dir) / STEPS_FOLDER)
        for name, content in files().items():
            path = target / name
            for folder in reversed(path.relative_to(state_dir).parents[:-1]):
                safe_files.make_folder(Path(state_dir) / folder)
            safe_files.replace(path, content)
    except OSError as e:
        _log.warning(
            "%s: vLLM's plug-in cannot be written (%s): its steps are not seen, images go inline", target, e.strerror
        )
        return ""
    return str(target)


def files() -> dict[str, bytes]:
    """The plug-in's files, by their path below the directory. Raises OSError if the installation has none."""
    sources = {path.name: path.read_bytes() for path in sorted((SOURCES / PACKAGE).glob("*.py"))}
    found = re.search(rb'^__version__ = "([0-9.]+)"$', sources.get("__init__.py", b""), re.MULTILINE)
    if found is None:
        raise FileNotFoundError(2, "it is not part of this installation")
    version = found[1].decode()
    about = f"{NAME}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: inference-sidecar-vllm\nVersion: {version}\n"
    # the entry point last: without it nothing is loaded
    return {f"{PACKAGE}/{name}": content for name, content in sources.items()} | {
        f"{about}/METADATA": metadata.encode(),
        f"{about}/entry_points.txt": ENTRY_POINTS.encode(),
    }
