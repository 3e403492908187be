"""How the engine is reached: by TCP, TLS or a Unix socket; and what is wrong where a connection cannot be made.

- A trouble is one sentence for operators: what is wrong, a colon, what to do. It is "" for an engine that merely does
  not answer, or refuses connections: that may be a restart.
- `--engine-ca` replaces the system's authorities.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from sidecar.runtime import open_files
from sidecar.signals.identify import ProbeAnswers
from sidecar.signals.listening_socket import host_and_port, socket_path

CHECK_TIMEOUT_S: Final = 5.0
CHECK_PATH: Final = "/v1/models"
# The status of proxies and servers for plain HTTP on a TLS port.
PLAIN_HTTP_STATUS: Final = 400
SOCKET_URL: Final = "http://localhost"  # of requests over a Unix socket: the name is not looked up
# OpenSSL's reasons when the other side speaks no TLS.
_NO_TLS: Final = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG")
# OpenSSL's codes of a certificate that is not accepted (X509_V_ERR_*).
_NOT_YET_VALID, _EXPIRED, _UNTRUSTED, _OTHER_NAME = (9,), (10,), (18, 19, 20, 21), (62, 64)


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """The engine at `url`, as --engine names it, with the authorities of the PEM file `ca`; "": the system's."""

    url: str
    ca: str = ""

    @property
    def base(self) -> str:
        """What paths are appended to."""
        return SOCKET_URL if socket_path(self.url) else self.url

    def connector(self, **options: Any) -> aiohttp.BaseConnector:
        """A connector to the engine, to be made on the event loop."""
        if path := socket_path(self.url):
            return aiohttp.UnixConnector(path, **options)
        return aiohttp.TCPConnector(ssl=_trust(self.ca) if self.ca else True, **options)

    def tls(self) -> ssl.SSLContext | None:
        """What the engine's certificate is checked with; None without TLS."""
        if not self.url.startswith("https:"):
            return None
        return _trust(self.ca) if self.ca else ssl.create_default_context()

    def explain(self, error: BaseException) -> str:
        """The trouble that an error of a request shows."""
        if open_files.is_exhausted(error):
            return open_files.EXHAUSTED_TEXT
        for cause in _causes(error):
            if isinstance(cause, ssl.SSLCertVerificationError):
                return self._explain_certificate(cause)
            if isinstance(cause, ssl.SSLError):
                return _explain_tls(cause)
            if isinstance(cause, PermissionError) and (path := socket_path(self.url)):
                return (
                    f"the sidecar may not write to the engine's socket {path}: run both as one user, or share a group"
                )
        return ""

    def _explain_certificate(self, error: ssl.SSLCertVerificationError) -> str:
        code = error.verify_code
        if code in _UNTRUSTED and self.ca:
            return f"the engine's certificate is not signed by an authority of {self.ca}: give its own to --engine-ca"
        if code in _UNTRUSTED:
            return "the engine's certificate is signed by an unknown authority: set --engine-ca FILE"
        if code in _OTHER_NAME:
            host = host_and_port(self.url)[0]
            return f"the engine's certificate is not for {host}: use a name that it is for in --engine"
        if code in _EXPIRED:
            return "the engine's certificate has expired: renew it"
        if code in _NOT_YET_VALID:
            return "the engine's certificate is not valid yet: compare the clocks of both machines"
        return f"the engine's certificate is not accepted ({error.verify_message}): replace it"

    async def explain_answers(self, session: aiohttp.ClientSession, answers: ProbeAnswers) -> str:
        """The trouble behind what an engine answered to its first requests."""
        status = answers.status.get(CHECK_PATH)
        return await self.find_trouble(session) if status in (0, PLAIN_HTTP_STATUS) else ""

    async def find_trouble(self, session: aiohttp.ClientSession) -> str:
        """Send one request; the trouble that it meets."""
        timeout = aiohttp.ClientTimeout(total=CHECK_TIMEOUT_S)
        try:
            async with session.get(self.base + CHECK_PATH, timeout=timeout, allow_redirects=False) as response:
                if response.status != PLAIN_HTTP_STATUS:
                    return ""
        except TimeoutError:
            return ""
        except (aiohttp.ClientError, OSError) as e:
            if (trouble := self.explain(e)) or isinstance(e, aiohttp.ClientConnectorError):
                return trouble
        if self.url.startswith("http:") and await _speaks_tls(*host_and_port(self.url)):
            return "the engine speaks TLS: use https:// in --engine"
        return ""


def _trust(ca: str) -> ssl.SSLContext:
    """A context that trusts the file's certificates alone, also one that is no authority's own."""
    context = ssl.create_default_context(cafile=ca)
    # Private authorities often lack the extensions that Python 3.13 began to require.
    context.verify_flags = (context.verify_flags | ssl.VERIFY_X509_PARTIAL_CHAIN) & ~ssl.VERIFY_X509_STRICT
    return context


def _explain_tls(error: ssl.SSLError) -> str:
    reason = error.reason or ""
    if reason in _NO_TLS:
        return "the engine does not speak TLS: use http:// in --engine"
    if "ALERT" in reason:
        return f"the engine refuses the sidecar's TLS handshake ({reason}): see the engine's log"
    return ""  # a connection that broke off


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What aiohttp wrapped in an error, and the error itself."""
    for inner in (getattr(error, "certificate_error", None), getattr(error, "os_error", None), error.__cause__):
        if isinstance(inner, BaseException):
            yield inner
    yield error


async def _speaks_tls(host: str, port: int) -> bool:
    """Whether a TLS handshake succeeds, regardless of who signed the certificate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except OSError:  # TimeoutError and SSLError included
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True
