"""Decoding of images: untrusted bytes to pixels, in a pool of processes that can be killed.

An image that cannot be decoded is refused here and never enters a batch.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Coroutine, Hashable
from typing import Any

import numpy as np

from models.errors import BrokenImage, CostlyImage
from service.batching.batcher import DeadlinePassed
from service.batching.executors import IdleThreads
from service.batching.turns import PixelBudget, Turns
from service.batching.workers import WorkerLost
from service.decoding.fork_server import ForkServer
from service.decoding.messages import DecodeJob
from service.decoding.worker import ProcessEnded, Reply, Worker, fork_worker
from service.errors import NotServing
from service.observability.metrics import Metrics

__all__ = ["Decoder"]

log = logging.getLogger("reco")
START_S = 10.0
GRACE_S = 0.1  # for an image that nobody waits for any more, before its process is killed
RETRY_S = 0.5  # between two attempts to replace a process
PROTOCOL = "protocol"  # why a process was replaced that sent what is no answer
FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)


class Decoder:
    """A bounded pool of decoding processes.

    workers: how many images are decoded at a time, whatever the number of callers.
    pixels: of all large images being decoded; large are those beyond `job.free_pixels`, and one
    process stays free of them.
    fork_server: started with the first process, unless it was started before.

    State, changed on the event loop only: the processes, those that are idle, whose turn it is,
    pixels held, deadlines of the images inside, processes being replaced, why one cannot be,
    whether it is closed.
    """

    def __init__(self, job: DecodeJob, *, workers: int, pixels: int, metrics: Metrics, fork_server: ForkServer) -> None:
        self._job, self._count, self._metrics, self._fork_server = job, workers, metrics, fork_server
        self._workers: set[Worker] = set()
        self._idle: list[Worker] = []
        self._turns = Turns()
        self._budget = PixelBudget(max(pixels, job.max_pixels), max(1, workers - 1))
        self._orders = IdleThreads(2, "decode-orders")
        self._inside: set[asyncio.Timeout] = set()
        self._recovering: set[asyncio.Task[str]] = set()
        self._problem: str | None = None
        self._closed = False

    async def start(self) -> None:
        """Fork the processes; where the system refuses, it is tried again in the background."""
        await asyncio.wait([self._renew() for _ in range(self._count)], timeout=START_S)

    async def decode(self, data: bytes, deadline: float, caller: Hashable) -> np.ndarray:
        """Return the encoder's input of one encoded image: (3, H, W) uint8.

        deadline: a `time.monotonic()` instant, at which the process is killed if it has begun.
        caller: the request of the image; requests take turns.
        Raises ImageError (UnsupportedImage, ImageTooLarge, CostlyImage, BrokenImage), WorkerLost
        where the process was killed from outside, DeadlinePassed, NotServing once closed.
        """
        left_s = deadline - time.monotonic()
        if self._closed:
            raise _not_serving()
        try:
            if left_s <= 0:
                raise TimeoutError
            async with asyncio.timeout(left_s) as limit:
                self._inside.add(limit)
                try:
                    reply = await self._ask(data, caller, granted=False)
                    if reply.asks:
                        async with self._budget.reserve(reply.asks):
                            reply = await self._ask(data, caller, granted=True)
                finally:
                    self._inside.discard(limit)
        except TimeoutError as error:
            if self._closed:
                raise _not_serving() from error
            raise DeadlinePassed(
                "the image was not decoded before its deadline: allow more time, or send less"
            ) from error
        if reply.refusal is not None:
            raise reply.refusal
        return np.frombuffer(reply.pixels, np.uint8).reshape(3, *self._job.crop.size)

    def not_live(self) -> str | None:
        """None, or why no image is decoded at the moment."""
        return self._problem if len(self._recovering) >= self._count else None

    def refresh_gauges(self) -> None:
        """Set the gauges of the pool."""
        metrics, idle = self._metrics, len(self._idle)
        replaced = min(len(self._recovering), self._count - idle)
        metrics.decoder_queue_depth.set(self._turns.depth)
        metrics.decoder_pixels.set(self._budget.held)
        for state, count in (("idle", idle), ("replaced", replaced), ("busy", self._count - idle - replaced)):
            metrics.decoder_workers.labels(state).set(count)

    async def close(self) -> None:
        """Take no more images, refuse those inside with NotServing, and end the processes."""
        self._closed = True
        now = asyncio.get_running_loop().time()
        for limit in self._inside:
            if not limit.expired():
                limit.reschedule(now)
        recovering = list(self._recovering)
        for task in recovering:
            task.cancel()
        await asyncio.gather(*recovering, return_exceptions=True)
        self._orders.close()
        for worker in list(self._workers):
            worker.close()
            await asyncio.to_thread(self._fork_server.end, worker.pid)

    async def _ask(self, data: bytes, caller: Hashable, *, granted: bool) -> Reply:
        """Send an image to a process once it is the caller's turn, and wait for the answer."""
        worker = await self._take_worker(caller)
        answer = worker.send(data, granted=granted)
        try:
            return await answer
        except asyncio.CancelledError:
            if worker.answer is answer and not self._closed:
                self._recover(worker, answer)
            raise
        except ProcessEnded as error:
            if self._closed:
                raise _not_serving() from error
            raise self._error_of(await asyncio.shield(self._recover(worker, answer))) from error

    async def _take_worker(self, caller: Hashable) -> Worker:
        """An idle process, once it is the caller's turn."""
        while True:
            await self._turns.take(caller)
            worker = self._idle.pop()
            if worker.alive:
                return worker
            self._recover(worker, None)  # it was ended while it was idle

    def _error_of(self, cause: str) -> Exception:
        """The error of the image in whose process `cause` happened."""
        if cause == PROTOCOL:
            return BrokenImage("the image misled its decoder: it is damaged, send it again")
        if cause == signal.SIGPROF.name:
            return CostlyImage(f"decoding takes more than {self._job.cpu_s:g} s of CPU: save the image again")
        if cause in {fault.name for fault in FAULTS}:
            return BrokenImage(f"the image ended its decoder ({cause}): it is damaged, send it again")
        return WorkerLost(f"the process that decoded the image was ended from outside ({cause}): retry")

    def _recover(self, worker: Worker, answer: asyncio.Future[Reply] | None) -> asyncio.Task[str]:
        """Get the place of a process back, in the background; the task returns how it ended."""
        return self._run_aside(self._replace(worker, answer))

    async def _replace(self, worker: Worker, answer: asyncio.Future[Reply] | None) -> str:
        """answer: to the image in it, whose caller may have left; it has GRACE_S to come."""
        unwanted = False
        if answer is not None and answer.cancelled():
            await asyncio.sleep(GRACE_S)
            if worker.answer is not answer:
                return "answered"
            unwanted = worker.alive
        worker.close()
        self._workers.discard(worker)
        status = await self._orders.run(self._fork_server.end, worker.pid)
        cause = PROTOCOL if worker.misled else "unwanted" if unwanted else _name_of(status)
        self._metrics.decoder_replaced_total.labels(cause).inc()
        log.warning("decoding process %d was replaced: %s", worker.pid, cause)
        self._renew()
        return cause

    def _renew(self) -> asyncio.Task[str]:
        """Put a new process in an empty place, in the background."""
        return self._run_aside(self._fill_place())

    def _run_aside(self, work: Coroutine[Any, Any, str]) -> asyncio.Task[str]:
        task = asyncio.create_task(work)
        self._recovering.add(task)
        task.add_done_callback(self._recovering.discard)
        return task

    async def _fill_place(self) -> str:
        while not self._closed:
            try:
                worker = await self._fork()
            except (OSError, RuntimeError) as error:
                self._problem = f"no process to decode images can be started: {error}"
                log.error("%s; it is tried again", self._problem)
                await asyncio.sleep(RETRY_S)
            else:
                self._problem = None
                self._seat(worker)
                break
        return "replaced"

    async def _fork(self) -> Worker:
        seat = await self._orders.run(fork_worker, self._fork_server, self._job)
        worker = Worker(seat, self._job, on_free=self._seat)
        await asyncio.get_running_loop().create_unix_connection(lambda: worker, sock=seat.connection)
        self._workers.add(worker)
        return worker

    def _seat(self, worker: Worker) -> None:
        """Make a process that is free known to those who wait."""
        self._idle.append(worker)
        self._turns.give()


def _not_serving() -> NotServing:
    return NotServing("the service is shutting down and decodes no more images: retry elsewhere or later")


def _name_of(status: int) -> str:
    """SIGSEGV for -11, signal 40 for -40, exit 1 for 1."""
    if status >= 0:
        return f"exit {status}"
    return signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
