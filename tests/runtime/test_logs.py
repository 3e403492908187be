"""How log lines look, by where they go."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

CODE = """
import logging
from sidecar.runtime import logs
logs.setup('info')
logging.getLogger('x').warning('it is "so"')
"""


def written_to(stderr: int, reading: int) -> str:
    """What a process logs whose stderr is `stderr`, as it is read from `reading`."""
    subprocess.run([sys.executable, "-c", CODE], stderr=stderr, check=True, timeout=60)
    os.close(stderr)
    with os.fdopen(reading) as end:
        return end.readline()


def test_lines_are_text_on_a_terminal() -> None:
    """People read them there: time, level, logger, message."""
    reading, terminal = os.openpty()
    assert re.fullmatch(r'[\d-]+ [\d:,]+ WARNING x: it is "so"\n', written_to(terminal, reading))


def test_lines_are_json_anywhere_else() -> None:
    """A collector reads them: one object a line, with the time as RFC 3339 has it."""
    reading, pipe = os.pipe()
    line = json.loads(written_to(pipe, reading))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {"level": "warning", "logger": "x", "message": 'it is "so"'}
