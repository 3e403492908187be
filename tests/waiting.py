"""The timeout of waits in tests."""

from __future__ import annotations

# A limit for hangs, not a measurement: starved machines have taken tens of seconds for little.
PATIENCE = 90.0
