"""What a batcher hands out: a ticket for each item, the answer to it, and what it says of its own: standard library alone."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Answer", "BatcherClosed", "BatcherError", "DeadlinePassed", "QueueFull", "Ticket"]

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
