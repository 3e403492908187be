"""Lines that repeat are counted, not logged."""

from __future__ import annotations

import logging

import pytest

from sidecar.runtime.limited_log import LINE_INTERVAL_S, LimitedLog


def test_one_line_a_minute_of_each_kind(caplog: pytest.LogCaptureFixture) -> None:
    """The first is logged at once, the next after a minute says how many were left out; kinds do not mix."""
    now = [0.0]
    log = LimitedLog(logging.getLogger("test"), lambda: now[0])
    for step in range(3 * 60):
        now[0] = step * LINE_INTERVAL_S / 60
        log.error("disk", "cannot write (%s)", "full")
        if step % 90 == 0:
            log.error("fork", "cannot fork")
    assert [record.getMessage() for record in caplog.records] == [
        "cannot write (full)",
        "cannot fork",
        "cannot write (full) (59 more since the last such line)",
        "cannot fork",
        "cannot write (full) (59 more since the last such line)",
    ]
