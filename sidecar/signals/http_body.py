"""Reads the body of an HTTP response, up to a limit."""

from __future__ import annotations

import aiohttp


class BodyTooLong(ValueError):
    """The body is over its limit."""


async def read_body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Read a whole body. Raises BodyTooLong past `max_bytes`, and closes the connection."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > max_bytes:
            response.close()
            raise BodyTooLong(f"over {max_bytes} bytes")
    return bytes(body)
