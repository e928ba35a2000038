"""Tickets of a batcher: one per admitted item, with the future of its answer. Standard library."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Answer", "BatcherClosed", "BatcherError", "DeadlinePassed", "QueueFull", "Ticket"]

T = TypeVar("T")
R = TypeVar("R")


class BatcherError(Exception):
    """A refusal by the batcher itself; errors of the function that it runs keep their own class.

    BatcherError
     ├── QueueFull        on submit: the items would exceed the queue
     ├── DeadlinePassed   of one item: no worker was free before its deadline
     └── BatcherClosed    on submit while closing, or of an item cut off by an abrupt end
    """


class QueueFull(BatcherError):
    """The request was refused whole because its items would exceed `max_queue`."""


class DeadlinePassed(BatcherError):
    """The deadline came before the batch of the item started; a started batch is always
    finished.
    """


class BatcherClosed(BatcherError):
    """The batcher is closing or has ended, and takes no more items."""


@dataclass(frozen=True, slots=True)
class Answer(Generic[R]):
    """The result of one item. queued_s: seconds between admission and the start of its batch."""

    result: R
    queued_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Ticket(Generic[T, R]):
    """One admitted item. enqueued, deadline: `time.monotonic()` seconds.

    reply: the future of the answer; a failure is its result, never its exception.
    """

    payload: T
    reply: asyncio.Future[Answer[R] | Exception]
    enqueued: float
    deadline: float | None

    def settle(self, outcome: Answer[R] | Exception) -> None:
        """Answer the caller, unless the caller has left or has an answer already."""
        if not self.reply.done():
            self.reply.set_result(outcome)

    def expired(self, now: float) -> bool:
        """Whether the deadline has come."""
        return self.deadline is not None and self.deadline <= now
