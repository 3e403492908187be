"""How long a test waits for what must come."""

from __future__ import annotations

PATIENCE = 90.0  # seconds: a bound on hanging, not a measure of anything; starved machines have taken tens of seconds for little
