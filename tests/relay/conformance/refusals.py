"""What a request gets that the relay answers itself."""

from __future__ import annotations

import json

from .wire import Answer


def assert_refused(answer: Answer, status: int, *, without: bytes) -> None:
    """An error in OpenAI's form with an id, and none of the bytes `without`, in whatever case."""
    assert answer.final is not None, "the connection ended without an answer"
    assert answer.status == status
    assert answer.final.is_whole
    assert answer.final.value(b"content-type").startswith(b"application/json")
    assert len(answer.final.all(b"x-request-id")) == 1 and answer.final.value(b"x-request-id")
    error = json.loads(answer.final.body)["error"]
    assert error["message"] and error["code"]
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    seen = repr(answer.final).encode().lower()
    assert without.lower() not in seen
