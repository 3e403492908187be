"""Ports for processes that need one before they start."""

from __future__ import annotations

import os
import random
import socket

import pytest

# Below the ports that Linux gives to outgoing connections, of which parallel tests make many.
PORT_RANGE = (12_000, 32_000)

_given: set[int] = set()


def _ports_of_worker() -> range:
    """Each of pytest's workers has its own: a port is free until its process starts, and another could take it."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return range(*PORT_RANGE)[worker :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]


def free_port() -> int:
    """A free loopback port that was not returned before and that no outgoing connection uses."""
    ports = _ports_of_worker()
    while True:
        port = random.choice(ports)
        if port in _given:
            continue
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port


def outer_address() -> str:
    """An address of this machine other than loopback; skips the test where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect(("192.0.2.254", 9))  # sends nothing: the kernel chooses the address to send from
        except OSError:
            pytest.skip("this machine has no address but loopback")
        address = str(asking.getsockname()[0])
    if address.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    return address
