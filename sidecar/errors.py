"""The error tree. Each error has a reason code and, if clients see it, an HTTP status.

Messages contain no stack trace, no address, and no user content.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import ClassVar, Final


class SidecarError(Exception):
    """Base of all errors that the sidecar raises on purpose."""

    code: ClassVar[str] = "sidecar_error"


class UsageError(SidecarError):
    """A setting is unknown or invalid; ends the process with exit code 2 and this one line, which says what to do."""


class StartError(SidecarError):
    """Startup failed; ends the process with exit code 1 and this one line."""


# OpenAI's `type` of an error, by status; a client's own mistake has another.
_TYPES: Final = {429: "rate_limit_error", 500: "server_error", 502: "server_error", 503: "server_error"}


class RequestError(SidecarError):
    """Ends one request: the client receives `status` and `body()`. `retry_after` is in seconds."""

    status: ClassVar[int]
    type: str
    retry_after: float | None

    def __init_subclass__(cls, code: str, status: int = 400, retry_after: float | None = None) -> None:
        cls.code, cls.status, cls.retry_after = code, status, retry_after
        cls.type = _TYPES.get(status, "invalid_request_error")

    def body(self) -> dict[str, dict[str, str]]:
        """The response body, in OpenAI's error shape."""
        return {"error": {"message": str(self), "type": self.type, "code": self.code}}


class BodyTooLarge(RequestError, code="body_too_large", status=413):
    """The request body is over --max-body-bytes."""


class BodiesFull(RequestError, code="bodies_full", status=429, retry_after=1):
    """The request bodies under way fill the memory that the sidecar may use for them."""


class Malformed(RequestError, code="malformed_request"):
    """The bytes are no HTTP/1.0 or 1.1 request, or one that could be read in two ways; the connection ends."""


class HeadTooLarge(RequestError, code="head_too_large", status=431):
    """The request line and the header fields are longer than 128 KiB together."""


class TooSlow(RequestError, code="request_timeout", status=408):
    """The client did not send the rest of its request in time."""


class EngineUnreachable(RequestError, code="engine_unreachable", status=502, retry_after=2):
    """The engine refused the connection, or closed it before it responded."""


class NoOpenFiles(RequestError, code="no_open_files", status=503, retry_after=1):
    """The sidecar has no file descriptors left for a connection to the engine."""


class NoLocalPorts(RequestError, code="no_local_ports", status=503, retry_after=1):
    """The sidecar's machine has no local ports left for a connection to the engine."""


class EngineStalled(RequestError, code="engine_stalled", status=503, retry_after=10):
    """The engine stalled while this request was waiting."""


class StreamStuck(RequestError, code="stream_stuck", status=503, retry_after=1):
    """The engine stopped working on this request only."""


class PromptTooLarge(RequestError, code="prompt_exceeds_kv_cache"):
    """The prompt can never fit into the engine's KV cache, and would block its queue forever."""


class QueueFull(RequestError, code="queue_full", status=429, retry_after=1):
    """The queue for the engine's capacity (--max-concurrent) is full."""


class TenantLimited(RequestError, code="rate_limit_exceeded", status=429):
    """The tenant is over its --tenant-limits. OpenAI's `type`: "tokens" for the rate, "requests" for work in flight."""

    def __init__(self, message: str, retry_after: float, type: str) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.type = type


class Draining(RequestError, code="draining", status=503, retry_after=1):
    """The sidecar is shutting down and accepts no new requests."""


class DrainCut(RequestError, code="drain_cut", status=503, retry_after=1):
    """The sidecar shut down before the answer was complete; a stream ends with this as its last event."""


class ImagesBusy(RequestError, code="images_busy", status=503, retry_after=1):
    """All image workers are busy and their queue is full. `why` is why an image of a request passes for it."""

    def __init__(self, message: str, why: str = "workers_busy") -> None:
        super().__init__(message)
        self.why = why


class ImagesOff(RequestError, code="images_off", status=404):
    """An image endpoint was called while images are off."""


class BadTarget(RequestError, code="bad_request_target"):
    """The request target is not a path that may be forwarded to the engine."""


class AdminPathRefused(RequestError, code="admin_path_refused", status=403):
    """A path that controls the engine was requested from another machine (--admin-paths refuse)."""


class Internal(RequestError, code="internal_error", status=500):
    """A bug in the sidecar. It costs one request."""


class BadImage(RequestError, code="image_invalid"):
    """An image part is broken, not an image, or over a limit. `reason` is one of the image reason codes."""

    def __init__(self, message: str, reason: str = "image_invalid") -> None:
        super().__init__(message)
        self.reason = reason

    def body(self) -> dict[str, dict[str, str]]:
        """The response body, with the particular reason as code."""
        return {"error": {"message": str(self), "type": self.type, "code": self.reason}}


class NotRendered(RequestError, code="not_rendered", status=501):
    """A prompt that cannot be rendered here exactly as the engine would; its own /render can."""


class PromptRejected(RequestError, code="prompt_rejected"):
    """A request to render that the engine would refuse, too."""


class RenderBusy(RequestError, code="render_busy", status=503, retry_after=1):
    """All render workers are busy and their queue is full."""


def place_of(error: BaseException) -> str:
    """Where an error was raised, innermost, as file and line: for logs, as its text could hold what a user sent."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown place"
