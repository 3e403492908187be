"""The one worker that owns a GPU: decodes on the CPU, resizes there in batches of equal sizes. Not exact.

Rules: CUDA is initialised in this process only, never in the fork server. torchvision resizes uint8 on CUDA through floats,
which rounds up to 6 grey levels away from the processor's result on the CPU: every answer says so (Ready.exact is false).
A batch is what waits at the door, never waited for. A job that fails to decode is answered alone; the others go on. The
deadline is the batch's: the sum of what its jobs may take is never needed, since decoding is what takes time.
"""

from __future__ import annotations

import contextlib
import socket
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Final

import torch

from sidecar.imaging import work
from sidecar.imaging.decode import BadPixels
from sidecar.imaging.patches import by_torchvision
from sidecar.imaging.worker import JOBS_PER_LIFE, PATIENCE, deadline, payload_bound, receive
from sidecar.jobs import LAYOUT, FrameError, Job, Limits, Ready, Refused, head
from sidecar.kernels import families
from sidecar.kernels.grid import ProcessorSpec

BATCH: Final = 8


@dataclass(slots=True)
class Ticket:
    """One job of a batch, on its way to an answer."""

    connection: socket.socket
    job: Job
    payload: bytearray
    picture: work.Picture | None = None
    answer: work.Answer | None = None


def visible() -> bool:
    """Whether this process can use a CUDA device. Initialises CUDA."""
    return bool(torch.cuda.is_available())


def serve(listening: socket.socket, limits: Limits, memory_budget: int) -> int:
    """Take batches until the process has done its share. Returns 0."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory_budget / total))
    done = 0
    while done < JOBS_PER_LIFE:
        with contextlib.ExitStack() as open_connections:
            tickets = _take(listening, limits, open_connections)
            done += len(tickets)
            if tickets:
                with deadline(max(t.job.seconds for t in tickets)):
                    _answer(tickets)
            for ticket in tickets:
                _send(ticket)
    return 0


def _take(listening: socket.socket, limits: Limits, open_connections: contextlib.ExitStack) -> list[Ticket]:
    """Wait for one connection, then take those that are there already, at most BATCH."""
    tickets: list[Ticket] = []
    listening.settimeout(None)
    while len(tickets) < BATCH:
        try:
            connection, _ = listening.accept()
        except BlockingIOError:
            break
        listening.settimeout(0)
        open_connections.enter_context(connection)
        connection.settimeout(PATIENCE)
        with contextlib.suppress(OSError, FrameError):
            connection.sendall(head(Ready(exact=False)))
            tickets.append(Ticket(connection, *receive(connection, payload_bound(limits))))
    return tickets


def _answer(tickets: list[Ticket]) -> None:
    """Decode each, resize those of equal sizes together, encode each."""
    batches: defaultdict[Any, list[Ticket]] = defaultdict(list)
    for ticket in tickets:
        _open(ticket)
        if ticket.picture is not None:
            batches[ticket.job.spec, ticket.picture.pixels.shape].append(ticket)
    for (spec, _), batch in batches.items():
        _resize(batch, families.from_json(spec))


def _open(ticket: Ticket) -> None:
    try:
        opened = work.open_picture(ticket.job, ticket.payload, families.from_json(ticket.job.spec))
    except BadPixels as e:
        ticket.answer = (Refused(e.reason, str(e)), b"")
        return
    if isinstance(opened, work.Picture) and ticket.job.want != LAYOUT:
        ticket.picture = opened
    else:
        ticket.answer = (opened if not isinstance(opened, work.Picture) else work.done(opened, ""), b"")


def _resize(batch: list[Ticket], spec: ProcessorSpec) -> None:
    pictures = [ticket.picture for ticket in batch if ticket.picture is not None]
    try:
        stacked = torch.stack([p.pixels.contiguous() for p in pictures]).cuda()
        resized = by_torchvision(stacked, pictures[0].geometry, spec).cpu()
    except torch.cuda.OutOfMemoryError:
        # the budget is full: these images are resized where they are
        resized = [by_torchvision(p.pixels, p.geometry, spec) for p in pictures]
    for ticket, picture, pixels in zip(batch, pictures, resized, strict=True):
        picture.stages.end("resize")
        ticket.answer = work.finish(ticket.job, picture, pixels, spec)


def _send(ticket: Ticket) -> None:
    assert ticket.answer is not None
    record, payload = ticket.answer
    with contextlib.suppress(OSError):
        ticket.connection.sendall(head(record, len(payload)))
        ticket.connection.sendall(payload)
