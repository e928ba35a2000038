"""Work that can wait runs below what answers requests."""

import asyncio
import os
import sys
import threading

import pytest

from service.batching.executors import NICE, low_priority_threads


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of single threads are Linux's")
def test_its_threads_and_theirs_give_way_and_no_other_does() -> None:
    def nice() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def of_a_child() -> int:
        found: list[int] = []
        child = threading.Thread(target=lambda: found.append(nice()))
        child.start()
        child.join()
        return found[0]

    before = nice()

    async def asked() -> list[int]:
        threads = low_priority_threads(1, "test")
        try:
            return [await threads.run(nice), await threads.run(of_a_child)]
        finally:
            threads.close()

    assert asyncio.run(asked()) == [max(before, NICE)] * 2
    assert nice() == before
