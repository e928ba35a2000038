"""Dynamic batching for any blocking function of a list: standard library alone, nothing in here knows what an item is.

    submit -> [waiting tickets] -> a worker slot frees -> batch formed -> run -> [then] -> each ticket settled
                                                                          its own threads

A slot is taken first and the batch is formed after, so a batch keeps filling while every worker is busy: under load batches
grow by themselves, and an idle service answers at once. A batch that is not full waits a moment for items that are on their way,
because several callers who ask again and again would otherwise be answered in turn, a few at a time, and each few cost a whole pass.
Where there is a second stage, `then`, the next batch runs meanwhile; where no next batch waits, both run in one thread, and nobody
waits for another to wake up.
No future is ever left pending, whatever `run` does.
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
from service.batching.workers import Workers, isolated

__all__ = ["Answer", "Batcher", "BatcherClosed", "BatcherError", "DeadlinePassed", "QueueFull", "Ticket"]

COMPANY = 0.1  # of the last batch's time, at the most, for items on their way
MOMENT_S = 0.2  # and no longer than this: the last batch may have hung, or been run again in halves

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class _Whole:
    """What came of an item that has been through both stages."""

    outcome: Any


class Batcher(Generic[T, R]):
    """Groups the items of many callers into calls of `run`, first come first served.

    run: blocking, one result per payload in the payloads' order; an Exception returned in a payload's place is that item's error, one
    raised is narrowed down to the guilty items by running halves of the batch again.  With `workers` > 1 it is called from several threads.
    then: likewise, of what `run` gave, in a thread of its own where items wait; one batch at most is there, the next keeps its worker.
    stall_s: a batch that takes longer in either is answered with WorkerLost, and its thread replaced.
    begin, begin_then: called once in each thread of either stage.
    max_queue: items that may wait, not counting those being worked on.  max_wait_s: how long the oldest item of an unfilled batch waits
    for company although a worker is free; it and max_batch may change while serving.  on_batch: told each batch's size, on the event loop.

    State, touched on the event loop only: the waiting tickets in order, the free slots of both stages, whether it is closing; how many
    items are announced; of the last batch, when it left its worker, how long it took and how many of its callers have not come back.
    """

    def __init__(
        self,
        run: Callable[[list[T]], Sequence[Any]],
        *,
        name: str,
        max_batch: int,
        max_queue: int,
        max_wait_s: float = 0.0,
        workers: int = 1,
        then: Callable[[list[Any]], Sequence[R]] | None = None,
        stall_s: float = 120.0,
        begin: Callable[[], None] | None = None,
        begin_then: Callable[[], None] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        if min(max_batch, max_queue, workers) < 1 or max_wait_s < 0 or stall_s <= 0:
            raise ValueError(
                f"batcher {name}: max_batch, max_queue, workers and stall_s must be positive, and max_wait_s not negative"
            )
        self.name, self.max_batch, self.max_queue, self.max_wait_s = name, max_batch, max_queue, max_wait_s
        self._run, self._then, self._on_batch = run, then, on_batch
        self._first: Workers[Ticket[T, R], Any] = Workers(
            self._work, name=name, threads=workers, stall_s=stall_s, begin=begin
        )
        self._second = None
        if then is not None:
            self._second = Workers(
                partial(isolated, then), name=f"{name}-then", threads=1, stall_s=stall_s, begin=begin_then
            )
        self._slots, self._between = asyncio.Semaphore(workers), asyncio.Semaphore(1)
        self._waiting: OrderedDict[Ticket[T, R], None] = (
            OrderedDict()
        )  # ordered, and a caller who leaves is removed in O(1)
        self._changed = asyncio.Event()  # something arrived, or closing began
        self._closing = self._serving = False
        self._ended = asyncio.Event()
        self._announced, self._left, self._took_s, self._away = 0, 0.0, 0.0, 0

    @property
    def depth(self) -> int:
        """Items that wait for a batch."""
        return len(self._waiting)

    @property
    def lost(self) -> bool:
        """Whether a worker was given up and its replacement has not answered yet."""
        return self._first.lost or (self._second is not None and self._second.lost)

    async def submit(self, payloads: Sequence[T], deadline: float | None = None) -> list[Answer[R] | Exception]:
        """Answer every payload, in order; an item that failed has its exception in its place.

        deadline: a `time.monotonic()` instant.  All items are admitted or none: QueueFull, BatcherClosed.  Cancelling this call
        withdraws the items that still wait.
        """
        tickets = self._admit(payloads, deadline)
        loop = asyncio.get_running_loop()
        alarm = (
            None if deadline is None else loop.call_later(max(0.0, deadline - time.monotonic()), self._expire, tickets)
        )
        try:
            return await asyncio.gather(*(ticket.reply for ticket in tickets))
        finally:
            if alarm is not None:
                alarm.cancel()
            for ticket in tickets:
                self._waiting.pop(ticket, None)

    @contextlib.contextmanager
    def expecting(self, items: int) -> Iterator[None]:
        """So many are being made ready and will be submitted, or not, when this is left: an unfilled batch may wait for them."""
        self._announced += items
        self._away -= min(self._away, items)
        try:
            yield
        finally:
            self._announced -= items
            self._changed.set()

    async def serve(self) -> None:
        """Form and run batches until closed; a batch keeps filling while every worker is busy."""
        self._serving = True
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._slots.acquire()
                while batch := await self._next_batch():
                    task = tasks.create_task(self._answer(batch, tasks))
                    task.add_done_callback(
                        partial(self._release, self._slots, batch)
                    )  # even where it was cancelled before it started
                    del (
                        batch,
                        task,
                    )  # or the last batch, and the memory its items pin, would live until the next one comes
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
                ticket.settle(
                    DeadlinePassed(
                        f"{self.name} had no free worker within {waited_s:.3f} s: allow more time, or send less"
                    )
                )

    async def _next_batch(self) -> list[Ticket[T, R]]:
        """Up to max_batch tickets worth working on; empty only when closing and nothing waits."""
        while True:
            await self._fill()
            batch = self._take()
            if batch or self._closing:
                return batch

    async def _fill(self) -> None:
        """Wait for a first ticket, then for a full batch, but not for long."""
        while not self._closing and self.depth < self.max_batch:
            left_s = self._patience(next(iter(self._waiting)).enqueued) - time.monotonic() if self._waiting else None
            if left_s is not None and left_s <= 0:
                return
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._changed.wait()

    def _patience(self, first: float) -> float:
        """The instant until which an unfilled batch is kept, whose oldest item came at `first`."""
        moment = min(COMPANY * self._took_s, MOMENT_S)
        company = max(first, self._left) + moment if self._announced else self._left + moment if self._away else first
        return max(first + self.max_wait_s, company)

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

    async def _answer(self, batch: list[Ticket[T, R]], tasks: asyncio.TaskGroup) -> None:
        """Run one batch; settle its tickets, or hand them to the second stage. Raises nothing, or the whole service would end with it."""
        started = time.monotonic()
        try:
            if self._on_batch is not None:
                self._on_batch(len(batch))
        except Exception as error:  # noqa: BLE001  its callers are told, the loop lives
            outcomes: Sequence[Any] = [error] * len(batch)
        else:
            outcomes = await self._first.answers(batch)
            self._left, self._away = time.monotonic(), len(batch)
            self._took_s = self._left - started
        answered = list(zip(batch, outcomes, strict=True))
        going_on = [pair for pair in answered if self._goes_on(*pair)]
        handed = {ticket for ticket, _ in going_on}
        self._settle([pair for pair in answered if pair[0] not in handed], started)
        if going_on:
            await (
                self._between.acquire()
            )  # the slot is still held: batches that wait for the second stage do not pile up
            task = tasks.create_task(self._finish(going_on, started))
            task.add_done_callback(partial(self._release, self._between, [ticket for ticket, _ in going_on]))

    def _work(self, batch: list[Ticket[T, R]]) -> list[Any]:
        """In a worker's thread: the first stage, and the second too where no item waits that could use the time. Reads, changes nothing."""
        outcomes: list[Any] = isolated(self._run, [ticket.payload for ticket in batch])
        going_on = [i for i, ticket in enumerate(batch) if self._goes_on(ticket, outcomes[i])]
        if self._then is not None and going_on and not self._waiting:
            whole = isolated(self._then, [outcomes[i] for i in going_on])
            for i, outcome in zip(going_on, whole, strict=True):
                outcomes[i] = _Whole(outcome)
        return outcomes

    def _goes_on(self, ticket: Ticket[T, R], outcome: object) -> bool:
        """Whether there is a second stage, something for it to do, and anyone who still wants it."""
        return self._second is not None and not isinstance(outcome, Exception | _Whole) and not ticket.reply.done()

    async def _finish(self, going_on: Sequence[tuple[Ticket[T, R], Any]], started: float) -> None:
        """The second stage of one batch."""
        assert self._second is not None  # noqa: S101  `_goes_on` said so
        outcomes = await self._second.answers([outcome for _, outcome in going_on])
        self._settle([(ticket, outcome) for (ticket, _), outcome in zip(going_on, outcomes, strict=True)], started)

    def _settle(self, answered: Iterable[tuple[Ticket[T, R], Any]], started: float) -> None:
        for ticket, made in answered:
            outcome = made.outcome if isinstance(made, _Whole) else made
            ticket.settle(outcome if isinstance(outcome, Exception) else Answer(outcome, started - ticket.enqueued))

    def _release(self, slots: asyncio.Semaphore, batch: Sequence[Ticket[T, R]], task: asyncio.Task[None]) -> None:
        slots.release()
        if task.cancelled() or task.exception() is not None:  # otherwise they are settled, or in the next stage's hands
            self._abandon(batch)

    def _abandon(self, tickets: Iterable[Ticket[T, R]]) -> None:
        """Settle what has no answer yet: only a cancelled `serve`, or one that never ran, leaves such tickets."""
        for ticket in tickets:
            ticket.settle(BatcherClosed(f"{self.name} ended before this item was answered: retry elsewhere or later"))

    def _end(self) -> None:
        self._closing, self._serving = True, False
        self._abandon(self._waiting)
        self._waiting.clear()
        for workers in (self._first, self._second):
            if workers is not None:
                workers.close()
        self._ended.set()
