"""Pure: which links of image parts may be fetched, and which addresses may be connected to.

Rules: http and https only, no user names or passwords. The host must be on the operator's list, at the scheme's own
port or the one listed. An address is public only if the whole Internet could route to it; an IPv4 address embedded in
an IPv6 one (mapped, NAT64, 6to4) is checked as the IPv4 address.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

from yarl import URL

_LINK: Final = re.compile(r"\s*https?:", re.IGNORECASE)
MAX_LINK_CHARS: Final = 8192
_UNICAST: Final = ipaddress.IPv6Network("2000::/3")  # all that IANA has assigned
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_TEREDO: Final = ipaddress.IPv6Network("2001::/32")
_RELAYS: Final = ipaddress.IPv4Network("192.88.99.0/24")  # of 6to4, deprecated by RFC 7526


@dataclass(frozen=True, slots=True)
class AllowedDomain:
    """A host that may be fetched from; `below`: any name below it instead. `port` None: the scheme's own."""

    host: str
    below: bool = False
    port: int | None = None

    def matches(self, url: URL) -> bool:
        host = (url.raw_host or "").rstrip(".")
        named = host.endswith("." + self.host) if self.below else host == self.host
        return named and (url.is_default_port() if self.port is None else url.port == self.port)


def parse_domains(text: str) -> tuple[AllowedDomain, ...]:
    """The domains of --image-urls: `img.example.com`, `*.example.com` (all below), with a port or without; or `off`."""
    entries = [] if text == "off" else [entry.strip().partition(":") for entry in text.split(",")]
    return tuple(
        AllowedDomain(host.removeprefix("*."), host.startswith("*."), int(port) if port else None)
        for host, _, port in entries
    )


def is_link(text: str) -> bool:
    """Whether an image's URL is an http(s) link."""
    return _LINK.match(text) is not None


def allowed_url(text: str, domains: tuple[AllowedDomain, ...], base: URL | None = None) -> URL | None:
    """The URL to fetch; None if it is not allowed. `base`: where a redirect to `text` came from."""
    try:
        url = URL(text) if base is None else base.join(URL(text))
        port = url.port
    except (ValueError, TypeError):
        return None
    if len(text) > MAX_LINK_CHARS or url.scheme not in ("http", "https") or not port or "@" in url.raw_authority:
        return None
    if base is not None and base.scheme == "https" and url.scheme != "https":
        return None
    return url if any(domain.matches(url) for domain in domains) else None


def is_public(address: str) -> bool:
    """Whether `address` is an IP address of the public Internet."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast and not ip.is_reserved and ip not in _RELAYS
    embedded = ip.ipv4_mapped or ip.sixtofour
    if ip in _NAT64:
        embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if embedded is not None:
        return is_public(str(embedded))
    return ip.is_global and ip in _UNICAST and ip not in _TEREDO


def is_literal(host: str) -> bool:
    """Whether a host is an address, also in a short or numeric form (127.1, 2130706433)."""
    return ":" in host or host.replace(".", "").isdigit() or host.startswith("0x")
