"""Thread pools: threads that end when idle, and threads of low priority. Standard library alone.

torch keeps a pool of OpenMP threads for every thread that calls it, as long as that thread lives.
Where these pools together have more threads than there are cores, libgomp puts them to sleep
between two operators instead of letting them spin, and waking them takes a lone photo a quarter of
its time. So all code that computes with torch runs in a thread that ends soon after its work, and
models are loaded in a thread of their own (`run_in_own_thread`).
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["IdleThreads", "low_priority_threads", "run_in_own_thread"]

T = TypeVar("T")
IDLE_S = 0.25  # longer than the pauses of a client in a loop; a new thread takes a fraction of 1 ms
NICE = 10  # on Linux: a tenth of a core that a normal thread wants too, all of an idle one


class IdleThreads:
    """Up to `count` threads that run blocking functions for the event loop and end when idle.

    initialize: called once in each thread.
    State, changed on the event loop only: the pool in use, how many calls run, the timer that ends
    idle threads, and whether it is closed.
    """

    def __init__(self, count: int, name: str, initialize: Callable[[], None] | None = None) -> None:
        self._count, self._name, self._initialize = count, name, initialize
        self._pool = self._new_pool()
        self._running, self._closed = 0, False
        self._end_timer: asyncio.TimerHandle | None = None

    def run(self, work: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        """Run `work` in a thread and return its future. Raises RuntimeError once closed."""
        loop = asyncio.get_running_loop()
        call = loop.run_in_executor(self._pool, work, *arguments)
        self._running += 1
        if self._end_timer is not None:
            self._end_timer.cancel()
        call.add_done_callback(lambda _: self._finish_call(loop))
        return call

    def close(self) -> None:
        """Start no more calls, waiting ones included; running calls are not waited for."""
        self._closed = True
        if self._end_timer is not None:
            self._end_timer.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _finish_call(self, loop: asyncio.AbstractEventLoop) -> None:
        self._running -= 1
        if not self._running and not self._closed:
            self._end_timer = loop.call_later(IDLE_S, self._end_idle_threads)

    def _end_idle_threads(self) -> None:
        """Shut the pool down; the new one has no thread until it is used."""
        self._pool.shutdown(wait=False)
        self._pool = self._new_pool()

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._count, self._name, initializer=self._initialize)


def low_priority_threads(count: int, name: str) -> IdleThreads:
    """Threads for work that may wait for the work of requests.

    Threads that faiss starts from them inherit the priority. Outside Linux they are normal threads.
    """
    return IdleThreads(count, name, initialize=_lower_priority)


def run_in_own_thread(work: Callable[[], T]) -> Future[T]:
    """Start `work` in a thread that ends with it; the future has its result or its exception."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  the caller of `result` gets it
            future.set_exception(error)

    threading.Thread(target=run, name=getattr(work, "__name__", "own-thread"), daemon=True).start()
    return future


def _lower_priority() -> None:
    if sys.platform == "linux":  # elsewhere a priority belongs to the whole process
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(NICE, os.getpriority(os.PRIO_PROCESS, thread)))
