"""Threads that callers share: turns, errors, callers that leave, closing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from service.batching.executors import low_priority_threads
from service.batching.shared_threads import SharedThreads, ThreadsClosed

PATIENCE_S = 20.0


class Held:
    """Work that notes its name and waits to be let."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Semaphore(0), list[str]()

    def __call__(self, name: str) -> str:
        self.begun.append(name)
        assert self.go.acquire(timeout=PATIENCE_S)
        return name


def run(work: Callable[[SharedThreads, Held], Coroutine[Any, Any, None]], count: int = 1) -> None:
    async def whole() -> None:
        held, threads = Held(), SharedThreads(count, "test")
        try:
            async with asyncio.timeout(PATIENCE_S):
                await work(threads, held)
        finally:
            threads.close()
            held.go.release(100)

    asyncio.run(whole())


async def until_begun(held: Held, count: int) -> None:
    while len(held.begun) < count:  # noqa: ASYNC110  set by a thread
        await asyncio.sleep(0.005)


def test_callers_take_turns() -> None:
    async def work(threads: SharedThreads, held: Held) -> None:
        many = [asyncio.create_task(threads.run("a", held, f"a{i}")) for i in range(4)]
        await until_begun(held, 1)
        one = asyncio.create_task(threads.run("b", held, "b0"))
        await asyncio.sleep(0)
        held.go.release(5)
        assert await one == "b0"
        assert await asyncio.gather(*many) == ["a0", "a1", "a2", "a3"]
        assert held.begun.index("b0") <= 2

    run(work)


def test_no_more_work_runs_at_a_time_than_there_are_threads_though_callers_leave() -> None:
    async def work(threads: SharedThreads, held: Held) -> None:
        gone = [asyncio.create_task(threads.run(i, held, "gone")) for i in range(2)]
        await until_begun(held, 2)
        for task in gone:
            task.cancel()
        waiting = asyncio.create_task(threads.run(2, held, "next"))
        await asyncio.sleep(0.05)
        assert held.begun == ["gone", "gone"]
        assert not waiting.done()
        held.go.release(3)
        assert await waiting == "next"

    run(work, count=2)


def test_an_error_is_the_callers_and_the_thread_serves_the_next() -> None:
    def fail() -> None:
        raise ValueError("bad")

    async def work(threads: SharedThreads, held: Held) -> None:
        for _ in range(3):
            with pytest.raises(ValueError, match="bad"):
                await threads.run("a", fail)
        held.go.release()
        assert await threads.run("b", held, "b0") == "b0"

    run(work)


def test_closed_threads_refuse_every_caller_even_one_that_waits() -> None:
    async def work(threads: SharedThreads, held: Held) -> None:
        inside = asyncio.create_task(threads.run("a", held, "inside"))
        await until_begun(held, 1)
        waiting = [asyncio.create_task(threads.run(caller, held, "waiting")) for caller in range(3)]
        await asyncio.sleep(0)
        threads.close()
        held.go.release()
        assert await inside == "inside"
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ThreadsClosed] * 3
        with pytest.raises(ThreadsClosed, match="shutting down"):
            await threads.run("a", held, "late")
        assert held.begun == ["inside"]

    run(work)


def test_the_threads_are_those_that_are_asked_for() -> None:
    async def work() -> str:
        threads = SharedThreads(1, "slow", low_priority_threads)
        try:
            return await threads.run(0, lambda: threading.current_thread().name)
        finally:
            threads.close()

    assert asyncio.run(work()).startswith("slow")
