"""Dynamic batching for any blocking function of a list: standard library alone, nothing in here knows what an item is.

    submit -> [waiting tickets] -> a worker slot frees -> batch formed -> run in the batcher's own thread -> each ticket settled

A slot is taken first and the batch is formed after, so a batch keeps filling while every worker is busy: under load batches
grow by themselves, and an idle service answers at once. No future is ever left pending, whatever `run` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

__all__ = ["Answer", "Batcher", "BatcherClosed", "BatcherError", "DeadlinePassed", "QueueFull", "Ticket"]

T = TypeVar("T")
R = TypeVar("R")


class BatcherError(Exception):
    """What a batcher itself says, as opposed to what `run` raised.

    BatcherError
     ├── QueueFull        at the door: the items would not fit behind those that wait
     ├── DeadlinePassed   of one item: no worker was free before its deadline
     └── BatcherClosed    at the door once closing, or of an item cut off by an abrupt end
    """


class QueueFull(BatcherError):
    """The request was refused whole because its items would exceed `max_queue`."""


class DeadlinePassed(BatcherError):
    """The item's deadline came before its work started; a started batch is always finished."""


class BatcherClosed(BatcherError):
    """The batcher is closing or has ended, and takes nothing more."""


@dataclass(frozen=True, slots=True)
class Answer(Generic[R]):
    """One item's result. queued_s: seconds between admission and the start of its batch."""

    result: R
    queued_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Ticket(Generic[T, R]):
    """One admitted item. enqueued, deadline: `time.monotonic()` seconds.  reply: failures are its *result*, never its exception."""

    payload: T
    reply: asyncio.Future[Answer[R] | Exception]
    enqueued: float
    deadline: float | None

    def settle(self, outcome: Answer[R] | Exception) -> None:
        """Answer the caller, unless it has left or has its answer."""
        if not self.reply.done():
            self.reply.set_result(outcome)

    def expired(self, now: float) -> bool:
        """Whether the deadline has come."""
        return self.deadline is not None and self.deadline <= now


class Batcher(Generic[T, R]):
    """Groups the items of many callers into calls of `run`, first come first served.

    run: blocking, one result per payload in the payloads' order; an Exception returned in a payload's place is that item's error, one
    raised is narrowed down to the guilty items by running halves of the batch again.  With `workers` > 1 it is called from several threads.
    max_queue: items that may wait, not counting those being worked on.  max_wait_s: how long the oldest item of an unfilled batch waits
    for company although a worker is free; it and max_batch may change while serving.  on_batch: told each batch's size, on the event loop.

    State: the waiting tickets in order, the free slots, and whether it is closing. All of it is touched on the event loop only.
    """

    def __init__(
        self,
        run: Callable[[list[T]], Sequence[R]],
        *,
        name: str,
        max_batch: int,
        max_queue: int,
        max_wait_s: float = 0.0,
        workers: int = 1,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        if min(max_batch, max_queue, workers) < 1 or max_wait_s < 0:
            raise ValueError(f"batcher {name}: max_batch, max_queue and workers must be at least 1, and max_wait_s not negative")
        self.name, self.max_batch, self.max_queue, self.max_wait_s = name, max_batch, max_queue, max_wait_s
        self._run, self._on_batch = run, on_batch
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=f"batcher-{name}")
        self._slots = asyncio.Semaphore(workers)
        self._waiting: OrderedDict[Ticket[T, R], None] = OrderedDict()  # ordered, and a caller who leaves is removed in O(1)
        self._changed = asyncio.Event()  # something arrived, or closing began
        self._closing = self._serving = False
        self._ended = asyncio.Event()

    @property
    def depth(self) -> int:
        """Items that wait for a batch."""
        return len(self._waiting)

    async def submit(self, payloads: Sequence[T], deadline: float | None = None) -> list[Answer[R] | Exception]:
        """Answer every payload, in order; an item that failed has its exception in its place.

        deadline: a `time.monotonic()` instant.  All items are admitted or none: QueueFull, BatcherClosed.  Cancelling this call
        withdraws the items that still wait.
        """
        tickets = self._admit(payloads, deadline)
        loop = asyncio.get_running_loop()
        alarm = None if deadline is None else loop.call_later(max(0.0, deadline - time.monotonic()), self._expire, tickets)
        try:
            return await asyncio.gather(*(ticket.reply for ticket in tickets))
        finally:
            if alarm is not None:
                alarm.cancel()
            for ticket in tickets:
                self._waiting.pop(ticket, None)

    async def serve(self) -> None:
        """Form and run batches until closed; a batch keeps filling while every worker is busy."""
        self._serving = True
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._slots.acquire()
                while batch := await self._next_batch():
                    task = tasks.create_task(self._answer(batch))
                    task.add_done_callback(partial(self._release, batch))  # runs even where the task was cancelled before it started
                    del batch, task  # or the last batch, and the memory its items pin, would live until the next one comes
                    await self._slots.acquire()
        finally:
            self._end()

    async def close(self) -> None:
        """Refuse new items, answer every admitted one, then end `serve`; as slow as the work that is left, so bound it from outside."""
        self._closing = True
        self._changed.set()
        if self._serving:
            await self._ended.wait()
        else:
            self._end()

    def _admit(self, payloads: Sequence[T], deadline: float | None) -> list[Ticket[T, R]]:
        if self._closing:
            raise BatcherClosed(f"{self.name} is shutting down and takes no new items: retry elsewhere or later")
        if self.depth + len(payloads) > self.max_queue:
            raise QueueFull(
                f"{self.depth} items wait for {self.name}, {len(payloads)} more would pass the limit of {self.max_queue}: retry later"
            )
        loop, now = asyncio.get_running_loop(), time.monotonic()
        tickets: list[Ticket[T, R]] = [Ticket(payload, loop.create_future(), now, deadline) for payload in payloads]
        self._waiting.update((ticket, None) for ticket in tickets)
        self._changed.set()
        return tickets

    def _expire(self, tickets: Sequence[Ticket[T, R]]) -> None:
        """Answer those of `tickets` that no batch has taken yet."""
        for ticket in tickets:
            if ticket in self._waiting:
                del self._waiting[ticket]
                waited_s = time.monotonic() - ticket.enqueued
                ticket.settle(DeadlinePassed(f"{self.name} had no free worker within {waited_s:.3f} s: allow more time, or send less"))

    async def _next_batch(self) -> list[Ticket[T, R]]:
        """Up to max_batch tickets worth working on; empty only when closing and nothing waits."""
        while True:
            await self._fill()
            batch = self._take()
            if batch or self._closing:
                return batch

    async def _fill(self) -> None:
        """Wait for a first ticket, then for a full batch, max_wait_s after the first one arrived at the latest."""
        while not self._closing and self.depth < self.max_batch:
            left_s = next(iter(self._waiting)).enqueued + self.max_wait_s - time.monotonic() if self._waiting else None
            if left_s is not None and left_s <= 0:
                return
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._changed.wait()

    def _take(self) -> list[Ticket[T, R]]:
        """Remove the next tickets from the queue, without those whose caller left or whose deadline has come."""
        now = time.monotonic()
        batch: list[Ticket[T, R]] = []
        while self._waiting and len(batch) < self.max_batch:
            ticket = next(iter(self._waiting))
            if ticket.expired(now):
                self._expire([ticket])
                continue
            del self._waiting[ticket]
            if not ticket.reply.done():
                batch.append(ticket)
        return batch

    async def _answer(self, batch: list[Ticket[T, R]]) -> None:
        """Run one batch and settle its tickets; raises nothing, or the whole service would end with it."""
        started = time.monotonic()
        outcomes: Sequence[R | Exception]
        try:
            if self._on_batch is not None:
                self._on_batch(len(batch))
            payloads = [ticket.payload for ticket in batch]
            outcomes = await asyncio.get_running_loop().run_in_executor(self._pool, _isolate, self._run, payloads)
        except Exception as error:  # noqa: BLE001  on_batch or the pool failed: its callers are told, the loop lives
            outcomes = [error] * len(batch)
        for ticket, outcome in zip(batch, outcomes, strict=True):
            ticket.settle(outcome if isinstance(outcome, Exception) else Answer(outcome, started - ticket.enqueued))

    def _release(self, batch: Sequence[Ticket[T, R]], _: asyncio.Task[None]) -> None:
        self._slots.release()
        self._abandon(batch)

    def _abandon(self, tickets: Iterable[Ticket[T, R]]) -> None:
        """Settle what has no answer yet: only a cancelled `serve`, or one that never ran, leaves such tickets."""
        for ticket in tickets:
            ticket.settle(BatcherClosed(f"{self.name} ended before this item was answered: retry elsewhere or later"))

    def _end(self) -> None:
        self._closing, self._serving = True, False
        self._abandon(self._waiting)
        self._waiting.clear()
        self._pool.shutdown(wait=False)
        self._ended.set()


def _isolate(run: Callable[[list[T]], Sequence[R]], payloads: list[T]) -> list[R | Exception]:
    """One outcome per payload: where the whole fails, each half is tried alone, until only the guilty items have the error.

    A guilty item among B costs about 2·log2(B) further runs; an error of every item, the device lost for example, costs 2·B - 2.
    """
    try:
        results = run(payloads)
        if len(results) == len(payloads):
            return list(results)
    except BaseException as error:  # noqa: BLE001  SystemExit and the like would end the event loop if they reached it
        if len(payloads) == 1:
            return [error if isinstance(error, Exception) else RuntimeError(f"the batch raised {error!r}")]
    else:
        return [RuntimeError(f"{len(results)} results came back for {len(payloads)} items") for _ in payloads]
    middle = len(payloads) // 2
    return [*_isolate(run, payloads[:middle]), *_isolate(run, payloads[middle:])]
