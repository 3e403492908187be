"""Heads of messages: fields as they came, and what is wrong with those that llhttp accepts."""

from __future__ import annotations

import pytest

from sidecar.relay.http.head import Fields, fault_of, has_body, with_length

FIELDS = Fields([(b"X-Role", b"a"), (b"x-role", b"b"), (b"Connection", b"close, X-Hop"), (b"connection", b"Upgrade")])


def test_fields_are_found_in_any_case_first_and_last() -> None:
    """The first for what a client says of itself, the last for what a gateway adds."""
    assert (FIELDS.get(b"x-role"), FIELDS.last(b"x-role"), FIELDS.get(b"none", "?")) == ("a", b"b", "?")
    assert FIELDS.tokens(b"connection") == {"close", "x-hop", "upgrade"}
    assert b"x-role" in FIELDS and b"X-Role" not in FIELDS


@pytest.mark.parametrize(("value", "length"), [(b"007", 7), (b"0", 0), (b"", None), (b"-1", None), (b"1e3", None)])
def test_a_length_is_digits(value: bytes, length: int | None) -> None:
    """Anything else is none."""
    assert Fields([(b"Content-Length", value)]).length() == length
    assert Fields().length() is None


def test_a_length_is_changed_in_its_place() -> None:
    """The name keeps its case and the value its form if it says the same."""
    fields = [(b"a", b"1"), (b"Content-Length", b"07"), (b"b", b"2")]
    assert with_length(fields, 7) == fields
    assert with_length(fields, 8)[1] == (b"Content-Length", b"8")
    assert with_length([(b"a", b"1")], 8) == [(b"a", b"1"), (b"content-length", b"8")]


@pytest.mark.parametrize(
    ("method", "status", "has"), [("GET", 200, True), ("HEAD", 200, False), ("GET", 204, False), ("GET", 103, False)]
)
def test_which_answers_have_a_body(method: str, status: int, has: bool) -> None:
    """RFC 9112, 6.3."""
    assert has_body(method, status) is has


@pytest.mark.parametrize(
    ("line", "hosts", "part"),
    [
        (("GET", b"/x", "1.1"), [b"x:1"], ""),
        (("GET", b"/x", "1.1"), [b""], ""),
        (("GET", b"/x", "1.1"), [b"[::1]:80"], ""),
        (("GET", b"/x", "1.0"), [], ""),
        (("OPTIONS", b"*", "1.1"), [b"x"], ""),
        (("GET", b"http://X/y", "1.1"), [b"x"], ""),
        (("GET", b"/x", "1.1"), [], "one Host"),
        (("GET", b"/x", "1.1"), [b"x", b"x"], "one Host"),
        (("GET", b"/x", "1.1"), [b"a b"], "not valid"),
        (("GET", b"/x", "1.1"), [b"a/b"], "not valid"),
        (("GET", b"http://y/", "1.1"), [b"x"], "different"),
        (("GET", b"*", "1.1"), [b"x"], "target"),
        (("GET", b"ftp://x/", "1.1"), [b"x"], "target"),
        (("GET", b"/x", "2.0"), [b"x"], "HTTP/1.0"),
    ],
)
def test_faults(line: tuple[str, bytes, str], hosts: list[bytes], part: str) -> None:
    """What could mean one thing here and another at the engine."""
    fault = fault_of(*line, Fields([(b"Host", host) for host in hosts]))
    assert (part in fault) and bool(fault) == bool(part)
