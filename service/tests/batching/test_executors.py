"""IdleThreads that end when idle, by what the system counts; torch's own pools included."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from service.batching.executors import IDLE_S, IdleThreads, run_in_own_thread
from service.pipeline.tower import set_torch_threads

PATIENCE_S = 20.0
linux = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")


def threads_of_the_process() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def multiply() -> str:
    """Enough for every thread of torch's pool. -> the name of the thread that called."""
    a = torch.ones(512, 512)
    (a @ a).relu_()
    return threading.current_thread().name


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await scenario()

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  what the system counts tells nobody when it changes
            await asyncio.sleep(0.01)


@linux
def test_an_idle_thread_ends_with_the_pool_it_computed_with_and_a_new_one_begins() -> None:
    async def scenario() -> None:
        began: list[str] = []
        threads = IdleThreads(1, "test", initialize=lambda: began.append(threading.current_thread().name))
        before = threads_of_the_process()
        for _ in range(3):  # no pause is long enough: one thread, and its pool
            assert (await threads.run(multiply)).startswith("test")
            await asyncio.sleep(IDLE_S / 10)
        assert len(began) == 1
        assert threads_of_the_process() > before
        await until(lambda: threads_of_the_process() == before)
        await threads.run(multiply)
        assert len(began) == 2
        threads.close()
        await until(lambda: threads_of_the_process() == before)

    run(scenario)


def test_a_thread_at_work_is_never_let_go() -> None:
    async def scenario() -> None:
        go_on, threads = threading.Event(), IdleThreads(2, "test")
        long = asyncio.ensure_future(threads.run(go_on.wait, PATIENCE_S))
        await threads.run(int)
        await asyncio.sleep(2 * IDLE_S)  # the second thread is idle all the while
        go_on.set()
        assert await long
        threads.close()

    run(scenario)


def test_closed_they_begin_nothing_and_drop_what_waits() -> None:
    async def scenario() -> None:
        go_on, threads = threading.Event(), IdleThreads(1, "test")
        working, waiting = (asyncio.ensure_future(threads.run(go_on.wait, PATIENCE_S)) for _ in range(2))
        threads.close()
        go_on.set()
        assert await working
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(RuntimeError):
            threads.run(int)
        await asyncio.sleep(2 * IDLE_S)  # and it stays closed
        with pytest.raises(RuntimeError):
            threads.run(int)

    run(scenario)


@linux
def test_what_is_done_apart_leaves_no_thread_and_gives_what_it_raised() -> None:
    before = threads_of_the_process()
    assert run_in_own_thread(multiply).result() != threading.current_thread().name
    with pytest.raises(KeyError, match="gone"):
        run_in_own_thread(lambda: {}["gone"]).result()  # type: ignore[index]
    give_up = time.monotonic() + PATIENCE_S
    while threads_of_the_process() != before and time.monotonic() < give_up:
        time.sleep(0.01)
    assert threads_of_the_process() == before


def test_a_thread_computes_with_the_cores_it_was_given_and_the_others_with_theirs() -> None:
    given = torch.get_num_threads()

    async def scenario() -> None:
        alone, all_of_them = (
            IdleThreads(1, str(cores), initialize=partial(set_torch_threads, cores, given)) for cores in (1, given + 1)
        )
        for _ in range(2):
            assert await alone.run(torch.get_num_threads) == 1
            assert await all_of_them.run(torch.get_num_threads) == given + 1
            assert run_in_own_thread(torch.get_num_threads).result() == given
        for threads in (alone, all_of_them):
            threads.close()

    run(scenario)
    assert torch.get_num_threads() == given
