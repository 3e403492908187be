"""The body of an HTTP answer, whole and bounded."""

from __future__ import annotations

import aiohttp


class TooLong(ValueError):
    """A body that is over its bound."""


async def whole(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """All of a body. Raises TooLong past `limit` bytes; what is left of it is not read."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limit:
            response.close()
            raise TooLong(f"over {limit} bytes")
    return bytes(body)
