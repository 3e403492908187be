"""The error tree. Every error of ours has a reason code and, where a client sees it, an HTTP status.

    SidecarError
    ├── UsageError            exit 2   a setting is wrong; the message is one line that says what to do
    ├── StartError            exit 1   something the start needs is taken or missing (a port, a directory)
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

Messages carry no stack trace, no address, and nothing of a user's content.
"""

from __future__ import annotations

from typing import ClassVar


class SidecarError(Exception):
    """Base of all errors that we raise on purpose."""

    code: ClassVar[str] = "sidecar_error"


class UsageError(SidecarError):
    """A setting is unknown or invalid; ends the process with exit code 2 and this one line."""

    code = "usage"


class StartError(SidecarError):
    """The start cannot go on; ends the process with exit code 1 and this one line."""

    code = "start"


class RequestError(SidecarError):
    """Ends one request. `status` goes to the client with `body()`."""

    code = "request_error"
    status: ClassVar[int] = 400
    type: str = "invalid_request_error"
    retry_after: float | None = None  # seconds

    def body(self) -> dict[str, dict[str, str]]:
        """OpenAI's error shape."""
        return {"error": {"message": str(self), "type": self.type, "code": self.code}}


class BodyTooLarge(RequestError):
    """The request body is over --max-body-bytes."""

    code = "body_too_large"
    status = 413


class EngineUnreachable(RequestError):
    """The engine did not take the connection, or broke it before it answered."""

    code = "engine_unreachable"
    status = 502
    type = "server_error"
    retry_after = 2


class EngineStalled(RequestError):
    """The engine was found stalled while this request was waiting."""

    code = "engine_stalled"
    status = 503
    type = "server_error"
    retry_after = 10


class StreamStuck(RequestError):
    """The engine stopped work on this one request while others went on."""

    code = "stream_stuck"
    status = 503
    type = "server_error"
    retry_after = 1


class PromptTooLarge(RequestError):
    """The prompt can never fit into the engine's KV cache, and would block its queue for ever."""

    code = "prompt_exceeds_kv_cache"


class QueueFull(RequestError):
    """As many requests as may wait for the engine's capacity (--max-concurrent) wait already."""

    code = "queue_full"
    status = 429
    type = "rate_limit_error"
    retry_after = 1


class TenantLimited(RequestError):
    """The tenant has used what --tenant-limits gives it. `type` is OpenAI's: "tokens" for the flow, "requests" for what is in flight."""

    code = "rate_limit_exceeded"
    status = 429

    def __init__(self, message: str, retry_after: float, type: str) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.type = type


class Draining(RequestError):
    """The sidecar is shutting down and takes no new requests."""

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
    """An image endpoint is asked for and images are off."""

    code = "images_off"
    status = 404


class BadTarget(RequestError):
    """The request target is no path that could be asked of the engine."""

    code = "bad_request_target"


class Internal(RequestError):
    """A defect of ours. It costs one request."""

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
        """OpenAI's error shape, with the particular reason as code."""
        return {"error": {"message": str(self), "type": self.type, "code": self.reason}}
