"""Where a body is read: a short one at once, a longer one in a thread, so that none holds the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

MAX_INLINE_BYTES: Final = 64 << 10


async def run(read: Callable[[bytes], T], body: bytes) -> T:
    """What `read` makes of a body."""
    return read(body) if len(body) <= MAX_INLINE_BYTES else await asyncio.to_thread(read, body)
