"""Ports for processes that must be told theirs before they start."""

from __future__ import annotations

import random
import socket

RANGE = (12_000, 32_000)  # below those that Linux gives to outgoing connections, which many tests at once make many of

_given: set[int] = set()


def free_port() -> int:
    """A port of loopback that nobody listens on and that was not given before; no connection is ever given it by the system."""
    while True:
        port = random.randrange(*RANGE)
        if port in _given:
            continue
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
