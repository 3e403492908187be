"""Pure: how a request ends: its outcome, its reason code, and the error for its client."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Final

from sidecar.errors import (
    DrainCut,
    EngineStalled,
    EngineUnreachable,
    NoLocalPorts,
    NoOpenFiles,
    PromptTooLarge,
    RequestError,
    SidecarError,
    StreamStuck,
)
from sidecar.events import Outcome, State
from sidecar.relay.http.engine import CONNECT_TIMEOUT_S, NotConnected, NoTls
from sidecar.runtime import open_files


class ClientGone(SidecarError):
    code = "client_gone"  # it hung up during a write


class ClientStalled(SidecarError):
    code = "client_stalled"  # it has not read for too long


class EngineBroke(SidecarError):
    code = "engine_broke"  # its answer ended early; the client already has part of it


ERROR_IN_ANSWER: Final = "error_in_answer"  # of a 200

# Why no connection could be made, where the engine did not refuse it.
_NOT_CONNECTED: Final[tuple[tuple[type[BaseException], str], ...]] = (
    (socket.gaierror, "the engine's host name cannot be resolved; the sidecar's log says more"),
    (PermissionError, "the sidecar may not connect to the engine; the sidecar's log says more"),
    (TimeoutError, f"the engine took no connection within {CONNECT_TIMEOUT_S:g} s; its host may not be reachable"),
)
# The first match counts; any other error means "lost".
_OUTCOMES: Final[tuple[tuple[tuple[type[BaseException], ...], Outcome], ...]] = (
    ((DrainCut,), "lost"),
    ((EngineUnreachable, EngineBroke), "engine_error"),
    ((EngineStalled, StreamStuck), "stalled"),
    ((RequestError,), "rejected"),
    ((ClientGone, ClientStalled, asyncio.CancelledError), "client_cancelled"),
)


def outcome_of(error: BaseException | None, status: int, verdict: State, *, failed: bool = False) -> Outcome:
    """The outcome of a request that ended with `error`, or else by the engine's `status`.

    `failed`: the answer itself reported an engine failure. If the client then leaves, the failure is the cause.
    """
    if error is None:
        # a redirection is no answer: the client is to ask elsewhere
        outcome: Outcome = "engine_error" if status >= 500 else "rejected" if status >= 300 else "ok"
    else:
        outcome = next((outcome for kinds, outcome in _OUTCOMES if isinstance(error, kinds)), "lost")
    if failed and outcome in ("ok", "client_cancelled"):
        return "engine_error"
    return "stalled" if outcome == "engine_error" and error is not None and verdict == "stalled" else outcome


def reason_of(error: BaseException | None, status: int, *, failed: bool = False) -> str:
    """A reason code, never free text."""
    if failed and isinstance(error, asyncio.CancelledError | ClientGone | None):
        return ERROR_IN_ANSWER
    if error is None:
        return f"status_{status}" if status >= 300 else ""
    if isinstance(error, asyncio.CancelledError):
        return ClientGone.code
    return str(getattr(error, "reason", error.code)) if isinstance(error, SidecarError) else "internal"


def cut() -> DrainCut:
    """The error of what is open when a drain runs out of time."""
    return DrainCut("this server shut down before the answer was complete; send the request again")


def stalled() -> EngineStalled:
    """The error of every request when the whole engine hangs."""
    return EngineStalled("the engine made no progress and was given up; send the request again")


def engine_error(error: BaseException | None, verdict: State) -> RequestError:
    """The error for a client that has nothing of its answer yet, when the connection to the engine broke."""
    if error is not None and open_files.is_exhausted(error):
        return NoOpenFiles(open_files.EXHAUSTED_TEXT)
    if verdict == "stalled" and not isinstance(error, NotConnected):
        return stalled()
    if isinstance(error, NoTls):
        return EngineUnreachable("the engine cannot be reached over TLS; the sidecar's log says why")
    if isinstance(error, NotConnected):
        return _not_connected(error.__cause__)
    return EngineUnreachable("the engine closed the connection before it answered")


def _not_connected(cause: BaseException | None) -> RequestError:
    """The error where no connection to the engine could be made."""
    if isinstance(cause, OSError) and cause.errno == errno.EADDRNOTAVAIL:
        return NoLocalPorts("the sidecar has no local ports left for connections to the engine; send the request again")
    why = next((text for kind, text in _NOT_CONNECTED if isinstance(cause, kind)), "")
    return EngineUnreachable(why or "the engine does not accept connections; it may be starting or restarting")


def abort_error(code: str) -> RequestError:
    """The error of a single request that the control process aborts."""
    if code == StreamStuck.code:
        return StreamStuck("the engine stopped work on this request while it went on with others; send it again")
    if code == PromptTooLarge.code:
        return PromptTooLarge("the prompt is larger than the engine's KV cache, so it can never run; shorten it")
    return stalled()
