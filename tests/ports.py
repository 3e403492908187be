"""Ports for processes that need one before they start."""

from __future__ import annotations

import random
import socket

# Below the ports that Linux gives to outgoing connections, of which parallel tests make many.
PORT_RANGE = (12_000, 32_000)

_given: set[int] = set()


def free_port() -> int:
    """A free loopback port that was not returned before and that no outgoing connection uses."""
    while True:
        port = random.randrange(*PORT_RANGE)
        if port in _given:
            continue
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
