"""The service's end of one decoding process."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import mmap
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

from models.errors import ImageError
from service.decoding.fork_server import ForkServer
from service.decoding.messages import (
    ANSWER,
    ASKS,
    FOLLOWED,
    PIXELS,
    REFUSED,
    REQUEST,
    DecodeJob,
    allowed_numbers,
    unpack_refusal,
)

__all__ = ["ProcessEnded", "Reply", "Worker", "WorkerSeat", "fork_worker"]

log = logging.getLogger("reco")
SOCKET_BYTES = 2**20  # a photo in one write, as far as the system allows


class ProcessEnded(Exception):
    """The decoding process ended, or broke the protocol, before it answered."""


@dataclass(frozen=True, slots=True)
class Reply:
    """pixels: the bytes of (3, H, W) uint8.  asks: pixels that decoding would hold, 0 = it is done.
    refusal: why there are no pixels.
    """

    pixels: bytes
    asks: int
    refusal: ImageError | None


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

    on_free: called as soon as it has answered, before the answer is passed on.
    State: the transport, the answer to the image in it, what may come as one, the bytes of it that
    came, whether the process broke the protocol.
    """

    def __init__(self, seat: WorkerSeat, job: DecodeJob, on_free: Callable[[Worker], None]) -> None:
        self.pid = seat.pid
        self.answer: asyncio.Future[Reply] | None = None  # None = it is free
        self.misled = False
        self._shared, self._on_free = seat.shared, on_free
        self._transport: asyncio.Transport | None = None
        shared = seat.shared is not None
        self._numbers = {granted: allowed_numbers(job, granted=granted, shared=shared) for granted in (False, True)}
        self._allowed = self._numbers[False]
        self._came = bytearray()

    @property
    def alive(self) -> bool:
        """Whether its socket is open, as far as is known."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, data: bytes, *, granted: bool) -> asyncio.Future[Reply]:
        """Send an image; the future gets the answer or ProcessEnded.

        A caller who leaves cancels the future. The process decodes on, until it is ended.
        """
        self.answer = asyncio.get_running_loop().create_future()
        self._allowed = self._numbers[granted]
        if self._transport is None or not self.alive:
            self._fail("it had ended before")
        else:
            self._transport.writelines([REQUEST.pack(len(data), granted), data])
        return self.answer

    def close(self) -> None:
        """Close the socket: the process ends after its image."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = transport  # type: ignore[assignment]
        # uvloop leaves a small write to the end of the round, after the work of all other callers
        self._transport.set_write_buffer_limits(high=0)  # type: ignore[union-attr]

    def data_received(self, data: bytes) -> None:
        """Called by the loop: settle the answer once it is whole."""
        self._came += data
        answer = self.answer
        if answer is None:
            self._break_off("it sent what nobody asked for")
        elif len(self._came) >= ANSWER.size:
            kind, number = ANSWER.unpack_from(self._came)
            missing = ANSWER.size + (number if kind in FOLLOWED else 0) - len(self._came)
            if missing < 0 or number not in self._allowed.get(kind, ()):
                self._break_off("it sent what is no answer")
            elif missing == 0:
                self._settle(answer, kind, number)

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the loop."""
        self._fail("its socket closed")

    def _settle(self, answer: asyncio.Future[Reply], kind: int, number: int) -> None:
        body = bytes(self._came[ANSWER.size :]) if self._shared is None or kind != PIXELS else self._shared[:]
        refusal = unpack_refusal(body) if kind == REFUSED else None
        if kind == REFUSED and refusal is None:
            self._break_off("its refusal cannot be read")
            return
        self._came.clear()
        self.answer = None
        self._on_free(self)
        if not answer.done():
            answer.set_result(Reply(body, number if kind == ASKS else 0, refusal))

    def _break_off(self, why: str) -> None:
        self.misled = True
        self._fail(why)
        self.close()

    def _fail(self, why: str) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(ProcessEnded(f"decoding process {self.pid}: {why}"))
            self.answer.exception()  # a caller who has left does not fetch it
