"""The relay's queue in front of the image workers: wait for a slot, connect, send one job, receive the reply.

Rules: one connection per job (see protocol.py), so a cancelled, late or broken job affects nothing else. Until a worker
has replied WorkerReady, a job is retried; after that, a broken connection means that the image killed its worker. The
number of waiting jobs and every wait are bounded. Tenants share the slots fairly (fair_slots.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from typing import Final

from sidecar.errors import BadImage, ImagesBusy
from sidecar.images import protocol
from sidecar.images.fair_slots import LONG_JOB_S, FairSlots, SlotsFull
from sidecar.images.protocol import (
    Data,
    Frame,
    FrameError,
    ImageDone,
    ImageJob,
    ImageRefused,
    VideoDone,
    VideoJob,
    WorkerReady,
)
from sidecar.images.tensor_budget import Reserve
from sidecar.runtime import cpu_quota
from sidecar.settings import Settings

# A 12-megapixel JPEG takes 49 ms of CPU (benchmarks/images.py): an image that takes this long is hostile or starved.
DEADLINE_S: Final = 10.0
# Images that may wait in one relay process. At 49 ms each, two workers reach the last one within two seconds; with a
# longer queue, clients had better try another replica.
MAX_WAITING: Final = 64
DEADLINE_SLACK_S = 5.0  # added to the worker's own deadline for the transfer of the reply
QUEUE_TIMEOUT_S = 10.0  # shortest wait for a worker: a restarted server takes about 5 s to import its libraries
# Longest wait of an image that the engine can as well prepare itself; while no worker answers, it does not wait.
INLINE_WAIT_S = 1.0
CONNECT_RETRY_S = (0.02, 0.5)  # first and longest pause between connection attempts
JOBS_PER_WORKER = 2  # one in progress and one in the backlog, so that a worker never waits for the relay's event loop


class WorkerQueue:
    """Slots of the image workers behind the Unix socket `socket_path`."""

    def __init__(
        self,
        socket_path: str,
        settings: Settings,
        *,
        deadline: float = DEADLINE_S,
        max_waiting: int = MAX_WAITING,
        long_job: float = LONG_JOB_S,
    ) -> None:
        self.deadline_s = deadline
        self._path = socket_path
        self._queue_timeout_s = max(QUEUE_TIMEOUT_S, deadline)
        workers = settings.image_workers or cpu_quota.quota()
        self._slots = FairSlots(JOBS_PER_WORKER * workers, workers, max_waiting, long_job_s=long_job)
        self._closed = False
        self._search: asyncio.Task[None] | None = None  # for a worker, while none answers

    def close(self) -> None:
        """Accept no more images; jobs in progress end within their deadline."""
        self._closed = True
        if self._search is not None:
            self._search.cancel()

    async def run(
        self,
        job: ImageJob,
        data: Data,
        where: str,
        reserve: Reserve | None = None,
        *,
        tenant: str = "",
        urgent: bool = False,
        file: int = -1,
    ) -> tuple[ImageDone, bytearray]:
        """Run one job of a tenant on a worker. Raises BadImage or ImagesBusy; `where` names the image in them.

        `reserve` is called with the reply's size before it is read. `urgent`: a worker is hardly waited for. `file`: an
        open file for the payload.
        """
        answer, payload = await self._run(job, data, where, reserve, tenant=tenant, urgent=urgent, file=file)
        assert isinstance(answer, ImageDone)
        return answer, payload

    async def run_video(
        self, job: VideoJob, data: Data, where: str, reserve: Reserve, tenant: str = ""
    ) -> tuple[VideoDone, bytearray]:
        """The same for a video."""
        answer, payload = await self._run(job, data, where, reserve, tenant=tenant)
        assert isinstance(answer, VideoDone)
        return answer, payload

    async def _run(
        self,
        job: ImageJob | VideoJob,
        data: Data,
        where: str,
        reserve: Reserve | None,
        *,
        tenant: str,
        urgent: bool = False,
        file: int = -1,
    ) -> tuple[Frame, bytearray]:
        noun = "video" if isinstance(job, VideoJob) else "image"
        if urgent and self._search is not None:
            raise ImagesBusy("no image worker answers", "workers_away")
        async with self._connection(tenant, urgent) as connection:
            sent = time.monotonic()
            try:
                async with asyncio.timeout(self.deadline_s + DEADLINE_SLACK_S):
                    await _send(connection, job, data, file)
                    answer, payload = await _receive(connection, reserve)
            except (OSError, EOFError, FrameError):  # it died without a reply: at its deadline, or because of the image
                if time.monotonic() - sent >= self.deadline_s:
                    text = f"{where}: the {noun} took longer than {self.deadline_s:g} seconds; send a smaller one"
                    raise BadImage(text, "image_deadline") from None
                text = f"{where}: the {noun} could not be decoded; send it in another format"
                raise BadImage(text, "image_failed") from None
        if isinstance(answer, ImageRefused):
            raise BadImage(f"{where}: the {noun} was refused: {answer.message}", answer.reason)
        return answer, payload

    @contextlib.asynccontextmanager
    async def _connection(self, tenant: str, urgent: bool) -> AsyncIterator[socket.socket]:
        """A connection whose worker is ready. Raises ImagesBusy if the queue is full or the wait too long."""
        patience = min(INLINE_WAIT_S, self._queue_timeout_s) if urgent else self._queue_timeout_s
        try:
            if self._closed:
                raise SlotsFull
            async with asyncio.timeout(patience):
                await self._slots.acquire(tenant)
        except SlotsFull:
            raise ImagesBusy("all image workers are busy and their queue is full; try again shortly") from None
        except TimeoutError:
            raise ImagesBusy("no image worker became free in time; try again shortly") from None
        ready = None
        try:
            with await self._connect_worker(patience) as connection:
                ready = time.monotonic()
                yield connection
        finally:
            self._slots.release(tenant, time.monotonic() - ready if ready is not None else None)

    async def _find_worker(self) -> None:
        """Try until a worker answers; the image server is restarted until it does."""
        while True:
            try:
                (await self._connect_worker(self._queue_timeout_s)).close()
            except ImagesBusy:
                continue
            self._search = None
            return

    async def _connect_worker(self, patience: float) -> socket.socket:
        """Connect, with retries while the server restarts, until a worker is ready. Raises ImagesBusy."""
        pause, longest = CONNECT_RETRY_S
        try:
            async with asyncio.timeout(patience):
                while True:
                    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                    connection.setblocking(False)
                    try:
                        await asyncio.get_running_loop().sock_connect(connection, self._path)
                        ready, _ = await _receive(connection)
                        if not isinstance(ready, WorkerReady):
                            raise FrameError("not a worker of this version")
                        return connection
                    except BaseException as e:
                        connection.close()
                        if not isinstance(e, OSError | EOFError | FrameError):
                            raise
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, longest)
        except TimeoutError:
            if self._search is None and not self._closed:
                self._search = asyncio.create_task(self._find_worker())
            raise ImagesBusy("no image worker accepted the image in time; try again shortly", "workers_away") from None


async def _send(connection: socket.socket, job: ImageJob | VideoJob, data: Data, file: int = -1) -> None:
    loop = asyncio.get_running_loop()
    head = protocol.encode_head(job, len(data))
    if file >= 0:  # nothing was sent before, so there is room for it
        head = head[socket.send_fds(connection, [head], [file]) :]
    await loop.sock_sendall(connection, head)
    if data:  # an empty send to a worker that has already replied would raise an error
        await loop.sock_sendall(connection, data)


async def _receive(connection: socket.socket, reserve: Reserve | None = None) -> tuple[Frame, bytearray]:
    """One frame; `reserve` is called before its payload is read. Raises EOFError if cut off, FrameError if invalid."""
    prefix = await _read_exactly(connection, protocol.PREFIX.size)
    header, payload = protocol.decode_prefix(prefix, protocol.MAX_REPLY_BYTES)
    if reserve is not None:
        reserve(payload)
    return protocol.decode_header(await _read_exactly(connection, header)), await _read_exactly(connection, payload)


async def _read_exactly(connection: socket.socket, size: int) -> bytearray:
    loop = asyncio.get_running_loop()
    data = bytearray(size)
    view = memoryview(data)
    while view:
        received = await loop.sock_recv_into(connection, view)
        if not received:
            raise EOFError
        view = view[received:]
    return data
