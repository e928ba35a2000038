"""The service's end of one decoding process."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import mmap
import os
import socket
import sys
from dataclasses import dataclass

from service.decoding.fork_server import ForkServer
from service.decoding.messages import ANSWER, ASKS, PIXELS, PIXELS_SENT, REFUSED, REQUEST, DecodeJob

__all__ = ["ProcessEnded", "Reply", "Worker", "WorkerSeat", "fork_worker"]

log = logging.getLogger("reco")
SOCKET_BYTES = 2**20  # a photo in one write, as far as the system allows


class ProcessEnded(Exception):
    """The decoding process ended, or broke the protocol, before it answered."""


@dataclass(frozen=True, slots=True)
class Reply:
    """kind, number: of `messages`.  data: pixels, or the bytes of a refusal."""

    kind: int
    number: int
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class WorkerSeat:
    """A forked process before the event loop has taken it. shared: its pixels, None = sent."""

    pid: int
    connection: socket.socket
    shared: mmap.mmap | None


def fork_worker(fork_server: ForkServer, job: DecodeJob) -> WorkerSeat:
    """Fork a decoding process; blocks for a millisecond. Raises ForkFailed, OSError."""
    ours, theirs = socket.socketpair()
    memory = None
    try:
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        memory = _create_memory(job.pixel_bytes)
        descriptors = [theirs.fileno()] if memory is None else [theirs.fileno(), memory]
        shared = None if memory is None else mmap.mmap(memory, job.pixel_bytes, prot=mmap.PROT_READ)
        pid = fork_server.fork(job, descriptors)
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
        if memory is not None:
            os.close(memory)
    ours.setblocking(False)
    return WorkerSeat(pid, ours, shared)


def _create_memory(size: int) -> int | None:
    """A descriptor of shared memory of that size, None where there is none: pixels are then sent.

    The memory is taken at once: of pages that are missing later, the first write would end the
    process. It cannot be resized, so that a process taken over cannot pull it from under us.
    """
    if sys.platform != "linux":
        return None
    try:
        memory = os.memfd_create("reco-pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        log.warning("no shared memory for decoded pixels (%s): they are sent through a socket", error.strerror)
        return None
    try:
        os.posix_fallocate(memory, 0, size)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(memory)
        log.warning("%d bytes of shared memory are not to be had (%s): pixels are sent", size, error.strerror)
        return None
    return memory


class Worker(asyncio.Protocol):
    """One decoding process, with at most one image in it. Used on the event loop only.

    State: the transport, the answer being waited for, the bytes of it that came.
    """

    def __init__(self, seat: WorkerSeat, pixel_bytes: int) -> None:
        self.pid = seat.pid
        self._shared, self._pixel_bytes = seat.shared, pixel_bytes
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Reply] | None = None
        self._came = bytearray()

    @property
    def alive(self) -> bool:
        """Whether its socket is open, as far as is known."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, data: bytes, *, granted: bool) -> asyncio.Future[Reply]:
        """Send an image; the future gets the answer or ProcessEnded. Shield it, never cancel it."""
        self._answer = asyncio.get_running_loop().create_future()
        if self._transport is None or not self.alive:
            self._fail("it had ended before")
        else:
            self._transport.writelines([REQUEST.pack(len(data), granted), data])
        return self._answer

    def close(self) -> None:
        """Close the socket: the process ends after its image."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Called by the loop: settle the answer once it is whole."""
        self._came += data
        if len(self._came) < ANSWER.size:
            return
        kind, number = ANSWER.unpack_from(self._came)
        follows = number if kind in (PIXELS_SENT, REFUSED) else 0
        pixels = kind in (PIXELS, PIXELS_SENT)
        wrong = (pixels and number != self._pixel_bytes) or (kind == REFUSED and number > 2**16)
        if wrong or kind not in (PIXELS, PIXELS_SENT, REFUSED, ASKS) or len(self._came) > ANSWER.size + follows:
            self._fail("it sent what is no answer")
            self.close()
        elif len(self._came) == ANSWER.size + follows:
            body = bytes(self._came[ANSWER.size :])
            if kind == PIXELS:
                body = b"" if self._shared is None else self._shared[:]
            self._came.clear()
            if self._answer is not None and not self._answer.done():
                self._answer.set_result(Reply(kind, number, body))

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the loop."""
        self._fail("its socket closed")

    def _fail(self, why: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ProcessEnded(f"decoding process {self.pid}: {why}"))
            self._answer.exception()  # a caller who has left does not fetch it
