"""What a client is told when no connection to the engine could be made: the truth, and whose limit it was."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from sidecar.relay.http.engine import NotConnected
from sidecar.relay.outcomes import engine_error, outcome_of


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("cause", "code", "said", "outcome"),
    [
        (os_error(errno.ECONNREFUSED), "engine_unreachable", "may be starting or restarting", "engine_error"),
        (socket.gaierror(socket.EAI_NONAME, "no name"), "engine_unreachable", "cannot be resolved", "engine_error"),
        (os_error(errno.EACCES), "engine_unreachable", "may not connect", "engine_error"),
        (TimeoutError(), "engine_unreachable", "took no connection within", "engine_error"),
        (os_error(errno.ETIMEDOUT), "engine_unreachable", "took no connection within", "engine_error"),
        (os_error(errno.EADDRNOTAVAIL), "no_local_ports", "the sidecar has no local ports left", "rejected"),
        (os_error(errno.EMFILE), "no_open_files", "the sidecar has no file descriptors left", "rejected"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_12_an_error_names_what_failed(cause: Exception, code: str, said: str, outcome: str) -> None:
    """A limit of the sidecar or its machine is not called a restart of the engine, nor counted as its failure."""
    failed = NotConnected("x")
    failed.__cause__ = cause
    error = engine_error(failed, "progressing")
    assert (error.code, outcome_of(error, 0, "progressing")) == (code, outcome)
    assert said in str(error)
