"""The certificate of the relay's own port, read again when its files change: handshakes from then on get the new one.

Kubernetes swaps a mounted Secret while a pod runs. Files that do not fit together, as amid a swap, leave the old one.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from sidecar.runtime.limited_log import LimitedLog

_log = LimitedLog(logging.getLogger(__name__))


class Certificate:
    """The TLS of a listening port: `context` is given to the server. Raises OSError if the files cannot be used."""

    def __init__(self, cert: str, key: str) -> None:
        self._files = cert, key
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.set_alpn_protocols(["http/1.1"])
        self.context.load_cert_chain(cert, key)
        self._seen = self._state()

    def refresh(self) -> None:
        """Read the files again if they have changed."""
        try:
            seen = self._state()
            if seen == self._seen:
                return
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(*self._files)  # both fit together
            self.context.load_cert_chain(*self._files)
            self._seen = seen
        except OSError as e:  # SSLError included
            _log.error("certificate", "--tls-cert, --tls-key: the old certificate is kept: %s", type(e).__name__)

    def _state(self) -> tuple[tuple[int, int, int], ...]:
        stats = [Path(file).stat() for file in self._files]
        return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)
