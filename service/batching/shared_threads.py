"""Threads that callers use in turns. Standard library alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from service.batching.executors import IdleThreads
from service.batching.turns import Turns

__all__ = ["SharedThreads", "ThreadsClosed"]

T = TypeVar("T")


class ThreadsClosed(RuntimeError):
    """The threads were closed before the work began."""


class SharedThreads:
    """Up to `count` threads that end when idle. A free thread goes to the next caller in rotation.

    make: the threads, such as `low_priority_threads`.
    State, changed on the event loop only: whose turn it is, and whether they are closed.
    """

    def __init__(self, count: int, name: str, make: Callable[[int, str], IdleThreads] = IdleThreads) -> None:
        self._threads, self._turns = make(count, name), Turns()
        for _ in range(count):
            self._turns.give()
        self._closed = False

    async def run(self, caller: Hashable, work: Callable[..., T], *arguments: object) -> T:
        """Run `work` in a thread once it is the caller's turn.

        Where the waiting task is cancelled, its turn lasts until the thread has ended the work.
        caller: whoever shares one place in the rotation.  Raises what `work` raises,
        ThreadsClosed where they are closed before the caller's turn.
        """
        await self._turns.take(caller)
        try:
            if self._closed:
                raise ThreadsClosed("shutting down: send the request to another instance, or retry later")
            call = self._threads.run(work, *arguments)
        except RuntimeError:
            self._turns.give()
            raise
        call.add_done_callback(self._finish)
        return await asyncio.shield(call)

    def close(self) -> None:
        """Start no more work; running work is not waited for."""
        self._closed = True
        self._threads.close()

    def _finish(self, call: asyncio.Future[Any]) -> None:
        if not call.cancelled():
            call.exception()  # read here, because the task that waited may have been cancelled
        self._turns.give()
