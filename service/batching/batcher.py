"""Dynamic batching for a blocking function of a list. Standard library; it knows no item's type.

    submit -> waiting tickets -> worker is free -> form a batch -> run -> then -> settle tickets

The worker is taken before the batch is formed, so a batch keeps filling while the worker is busy:
batches grow under load, and an idle service answers at once. A batch that is not full lingers for
items that are on their way; without this, several callers in a loop are answered in turn, a few at
a time, and each few cost a whole pass of the model.

With a second stage, `then`, the next batch runs meanwhile. Where no next batch waits, both stages
run in one thread, which saves a change of thread. No future is left pending, whatever `run` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from service.batching.tickets import Answer, BatcherClosed, BatcherError, DeadlinePassed, QueueFull, Ticket
from service.batching.workers import WorkerThread, run_isolated

__all__ = ["Answer", "Batcher", "BatcherClosed", "BatcherError", "DeadlinePassed", "QueueFull", "Ticket"]
LINGER_FRACTION = 0.1  # of the last batch's time: the longest wait for items on their way
MAX_LINGER_S = 0.2  # and its upper bound, since the last batch may have hung or been run in halves

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class _Final:
    """The outcome of an item that has been through both stages in the first thread."""

    outcome: Any


class Batcher(Generic[T, R]):
    """Group the items of many callers into calls of `run`, first come first served.

    run: blocking; one result per payload, in order. An Exception in the place of a payload is the
    error of that item; a raised one is narrowed down by running halves of the batch again.
    then: the second stage, likewise, on the results of `run`, in a thread of its own where items
    wait. At most one batch is in it, and the next batch keeps the worker until it is free.
    stall_s: seconds of one batch in either stage, after which its items get WorkerLost and the
    thread is replaced.  initialize, initialize_then: called once in each thread of a stage.
    max_queue: items that may wait; those being worked on do not count.  max_batch: items of a
    batch; it may change while serving.  on_batch: called with the size of each batch, on the event
    loop.

    State, changed on the event loop only: the waiting tickets in order, which stages are free,
    whether it is closing; how many items are announced; of the last batch, when it left the worker,
    how long it took, and how many of its callers have not come back.
    """

    def __init__(
        self,
        run: Callable[[list[T]], Sequence[Any]],
        *,
        name: str,
        max_batch: int,
        max_queue: int,
        then: Callable[[list[Any]], Sequence[R]] | None = None,
        stall_s: float = 120.0,
        initialize: Callable[[], None] | None = None,
        initialize_then: Callable[[], None] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        if min(max_batch, max_queue) < 1 or stall_s <= 0:
            raise ValueError(f"batcher {name}: max_batch, max_queue and stall_s must be positive")
        self.name, self.max_batch, self.max_queue = name, max_batch, max_queue
        self._run, self._then, self._on_batch = run, then, on_batch
        self._worker: WorkerThread[Ticket[T, R], Any] = WorkerThread(
            self._run_batch, name=name, stall_s=stall_s, initialize=initialize
        )
        self._then_worker: WorkerThread[Any, R] | None = None
        if then is not None:
            self._then_worker = WorkerThread(
                partial(run_isolated, then), name=f"{name}-then", stall_s=stall_s, initialize=initialize_then
            )
        self._worker_free, self._then_free = asyncio.Semaphore(1), asyncio.Semaphore(1)
        # ordered, and a caller who leaves is removed in O(1)
        self._waiting: OrderedDict[Ticket[T, R], None] = OrderedDict()
        self._changed = asyncio.Event()  # an item arrived, or closing began
        self._closing = self._serving = False
        self._ended = asyncio.Event()
        self._announced = 0
        self._last_end, self._last_s, self._callers_away = 0.0, 0.0, 0

    @property
    def depth(self) -> int:
        """Items that wait for a batch."""
        return len(self._waiting)

    @property
    def lost(self) -> bool:
        """Whether a thread was given up and its replacement has not finished a batch yet."""
        return self._worker.lost or (self._then_worker is not None and self._then_worker.lost)

    async def submit(self, payloads: Sequence[T], deadline: float | None = None) -> list[Answer[R] | Exception]:
        """Return the answer of every payload, in order; a failed item has its exception.

        deadline: a `time.monotonic()` instant.  All items are admitted or none: raises QueueFull,
        BatcherClosed.  Cancelling this call withdraws the items that still wait.
        """
        tickets = self._admit(payloads, deadline)
        timer = None
        if deadline is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(max(0.0, deadline - time.monotonic()), self._expire, tickets)
        try:
            return await asyncio.gather(*(ticket.reply for ticket in tickets))
        finally:
            if timer is not None:
                timer.cancel()
            for ticket in tickets:
                self._waiting.pop(ticket, None)

    @contextlib.contextmanager
    def expecting(self, items: int) -> Iterator[None]:
        """Announce items that are being prepared; a batch that is not full may wait for them."""
        self._announced += items
        self._callers_away -= min(self._callers_away, items)
        try:
            yield
        finally:
            self._announced -= items
            self._changed.set()

    async def serve(self) -> None:
        """Form and run batches until closed."""
        self._serving = True
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._worker_free.acquire()
                while batch := await self._next_batch():
                    task = tasks.create_task(self._answer_batch(batch, tasks))
                    # a callback, since the task may be cancelled before it starts
                    task.add_done_callback(partial(self._release, self._worker_free, batch))
                    del batch, task  # they would keep the last batch in memory until the next one
                    await self._worker_free.acquire()
        finally:
            self._end()

    async def close(self) -> None:
        """Refuse new items, answer every admitted one, then end `serve`.

        It takes as long as the work that is left; bound it from outside.
        """
        self._closing = True
        self._changed.set()
        if self._serving:
            await self._ended.wait()
        else:
            self._end()

    def _admit(self, payloads: Sequence[T], deadline: float | None) -> list[Ticket[T, R]]:
        """Queue all payloads. Raises BatcherClosed, QueueFull."""
        if self._closing:
            raise BatcherClosed(f"{self.name} is shutting down and takes no new items: retry elsewhere or later")
        if self.depth + len(payloads) > self.max_queue:
            raise QueueFull(
                f"{self.depth} items wait for {self.name}, {len(payloads)} more would pass the limit of "
                f"{self.max_queue}: retry later"
            )
        loop, now = asyncio.get_running_loop(), time.monotonic()
        tickets: list[Ticket[T, R]] = [Ticket(payload, loop.create_future(), now, deadline) for payload in payloads]
        self._waiting.update((ticket, None) for ticket in tickets)
        self._changed.set()
        return tickets

    def _expire(self, tickets: Sequence[Ticket[T, R]]) -> None:
        """Answer those of `tickets` that still wait with DeadlinePassed."""
        for ticket in tickets:
            if ticket in self._waiting:
                del self._waiting[ticket]
                waited_s = time.monotonic() - ticket.enqueued
                message = f"{self.name} had no free worker within {waited_s:.3f} s: allow more time, or send less"
                ticket.settle(DeadlinePassed(message))

    async def _next_batch(self) -> list[Ticket[T, R]]:
        """Up to max_batch tickets; empty only when closing and nothing waits."""
        while True:
            await self._fill()
            batch = self._pop_batch()
            if batch or self._closing:
                return batch

    async def _fill(self) -> None:
        """Wait for a first ticket, then until the batch is full or has lingered long enough."""
        while not self._closing and self.depth < self.max_batch:
            left_s = None
            if self._waiting:
                left_s = self._linger_until(next(iter(self._waiting)).enqueued) - time.monotonic()
                if left_s <= 0:
                    return
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._changed.wait()

    def _linger_until(self, first: float) -> float:
        """The instant until which a batch that is not full waits.

        first: when its oldest item came.
        """
        linger_s = min(LINGER_FRACTION * self._last_s, MAX_LINGER_S)
        if self._announced:
            return max(first, self._last_end) + linger_s
        return max(first, self._last_end + linger_s) if self._callers_away else first

    def _pop_batch(self) -> list[Ticket[T, R]]:
        """Remove the next tickets, without those whose caller left or whose deadline has come."""
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

    async def _answer_batch(self, batch: list[Ticket[T, R]], tasks: asyncio.TaskGroup) -> None:
        """Run one batch; settle its tickets, or pass them to the second stage.

        It raises nothing: an exception here would end the whole task group.
        """
        started = time.monotonic()
        try:
            if self._on_batch is not None:
                self._on_batch(len(batch))
        except Exception as error:  # noqa: BLE001  the callers of this batch get it
            outcomes: Sequence[Any] = [error] * len(batch)
        else:
            outcomes = await self._worker.run(batch)
            self._last_end, self._callers_away = time.monotonic(), len(batch)
            self._last_s = self._last_end - started
        pairs = list(zip(batch, outcomes, strict=True))
        unfinished = [pair for pair in pairs if self._needs_then(*pair)]
        handed_on = {ticket for ticket, _ in unfinished}  # asked once: a caller may leave meanwhile
        self._settle([pair for pair in pairs if pair[0] not in handed_on], started)
        if unfinished:
            # the worker is not free yet, so batches do not pile up here
            await self._then_free.acquire()
            task = tasks.create_task(self._answer_then(unfinished, started))
            task.add_done_callback(partial(self._release, self._then_free, [ticket for ticket, _ in unfinished]))

    def _run_batch(self, batch: list[Ticket[T, R]]) -> list[Any]:
        """In the worker's thread: the first stage, and the second too where no item waits."""
        outcomes: list[Any] = run_isolated(self._run, [ticket.payload for ticket in batch])
        unfinished = [i for i, ticket in enumerate(batch) if self._needs_then(ticket, outcomes[i])]
        if self._then is not None and unfinished and not self._waiting:
            final = run_isolated(self._then, [outcomes[i] for i in unfinished])
            for i, outcome in zip(unfinished, final, strict=True):
                outcomes[i] = _Final(outcome)
        return outcomes

    def _needs_then(self, ticket: Ticket[T, R], outcome: object) -> bool:
        """Whether the second stage has work on this item, and a caller still waits for it."""
        return self._then is not None and not isinstance(outcome, Exception | _Final) and not ticket.reply.done()

    async def _answer_then(self, unfinished: Sequence[tuple[Ticket[T, R], Any]], started: float) -> None:
        """Run the second stage of one batch and settle its tickets."""
        assert self._then_worker is not None  # noqa: S101  `_needs_then` is true only with a second stage
        outcomes = await self._then_worker.run([outcome for _, outcome in unfinished])
        self._settle([(ticket, outcome) for (ticket, _), outcome in zip(unfinished, outcomes, strict=True)], started)

    def _settle(self, outcomes: Iterable[tuple[Ticket[T, R], Any]], started: float) -> None:
        for ticket, found in outcomes:
            outcome = found.outcome if isinstance(found, _Final) else found
            ticket.settle(outcome if isinstance(outcome, Exception) else Answer(outcome, started - ticket.enqueued))

    def _release(self, stage: asyncio.Semaphore, batch: Sequence[Ticket[T, R]], task: asyncio.Task[None]) -> None:
        """Free a stage. Where its task did not finish, nothing else will settle the batch."""
        stage.release()
        if task.cancelled() or task.exception() is not None:
            self._abandon(batch)

    def _abandon(self, tickets: Iterable[Ticket[T, R]]) -> None:
        """Answer tickets that a cancelled `serve`, or one that never ran, has left."""
        for ticket in tickets:
            ticket.settle(BatcherClosed(f"{self.name} ended before this item was answered: retry elsewhere or later"))

    def _end(self) -> None:
        self._closing, self._serving = True, False
        self._abandon(self._waiting)
        self._waiting.clear()
        self._worker.close()
        if self._then_worker is not None:
            self._then_worker.close()
        self._ended.set()
