"""Images behind links, fetched for the request that names them. Off unless --image-urls lists domains.

Rules: a name is resolved once per connection and all its addresses are checked; the connection goes to one of those.
No connection is reused. Redirects are followed by hand, each checked like a new link. Bytes, time, redirects and
concurrent fetches are bounded. Nothing of the client's request is sent along: no cookies, no authorization, no
headers. The image workers find out what the bytes are; the answer's content type is ignored. To the client all
failures after the check of the link look alike, so that a client cannot explore a network through the sidecar.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from sidecar.errors import BadImage, ImagesBusy
from sidecar.relay import url_policy

FETCH_TIMEOUT_S: Final = 10.0  # for one image with all its redirects; vLLM allows 5 for each try
MAX_REDIRECTS: Final = 3
MAX_CONCURRENT_FETCHES: Final = 16  # per relay process; each takes at most --image-max-bytes
READ_BYTES: Final = 64 << 10
MAX_HEADER_BYTES: Final = 8190  # one header line of the answer
REQUEST_HEADERS: Final = {"accept": "image/*", "accept-encoding": "identity", "user-agent": "inference-sidecar"}
REDIRECT_STATUSES: Final = (301, 302, 303, 307, 308)

Permit = Callable[[str], bool]  # of an IP address


class _PublicResolver(AbstractResolver):
    """Resolves a name; fails if one of its addresses is not permitted."""

    def __init__(self, resolver: AbstractResolver, is_permitted: Permit) -> None:
        self._resolver = resolver
        self._is_permitted = is_permitted

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        if not found or not all(self._is_permitted(result["host"]) for result in found):
            raise OSError("an address that is not permitted")
        return found

    async def close(self) -> None:
        await self._resolver.close()


class Fetcher:
    """Fetches images from hosts in `domains`. `is_permitted` checks addresses."""

    def __init__(
        self,
        domains: tuple[url_policy.AllowedDomain, ...],
        max_bytes: int,
        *,
        timeout_s: float = FETCH_TIMEOUT_S,
        is_permitted: Permit = url_policy.is_public,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._domains = domains
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._is_permitted = is_permitted
        self._slots = asyncio.Semaphore(MAX_CONCURRENT_FETCHES)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=_PublicResolver(resolver or aiohttp.ThreadedResolver(), is_permitted),
                use_dns_cache=False,
                force_close=True,
                family=socket.AF_UNSPEC,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=REQUEST_HEADERS,
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None),  # `fetch` limits the time of all redirects together
            read_bufsize=READ_BYTES,
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
        )
        self.close = self._session.close

    async def fetch(self, link: str, where: str) -> bytearray:
        """The bytes behind `link`. Raises BadImage, or ImagesBusy if too many fetches run; `where` names the part."""
        url = url_policy.allowed_url(link.strip(), self._domains)
        if url is None:
            raise BadImage(f"{where}: images are not fetched from this link; send a data URL", "image_url")
        busy = True
        try:
            async with asyncio.timeout(self._timeout_s), self._slots:
                busy = False
                return await self._follow(url, where)
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError):
            if busy:
                raise ImagesBusy("too many images are being fetched; try again shortly") from None
            raise _fetch_error(where) from None

    async def _follow(self, url: URL, where: str) -> bytearray:
        for _ in range(1 + MAX_REDIRECTS):
            host = url.host or ""
            if url_policy.is_literal(host) and not self._is_permitted(host):
                break
            async with self._session.get(url, allow_redirects=False) as answer:
                if answer.status == 200:
                    return await self._read(answer, where)
                onward = answer.headers.get("location", "") if answer.status in REDIRECT_STATUSES else ""
            following = url_policy.allowed_url(onward, self._domains, url) if onward else None
            if following is None:
                break
            url = following
        raise _fetch_error(where)

    async def _read(self, answer: aiohttp.ClientResponse, where: str) -> bytearray:
        if answer.headers.get("content-encoding", "identity").lower() != "identity":
            raise _fetch_error(where)  # none was requested, and it may be a decompression bomb
        data = bytearray()
        if (answer.content_length or 0) <= self._max_bytes:
            async for chunk in answer.content.iter_chunked(READ_BYTES):
                data += chunk
                if len(data) > self._max_bytes:
                    break
            else:
                return data
        raise BadImage(f"{where}: the image was refused: the limit is {self._max_bytes} bytes", "image_too_large")


def _fetch_error(where: str) -> BadImage:
    return BadImage(f"{where}: the image could not be fetched; send it as a data URL", "image_url_failed")
