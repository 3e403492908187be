"""The plug-in in the state directory: an interpreter that gets it by PYTHONPATH finds its entry point."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sidecar.images.vllm_plugin import path_remedy
from sidecar.launch import engine_plugin

FIND = (
    "from importlib.metadata import entry_points, version; "
    "[found] = entry_points(group='vllm.general_plugins', name='inference_sidecar'); "
    "print(found.load().__module__, version('inference-sidecar-vllm'))"
)


def test_python_finds_the_entry_point(tmp_path: Path) -> None:
    """As vLLM does: by its group, from the directory alone; written twice, the same files."""
    for _ in range(2):
        folder = engine_plugin.write(str(tmp_path))
    assert folder in path_remedy(str(tmp_path))
    run = [sys.executable, "-c", FIND]
    done = subprocess.run(run, env=os.environ | {"PYTHONPATH": folder}, capture_output=True, text=True, timeout=60)
    version = engine_plugin.files()["sidecar_vllm/__init__.py"].decode().split('__version__ = "')[1].split('"')[0]
    assert (done.stdout.split(), done.stderr) == (["sidecar_vllm", version], "")


def test_a_link_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where someone else put a link, nothing is written through it, and the start goes on."""
    elsewhere, state = tmp_path / "elsewhere", tmp_path / "state"
    elsewhere.mkdir()
    state.mkdir()
    (state / engine_plugin.FOLDER).symlink_to(elsewhere)
    caplog.set_level(logging.WARNING)
    assert engine_plugin.write(str(state)) == ""
    assert list(elsewhere.iterdir()) == [] and "cannot be written" in caplog.text
