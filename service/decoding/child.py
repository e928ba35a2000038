"""What runs in the children: a fork server, and the decoding processes that it forks.

This module and what it imports stay small, without torch: `service/tests/test_layers.py` checks it.
The fork server ends when its control socket closes, a decoding process with the fork server.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import resource
import signal
import socket
import sys
import warnings

import numpy as np
import pillow_heif
from PIL import AvifImagePlugin

from models.encoder.image_io import open_image, pixels_held_open
from models.errors import BrokenImage, CostlyImage, ImageError
from service.decoding.messages import (
    ANSWER,
    ASKS,
    PIXELS,
    PIXELS_SENT,
    REFUSED,
    REQUEST,
    DecodeJob,
    Order,
    OrderReply,
    pack_refusal,
)

# Memory that one image may add to a process: what parsing takes, copies of the file, and for each
# pixel held; an AVIF of 4:4:4 in 10 bits with transparency takes 26 bytes a pixel.
PARSING_BYTES = 64 * 2**20
COPIES_OF_FILE = 4
BYTES_PER_PIXEL = 32
PR_SET_PDEATHSIG = 1


def serve_forks(control: socket.socket) -> None:
    """Fork and end decoding processes as the service orders, until it closes `control`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a group's signals mean the service, which drains
    children: set[int] = set()
    server = os.getpid()
    gc.freeze()  # so that no collection in a child copies these pages
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 2**16, 2)
        if not message:
            return
        order: Order = json.loads(message)
        if "fork" in order:
            try:
                pid = os.fork()
            except OSError as error:
                reply: OrderReply = {"error": error.strerror or str(error)}
            else:
                if pid == 0:
                    control.close()
                    _run_decoding(server, descriptors, DecodeJob.from_dict(order["fork"]))
                children.add(pid)
                reply = {"pid": pid}
            for descriptor in descriptors:
                os.close(descriptor)
        else:
            reply = {"status": _end(order["end"], children)}
        control.send(json.dumps(reply).encode())


def _end(pid: int, children: set[int]) -> int:
    """Kill a child, unless it has ended, and return how it ended."""
    if pid not in children:
        return -signal.SIGKILL  # of an earlier fork server, and ended with it
    children.remove(pid)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _run_decoding(server: int, descriptors: list[int], job: DecodeJob) -> None:
    """In a forked process: decode until the socket closes, then end the process."""
    code = 1
    try:
        _end_with(server)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff prints a line for each fault it finds
        warnings.simplefilter("ignore")
        connection = socket.socket(fileno=descriptors[0])
        shared = mmap.mmap(descriptors[1], job.pixel_bytes) if len(descriptors) > 1 else None
        DecodingProcess(connection, shared, job).run()
        code = 0
    finally:
        os._exit(code)


def _end_with(server: int) -> None:
    """Have the kernel kill this process as soon as its parent, the fork server, ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:  # it has ended already
        os._exit(1)


class DecodingProcess:
    """Decodes one image after the other, each within its limits of memory and CPU time.

    shared: where the pixels go; None = they are sent.
    """

    def __init__(self, connection: socket.socket, shared: mmap.mmap | None, job: DecodeJob) -> None:
        self._connection, self._job = connection, job
        self._slot = None if shared is None else np.frombuffer(shared, np.uint8)
        # the pool of processes is the parallelism
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
        pillow_heif.options.DECODE_THREADS = 1
        self._statm = os.open("/proc/self/statm", os.O_RDONLY) if sys.platform == "linux" else None
        self._inherited = resource.getrlimit(resource.RLIMIT_AS)

    def run(self) -> None:
        """Answer requests until the socket closes."""
        while head := self._receive(REQUEST.size):
            length, granted = REQUEST.unpack(head)
            self._connection.sendall(self._answer(self._receive(length), granted=bool(granted)))

    def _receive(self, length: int) -> bytes:
        """`length` bytes, or none where the socket closed."""
        parts, missing = [], length
        while missing:
            part = self._connection.recv(missing, socket.MSG_WAITALL)
            if not part:
                return b""
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _answer(self, data: bytes, *, granted: bool) -> bytes:
        # a process over its time is killed by SIGPROF, whatever C code it is in
        signal.setitimer(signal.ITIMER_PROF, self._job.cpu_s)
        try:
            found = self._decode(data, granted=granted)
        except ImageError as error:
            found = error
        except MemoryError:
            found = CostlyImage("the image takes more memory than its size explains: save it again, send that")
        except Exception as error:  # noqa: BLE001  whatever it is, these bytes caused it
            found = BrokenImage(f"the image does not decode ({type(error).__name__}): it is damaged, send it again")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        self._limit_memory(resource.RLIM_INFINITY)
        if isinstance(found, int):
            return ANSWER.pack(ASKS, found)
        if isinstance(found, ImageError):
            refusal = pack_refusal(found)
            return ANSWER.pack(REFUSED, len(refusal)) + refusal
        if self._slot is None:
            return ANSWER.pack(PIXELS_SENT, found.nbytes) + found.tobytes()
        self._slot[:] = found.reshape(-1)
        return ANSWER.pack(PIXELS, found.nbytes)

    def _decode(self, data: bytes, *, granted: bool) -> np.ndarray | int | ImageError:
        """The pixels (3, H, W) uint8, or how many it would have to hold, where that is not
        granted.
        """
        allowed = self._used_memory() + PARSING_BYTES + COPIES_OF_FILE * len(data)
        held = pixels_held_open(data)
        if self._job.free_pixels < held <= self._job.max_pixels and not granted:
            return held
        self._limit_memory(allowed + BYTES_PER_PIXEL * min(held, self._job.max_pixels))
        image = open_image(data, max_pixels=self._job.max_pixels, target_size=self._job.crop.size)
        if image.pixels > self._job.free_pixels and not granted:
            return image.pixels
        self._limit_memory(allowed + BYTES_PER_PIXEL * image.pixels)
        return self._job.crop.pixels(image.decode())

    def _used_memory(self) -> int:
        """Bytes of address space that the process has now (Linux), else 0."""
        return 0 if self._statm is None else int(os.pread(self._statm, 64, 0).split()[0]) * mmap.PAGESIZE

    def _limit_memory(self, limit: int) -> None:
        """Limit the address space to `limit` bytes (Linux), or to less where the service has less.

        Only the soft limit moves: it rises again for the next image, which the hard one could not.
        The hard one stays what the operator set (`ulimit -v`, systemd's LimitAS), infinite or not.
        """
        if self._statm is not None:
            soft, hard = self._inherited
            if soft != resource.RLIM_INFINITY:
                limit = soft if limit == resource.RLIM_INFINITY else min(limit, soft)
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
