"""Thread pools: threads that end when idle, and threads of low priority. Standard library alone.

torch computes with a pool of OpenMP threads for every thread that calls it, which lives as long as its caller. Where the pools
together have more threads than there are cores, libgomp puts them to sleep between two operators instead of letting them spin, and
waking them costs a lone photo a quarter of its time. So whatever computes does it in a thread that ends soon after its work, and
loading is done `apart`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["Threads", "apart", "low_priority"]

T = TypeVar("T")
IDLE_S = 0.25  # longer than the pauses of a client that calls again and again; to begin anew takes a fraction of a millisecond
NICE = 10  # Linux gives such a thread a tenth of a core that a normal one wants too, and all of one that is idle


class Threads:
    """Up to `count` threads that run blocking functions for the event loop.

    begin: called once in each of them.
    State, on the event loop: the pool in use, how much it runs, when it is let go, and whether it is closed.
    """

    def __init__(self, count: int, name: str, begin: Callable[[], None] | None = None) -> None:
        self._count, self._name, self._begin = count, name, begin
        self._pool = self._made()
        self._running, self._closed = 0, False
        self._letting_go: asyncio.TimerHandle | None = None

    def run(self, work: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        """Its result, in a thread. Raises RuntimeError once closed."""
        loop = asyncio.get_running_loop()
        doing = loop.run_in_executor(self._pool, work, *arguments)
        self._running += 1
        if self._letting_go is not None:
            self._letting_go.cancel()
        doing.add_done_callback(lambda _: self._came_back(loop))
        return doing

    def close(self) -> None:
        """Begin nothing more, what waits included; what runs is not waited for."""
        self._closed = True
        if self._letting_go is not None:
            self._letting_go.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _came_back(self, loop: asyncio.AbstractEventLoop) -> None:
        self._running -= 1
        if not self._running and not self._closed:
            self._letting_go = loop.call_later(IDLE_S, self._let_go)

    def _let_go(self) -> None:
        """End the threads; the new pool has none until it is used."""
        self._pool.shutdown(wait=False)
        self._pool = self._made()

    def _made(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._count, self._name, initializer=self._begin)


def apart(work: Callable[[], T]) -> Future[T]:
    """What `work` will give or raise, begun in a thread that ends with it."""
    made: Future[T] = Future()

    def run() -> None:
        try:
            made.set_result(work())
        except BaseException as error:  # noqa: BLE001  whoever waits for it is told
            made.set_exception(error)

    threading.Thread(target=run, name=getattr(work, "__name__", "apart"), daemon=True).start()
    return made


def low_priority(count: int, name: str) -> Threads:
    """Threads of low priority; what faiss starts from them inherits it. Elsewhere than on Linux they are threads like any others."""
    return Threads(count, name, begin=_give_way)


def _give_way() -> None:
    if sys.platform == "linux":  # elsewhere a priority belongs to the whole process
        me = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, me, max(NICE, os.getpriority(os.PRIO_PROCESS, me)))
