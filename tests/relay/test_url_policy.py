"""Which links may be fetched and which addresses are public."""

from __future__ import annotations

import pytest
from yarl import URL

from sidecar.relay import url_policy

AMONG = url_policy.parse_domains("img.example.com, *.example.org,cdn.example.net:8443,93.184.216.34")


@pytest.mark.parametrize(
    "link",
    [
        "http://img.example.com/a.jpg",
        "https://img.example.com/a.jpg?size=1#x",
        "HTTPS://IMG.example.com./a.jpg",
        "https://img.example.com:443/a.jpg",
        "https://a.example.org/",
        "https://a.b.example.org/",
        "https://cdn.example.net:8443/a.jpg",
        "http://93.184.216.34/a.jpg",
    ],
)
def test_what_the_operator_listed_is_allowed(link: str) -> None:
    """Listed hosts, any name below a `*.`, the scheme's port or the one that is listed."""
    assert url_policy.allowed_url(link, AMONG) is not None


@pytest.mark.parametrize(
    "link",
    [
        "",
        "img.example.com/a.jpg",
        "ftp://img.example.com/a.jpg",
        "file:///etc/passwd",
        "http://",
        "http:///a.jpg",
        "http://img.example.com.evil.net/",
        "http://evil.net/img.example.com",
        "http://evil.net#img.example.com",
        "http://evil.net\\@img.example.com/",
        "http://img.example.com@evil.net/",
        "http://evil.net@img.example.com/",
        "http://user:word@img.example.com/",
        "http://example.org/",
        "http://notexample.org/",
        "http://x.img.example.com/",
        "http://img.example.com:22/",
        "https://img.example.com:80/",
        "http://img.example.com:0/",
        "http://img.example.com:99999/",
        "https://cdn.example.net/a.jpg",
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]/",
        "http://2130706433/",
        "http://127.1/",
        "http://img.example.com/" + "a" * url_policy.MAX_LINK_CHARS,
    ],
)
def test_everything_else_is_not(link: str) -> None:
    """Other hosts however they are dressed up, other ports, other schemes, user names, and what is no URL."""
    assert url_policy.allowed_url(link, AMONG) is None


@pytest.mark.parametrize(
    ("base", "onward", "wanted"),
    [
        ("https://img.example.com/a/b.jpg", "../c.jpg", "https://img.example.com/c.jpg"),
        ("https://img.example.com/a", "//a.example.org/x", "https://a.example.org/x"),
        ("http://img.example.com/a", "https://img.example.com/a", "https://img.example.com/a"),
        ("https://img.example.com/a", "http://img.example.com/a", None),
        ("http://img.example.com/a", "//evil.net/a", None),
        ("http://img.example.com/a", "file:///etc/passwd", None),
        ("http://img.example.com/a", "http://10.0.0.1/", None),
    ],
)
def test_a_redirect_is_judged_like_a_link(base: str, onward: str, wanted: str | None) -> None:
    """Relative places are joined; other hosts, schemes and a step down from https are refused."""
    url = url_policy.allowed_url(onward, AMONG, URL(base))
    assert (None if url is None else str(url)) == wanted


@pytest.mark.parametrize("text", ["http://a", " https://a", "HTTP://A", "https:a"])
def test_links_are_told(text: str) -> None:
    """What any engine would fetch by http counts as a link."""
    assert url_policy.is_link(text)
    assert not url_policy.is_link("data:image/png;base64,http://")


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101", "2002:101:101::1"],
)
def test_public_addresses(address: str) -> None:
    """Addresses of the Internet, also where IPv6 embeds them."""
    assert url_policy.is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.0.0.1",
        "100.64.0.1",
        "127.0.0.1",
        "127.255.255.255",
        "169.254.169.254",
        "172.16.0.1",
        "192.0.0.1",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.1.1.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::1.1.1.1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::a00:1",
        "64:ff9b::7f00:1",
        "64:ff9b:1::a00:1",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:a00:1::1",
        "2002:7f00:1::",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%1",
        "fec0::1",
        "ff02::1",
        "5f00::1",
        "4000::1",
        "localhost",
        "127.1",
        "2130706433",
        "0x7f000001",
        "1.1.1.1:80",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    """Loopback, private, link-local, shared, multicast, reserved, what embeds one of these, and what is no address."""
    assert not url_policy.is_public(address)
