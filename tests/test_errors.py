"""What logs say of an error."""

from __future__ import annotations

from sidecar.errors import place_of


def broken(text: str) -> None:
    raise ValueError(text)


def test_an_error_is_logged_by_its_place_not_by_its_text() -> None:
    """File and line of the innermost frame; nothing of what it was raised with."""
    try:
        broken("what a user sent")
    except ValueError as e:
        line = broken.__code__.co_firstlineno + 1
        assert place_of(e) == f"test_errors.py:{line}"


def test_an_error_that_was_never_raised_has_no_place() -> None:
    """It is said, not guessed."""
    assert place_of(ValueError("text")) == "unknown place"
