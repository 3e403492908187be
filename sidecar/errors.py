"""The error tree. Each error has a reason code and, if clients see it, an HTTP status.

    SidecarError
    ├── UsageError            exit 2   a setting is wrong; the message is one line that says what to do
    ├── StartError            exit 1   something needed at startup is taken or missing (a port)
    └── RequestError          status   shown to the client in OpenAI's error shape
        ├── BodyTooLarge      413      body_too_large
        ├── EngineUnreachable 502      engine_unreachable
        ├── EngineStalled     503      engine_stalled
        ├── StreamStuck       503      stream_stuck
        ├── PromptTooLarge    400      prompt_exceeds_kv_cache
        ├── QueueFull         429      queue_full
        ├── TenantLimited     429      rate_limit_exceeded
        ├── Draining          503      draining
        ├── ImagesBusy        503      images_busy
        ├── ImagesOff         404      images_off
        ├── BadTarget         400      bad_request_target
        ├── Internal          500      internal_error
        └── BadImage          400      image_* (names the part and the limit)

Messages contain no stack trace, no address, and no user content.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import ClassVar


class SidecarError(Exception):
    """Base of all errors that the sidecar raises on purpose."""

    code: ClassVar[str] = "sidecar_error"


class UsageError(SidecarError):
    """A setting is unknown or invalid; ends the process with exit code 2 and this one line."""

    code = "usage"


class StartError(SidecarError):
    """Startup failed; ends the process with exit code 1 and this one line."""

    code = "start"


class RequestError(SidecarError):
    """Ends one request: the client receives `status` and `body()`."""

    code = "request_error"
    status: ClassVar[int] = 400
    type: str = "invalid_request_error"
    retry_after: float | None = None  # seconds

    def body(self) -> dict[str, dict[str, str]]:
        """The response body, in OpenAI's error shape."""
        return {"error": {"message": str(self), "type": self.type, "code": self.code}}


class BodyTooLarge(RequestError):
    """The request body is over --max-body-bytes."""

    code = "body_too_large"
    status = 413


class EngineUnreachable(RequestError):
    """The engine refused the connection, or closed it before it responded."""

    code = "engine_unreachable"
    status = 502
    type = "server_error"
    retry_after = 2


class EngineStalled(RequestError):
    """The engine stalled while this request was waiting."""

    code = "engine_stalled"
    status = 503
    type = "server_error"
    retry_after = 10


class StreamStuck(RequestError):
    """The engine stopped working on this request only."""

    code = "stream_stuck"
    status = 503
    type = "server_error"
    retry_after = 1


class PromptTooLarge(RequestError):
    """The prompt can never fit into the engine's KV cache, and would block its queue forever."""

    code = "prompt_exceeds_kv_cache"


class QueueFull(RequestError):
    """The queue for the engine's capacity (--max-concurrent) is full."""

    code = "queue_full"
    status = 429
    type = "rate_limit_error"
    retry_after = 1


class TenantLimited(RequestError):
    """The tenant is over its --tenant-limits. OpenAI's `type`: "tokens" for the rate, "requests" for work in flight."""

    code = "rate_limit_exceeded"
    status = 429

    def __init__(self, message: str, retry_after: float, type: str) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.type = type


class Draining(RequestError):
    """The sidecar is shutting down and accepts no new requests."""

    code = "draining"
    status = 503
    type = "server_error"
    retry_after = 1


class ImagesBusy(RequestError):
    """All image workers are busy and their queue is full."""

    code = "images_busy"
    status = 503
    type = "server_error"
    retry_after = 1


class ImagesOff(RequestError):
    """An image endpoint was called while images are off."""

    code = "images_off"
    status = 404


class BadTarget(RequestError):
    """The request target is not a path that may be forwarded to the engine."""

    code = "bad_request_target"


class Internal(RequestError):
    """A bug in the sidecar. It costs one request."""

    code = "internal_error"
    status = 500
    type = "server_error"


class BadImage(RequestError):
    """An image part is broken, not an image, or over a limit. `reason` is one of the image reason codes."""

    code = "image_invalid"
    status = 400

    def __init__(self, message: str, reason: str = "image_invalid") -> None:
        super().__init__(message)
        self.reason = reason

    def body(self) -> dict[str, dict[str, str]]:
        """The response body, with the particular reason as code."""
        return {"error": {"message": str(self), "type": self.type, "code": self.reason}}


def place_of(error: BaseException) -> str:
    """Where an error was raised, innermost, as file and line: for logs, as its text could hold what a user sent."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown place"
