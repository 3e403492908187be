"""What a process asks of its kernel."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.waiting import PATIENCE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's call")


def ran(code: str) -> tuple[int, str]:
    """Exit status and output of a process of its own."""
    code = "from sidecar.runtime.prctl import *; from pathlib import Path; " + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    return done.returncode, done.stdout


def test_a_text_and_a_number_reach_the_kernel() -> None:
    """A name is the one that /proc shows, and no privilege can be gained any more."""
    code = (
        "print(prctl(SET_NAME, b'sidecar x'), prctl(SET_NO_NEW_PRIVS, 1), Path('/proc/self/comm').read_text().strip(), "
    )
    code += "'NoNewPrivs:\\t1' in Path('/proc/self/status').read_text())"
    assert ran(code) == (0, "True True sidecar x True\n")


def test_what_the_kernel_does_not_know_is_false() -> None:
    """An option of no kernel raises nothing."""
    assert ran("print(prctl(123_456, 1))") == (0, "False\n")


def test_a_process_whose_parent_is_gone_ends_at_once() -> None:
    """The parent may have ended before the kernel was asked: another process is the parent then."""
    assert ran(f"die_with({os.getpid()}); print('lives')") == (0, "lives\n")
    assert ran(f"die_with({os.getppid()}); print('lives')") == (1, "")
