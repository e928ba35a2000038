"""Batcher against small real functions: an item is a number, and `run` doubles it."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batching.batcher import LINGER_FRACTION, Answer, Batcher, BatcherClosed, DeadlinePassed, QueueFull
from service.batching.workers import WorkerLost

SLOW_S = 1.0
PATIENCE_S = 20.0  # far beyond any run here: a test that reaches it hangs


class PoisonError(Exception):
    """What `Doubler` raises when a poisoned item is in its batch."""


@dataclass
class Doubler:
    """A worker that doubles.

    `gate` holds it inside its first run until set; poison items make a whole run fail.
    """

    poison: frozenset[int] = frozenset()
    gate: threading.Event | None = None
    batches: list[list[int]] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)

    def __call__(self, payloads: list[int]) -> list[int]:
        self.batches.append(payloads)
        self.started.set()
        if self.gate is not None:
            assert self.gate.wait(PATIENCE_S)
        if self.poison & set(payloads):
            raise PoisonError(f"cannot double {sorted(self.poison & set(payloads))}")
        return [2 * payload for payload in payloads]


def run_async(coroutine: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await coroutine

    asyncio.run(bounded())


@asynccontextmanager
async def serving(
    run: Callable[[list[int]], Sequence[int]],
    *,
    max_batch: int = 4,
    max_queue: int = 100,
    then: Callable[[list[int]], Sequence[int]] | None = None,
    stall_s: float = PATIENCE_S,
    on_batch: Callable[[int], None] | None = None,
) -> AsyncIterator[Batcher[int, int]]:
    batcher: Batcher[int, int] = Batcher(
        run, name="double", max_batch=max_batch, max_queue=max_queue, then=then, stall_s=stall_s,
        on_batch=on_batch,
    )  # fmt: skip
    task = asyncio.create_task(batcher.serve())
    try:
        yield batcher
    finally:
        await batcher.close()
        await task


async def until(condition: Callable[[], bool]) -> None:
    """Yields once at least, and looks as often as the loop turns at first, so that a moment is not
    missed.
    """
    for turn in itertools.count():
        await asyncio.sleep(0 if turn < 10 else 0.001)
        if condition():
            return


def values(outcomes: Sequence[Answer[int] | Exception]) -> list[int | type[Exception]]:
    return [outcome.result if isinstance(outcome, Answer) else type(outcome) for outcome in outcomes]


def test_each_caller_gets_its_own_results_in_order() -> None:
    async def scenario() -> None:
        run = Doubler()
        async with serving(run, max_batch=7) as batcher:
            requests = [list(range(start, start + 3)) for start in range(0, 60, 3)]
            replies = await asyncio.gather(*(batcher.submit(request) for request in requests))
        assert [values(reply) for reply in replies] == [[2 * item for item in request] for request in requests]
        assert max(len(batch) for batch in run.batches) <= 7
        assert sorted(item for batch in run.batches for item in batch) == list(range(60))

    run_async(scenario())


def test_an_idle_batcher_answers_one_item_without_waiting_for_company() -> None:
    async def scenario() -> None:
        async with serving(Doubler(), max_batch=64) as batcher:
            (answer,) = await batcher.submit([21])
            assert isinstance(answer, Answer)
            assert answer.result == 42
            assert 0 <= answer.queued_s < PATIENCE_S
            assert await batcher.submit([]) == []

    run_async(scenario())


def test_a_batch_keeps_filling_while_the_only_worker_is_busy() -> None:
    async def scenario() -> None:
        run = Doubler(gate=threading.Event())
        sizes: list[int] = []
        async with serving(run, max_batch=10, on_batch=sizes.append) as batcher:
            first = asyncio.create_task(batcher.submit([0]))
            await until(run.started.is_set)
            others = [asyncio.create_task(batcher.submit([item])) for item in range(1, 9)]
            await until(lambda: batcher.depth == 8)
            assert run.gate is not None
            run.gate.set()
            replies = await asyncio.gather(first, *others)
        assert [values(reply) for reply in replies] == [[2 * item] for item in range(9)]
        # formed only once the worker was free, and then whole
        assert run.batches == [[0], list(range(1, 9))]
        assert sizes == [1, 8]

    run_async(scenario())


class Slow(Doubler):
    """Takes a second and more for its first batch, and no time for the others: a tenth of that is a
    moment worth waiting.
    """

    def __call__(self, payloads: list[int]) -> list[int]:
        if not self.batches:
            time.sleep(SLOW_S)
        return super().__call__(payloads)


async def after_a_slow_batch(batcher: Batcher[int, int], items: int) -> None:
    """Callers announced and answered, whom the batcher may expect again."""
    with batcher.expecting(items):
        pass
    await batcher.submit(range(items))


def test_callers_who_come_back_one_by_one_are_answered_together() -> None:
    """Three in a closed loop: without a moment's wait the first to come back would go alone, and
    ever again.
    """

    async def scenario() -> None:
        run = Slow()
        async with serving(run, max_batch=8) as batcher:
            await after_a_slow_batch(batcher, 3)

            async def back(item: int) -> None:
                await asyncio.sleep(0.005 * item)
                with batcher.expecting(1):
                    await asyncio.sleep(0.01)  # it is decoded
                await batcher.submit([item])

            begun = time.monotonic()
            await asyncio.gather(*(back(item) for item in range(3)))
            # all are back: nothing more is waited for
            assert time.monotonic() - begun < SLOW_S * LINGER_FRACTION
        assert run.batches == [[0, 1, 2], [0, 1, 2]]

    run_async(scenario())


def test_company_that_does_not_come_is_not_waited_for_long() -> None:
    async def scenario() -> None:
        run = Slow()
        async with serving(run, max_batch=8) as batcher:
            await after_a_slow_batch(batcher, 2)
            begun = time.monotonic()
            with batcher.expecting(1):  # one of two is back, and this one is decoded for ever
                assert values(await batcher.submit([5])) == [10]
            assert SLOW_S * LINGER_FRACTION * 0.5 < time.monotonic() - begun < SLOW_S / 2
            with batcher.expecting(1):
                pass
            begun = time.monotonic()  # that batch was quick: so is the patience with the next one
            assert values(await batcher.submit([6])) == [12]
            assert time.monotonic() - begun < SLOW_S * LINGER_FRACTION
        assert run.batches[1:] == [[5], [6]]

    run_async(scenario())


def test_a_batch_that_hung_leaves_no_patience_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.batching.batcher.MAX_LINGER_S", 0.01)

    async def scenario() -> None:
        go_on = threading.Event()

        def run(payloads: list[int]) -> list[int]:
            if payloads == [0, 1]:
                go_on.wait(PATIENCE_S)
            return payloads

        async with serving(run, max_batch=8, stall_s=3.0) as batcher:
            assert values(await batcher.submit([0, 1])) == [WorkerLost] * 2
            go_on.set()
            begun = time.monotonic()
            with batcher.expecting(1):  # decoded for ever
                assert values(await batcher.submit([5])) == [5]
            # a tenth of what was lost would be more
            assert time.monotonic() - begun < 3.0 * LINGER_FRACTION * 0.8

    run_async(scenario())


def test_a_caller_who_is_alone_waits_for_nobody() -> None:
    """Not for those of a batch long gone, who have had their moment, nor for itself."""

    async def scenario() -> None:
        async with serving(Slow(), max_batch=8) as batcher:
            await after_a_slow_batch(batcher, 8)
            await asyncio.sleep(SLOW_S * LINGER_FRACTION)
            with batcher.expecting(1):
                pass
            (answer,) = await batcher.submit([1])
            assert isinstance(answer, Answer)
            assert answer.queued_s < SLOW_S * LINGER_FRACTION / 2

    run_async(scenario())


def test_a_full_queue_refuses_the_whole_request_and_keeps_the_admitted() -> None:
    async def scenario() -> None:
        run = Doubler(gate=threading.Event())
        async with serving(run, max_batch=1, max_queue=3) as batcher:
            busy = asyncio.create_task(batcher.submit([0]))
            await until(run.started.is_set)
            admitted = asyncio.create_task(batcher.submit([1, 2]))
            await until(lambda: batcher.depth == 2)
            with pytest.raises(QueueFull, match=r"2 items wait for double, 2 more would pass the limit of 3"):
                await batcher.submit([3, 4])
            assert batcher.depth == 2  # none of the two was taken
            last = asyncio.create_task(batcher.submit([5]))
            await until(lambda: batcher.depth == 3)
            assert run.gate is not None
            run.gate.set()
            assert [values(await task) for task in (busy, admitted, last)] == [[0], [2, 4], [10]]
            with pytest.raises(QueueFull):
                # would never fit: refused, not left waiting for ever
                await batcher.submit(range(4))

    run_async(scenario())


def test_a_deadline_that_comes_before_the_work_is_answered_at_once() -> None:
    async def scenario() -> None:
        run = Doubler(gate=threading.Event())
        async with serving(run) as batcher:
            busy = asyncio.create_task(batcher.submit([0], deadline=time.monotonic() + 0.05))
            await until(run.started.is_set)
            late = await batcher.submit(
                [1, 2], deadline=time.monotonic() + 0.02
            )  # answered although the worker is still busy
            assert values(late) == [DeadlinePassed, DeadlinePassed]
            assert batcher.depth == 0
            patient = asyncio.create_task(batcher.submit([3], deadline=time.monotonic() + PATIENCE_S))
            await asyncio.sleep(0.05)
            assert run.gate is not None
            run.gate.set()
            assert values(await busy) == [0]  # its work had started in time
            assert values(await patient) == [6]
            assert values(await batcher.submit([4], deadline=time.monotonic() - 1)) == [DeadlinePassed]
        assert run.batches == [[0], [3]]

    run_async(scenario())


def test_callers_who_left_are_dropped_and_free_the_queue() -> None:
    async def scenario() -> None:
        run = Doubler(gate=threading.Event())
        async with serving(run, max_queue=2) as batcher:
            started = asyncio.create_task(batcher.submit([0]))
            await until(run.started.is_set)
            gone = asyncio.create_task(batcher.submit([1, 2]))
            await until(lambda: batcher.depth == 2)
            for caller in (started, gone):  # one in the middle of its run, one still waiting
                caller.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await caller
            assert batcher.depth == 0
            stays = asyncio.create_task(batcher.submit([3, 4]))
            await until(lambda: batcher.depth == 2)
            assert run.gate is not None
            run.gate.set()
            assert values(await stays) == [6, 8]
        assert run.batches == [[0], [3, 4]]

    run_async(scenario())


def test_a_caller_who_leaves_in_the_very_moment_its_batch_is_formed_is_dropped() -> None:
    async def scenario() -> None:
        run = Doubler()
        async with serving(run) as batcher:
            await asyncio.sleep(0.01)  # the batcher is now waiting for a first item
            caller = asyncio.create_task(batcher.submit([7]))
            await until(lambda: batcher.depth == 1)
            caller.cancel()  # before the batcher, woken by the item, has had its turn
            with pytest.raises(asyncio.CancelledError):
                await caller
            assert values(await batcher.submit([8])) == [16]
        assert run.batches == [[8]]

    run_async(scenario())


def test_only_the_poisoned_item_gets_the_error_and_the_loop_lives() -> None:
    async def scenario() -> None:
        run = Doubler(poison=frozenset({5}))
        async with serving(run, max_batch=8) as batcher:
            outcomes = await batcher.submit(range(8))
            assert values(outcomes) == [0, 2, 4, 6, 8, PoisonError, 12, 14]
            assert len(run.batches) <= 7  # the whole, then two halves at each of log2(8) levels
            assert values(await batcher.submit([6])) == [12]

    run_async(scenario())


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(st.lists(st.integers(0, 30), max_size=6), max_size=8),
    poison=st.frozensets(st.integers(0, 30), max_size=4),
    max_batch=st.integers(1, 9),
)
def test_whatever_the_poison_every_item_has_its_own_outcome(
    requests: list[list[int]], poison: frozenset[int], max_batch: int
) -> None:
    async def scenario() -> None:
        async with serving(Doubler(poison), max_batch=max_batch) as batcher:
            replies = await asyncio.gather(*(batcher.submit(request) for request in requests))
        expected = [[PoisonError if item in poison else 2 * item for item in request] for request in requests]
        assert [values(reply) for reply in replies] == expected

    run_async(scenario())


def test_an_exception_returned_in_an_items_place_is_that_items_error() -> None:
    async def scenario() -> None:
        batcher: Batcher[int, int | Exception] = Batcher(
            lambda payloads: [LookupError("no such memory") if item == 2 else item for item in payloads],
            name="mixed",
            max_batch=4,
            max_queue=9,
        )
        task = asyncio.create_task(batcher.serve())
        first, second, third = await batcher.submit([1, 2, 3])
        assert isinstance(second, LookupError)
        assert isinstance(first, Answer)
        assert isinstance(third, Answer)
        await batcher.close()
        await task

    run_async(scenario())


@pytest.mark.parametrize("results", [[], [1], [1, 2, 3, 4, 5]])
def test_a_wrong_number_of_results_is_an_error_for_the_batch(results: list[int]) -> None:
    async def scenario() -> None:
        async with serving(lambda _: results) as batcher:
            outcomes = await batcher.submit([1, 2, 3])
            assert values(outcomes) == [RuntimeError] * 3
            assert f"{len(results)} results came back for 3 items" in str(outcomes[0])

    run_async(scenario())


@pytest.mark.parametrize(
    "failure", [SystemExit(3), KeyboardInterrupt(), StopIteration(), MemoryError(), asyncio.CancelledError()]
)
def test_whatever_run_raises_the_callers_are_answered_and_the_loop_lives(failure: BaseException) -> None:
    async def scenario() -> None:
        broken = threading.Event()
        broken.set()

        def run(payloads: list[int]) -> list[int]:
            if broken.is_set():
                raise failure
            return payloads

        async with serving(run) as batcher:
            assert all(isinstance(outcome, Exception) for outcome in await batcher.submit([1, 2, 3]))
            broken.clear()
            assert values(await batcher.submit([1, 2, 3])) == [1, 2, 3]

    run_async(scenario())


def test_a_failing_on_batch_is_told_to_the_callers_and_the_loop_lives() -> None:
    async def scenario() -> None:
        def on_batch(size: int) -> None:
            if size == 2:
                raise LookupError("no such series")

        async with serving(Doubler(), on_batch=on_batch) as batcher:
            assert values(await batcher.submit([1, 2])) == [LookupError, LookupError]
            assert values(await batcher.submit([1])) == [2]

    run_async(scenario())


def test_close_answers_the_admitted_and_refuses_the_rest() -> None:
    async def scenario() -> None:
        run = Doubler(gate=threading.Event())
        async with serving(run, max_batch=2) as batcher:
            admitted = [asyncio.create_task(batcher.submit([item, item])) for item in range(5)]
            await until(run.started.is_set)
            closing = asyncio.create_task(batcher.close())
            await asyncio.sleep(0.01)
            assert not closing.done()
            with pytest.raises(BatcherClosed):
                await batcher.submit([9])
            assert run.gate is not None
            run.gate.set()
            await closing
            assert [values(await task) for task in admitted] == [[2 * item] * 2 for item in range(5)]
            with pytest.raises(BatcherClosed, match="shutting down"):
                await batcher.submit([9])
            await batcher.close()  # a second close is harmless
        assert all(
            not thread.name.startswith("batcher-double") or not thread.is_alive() for thread in await settled_threads()
        )

    run_async(scenario())


async def settled_threads() -> list[threading.Thread]:
    await until(lambda: not any(thread.name.startswith("batcher-double") for thread in threading.enumerate()))
    return threading.enumerate()


def test_close_without_serve_leaves_no_caller_waiting() -> None:
    async def scenario() -> None:
        batcher: Batcher[int, int] = Batcher(Doubler(), name="idle", max_batch=2, max_queue=2)
        caller = asyncio.create_task(batcher.submit([1]))
        await until(lambda: batcher.depth == 1)
        await batcher.close()
        assert values(await caller) == [BatcherClosed]
        await batcher.serve()  # ends at once

    run_async(scenario())


def test_a_cancelled_serve_leaves_no_caller_waiting() -> None:
    async def scenario() -> None:
        run = Doubler(gate=threading.Event())
        batcher: Batcher[int, int] = Batcher(run, name="double", max_batch=1, max_queue=9)
        task = asyncio.create_task(batcher.serve())
        caller = asyncio.create_task(batcher.submit([1, 2, 3]))  # one in its run, two waiting
        await until(lambda: len(run.batches) == 1)
        task.cancel()
        assert values(await caller) == [BatcherClosed] * 3
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(BatcherClosed):
            await batcher.submit([4])
        assert run.gate is not None
        run.gate.set()

    run_async(scenario())


def test_under_many_callers_who_come_fail_and_leave_nothing_is_lost() -> None:
    async def scenario() -> None:
        run = Doubler(poison=frozenset(range(0, 600, 37)))
        async with serving(run, max_batch=16, max_queue=64) as batcher:

            async def caller(item: int) -> str:
                await asyncio.sleep(item % 11 * 0.001)
                try:
                    async with asyncio.timeout(0.0005 if item % 7 == 0 else PATIENCE_S):
                        (outcome,) = await batcher.submit([item])
                except TimeoutError:
                    return "left"
                except QueueFull:
                    return "refused"
                if isinstance(outcome, Exception):
                    assert item in run.poison
                    return "poisoned"
                assert outcome.result == 2 * item
                return "answered"

            fates = await asyncio.gather(*(caller(item) for item in range(600)))
            assert fates.count("answered") > 0
            assert batcher.depth == 0
            assert values(await batcher.submit([1000])) == [2000]

    run_async(scenario())


def test_the_next_batch_runs_while_the_one_before_is_in_its_second_stage() -> None:
    async def scenario() -> None:
        first, second = Doubler(), Doubler(gate=threading.Event())
        async with serving(first, max_batch=1, then=second) as batcher:
            callers = [asyncio.create_task(batcher.submit([item])) for item in range(5)]
            await until(lambda: len(second.batches) == 1 and len(first.batches) == 2)
            await asyncio.sleep(0.02)
            assert (len(first.batches), batcher.depth) == (
                2,
                3,
            )  # the second waits on its worker, the others still form larger batches
            assert second.gate is not None
            second.gate.set()
            assert [values(await caller) for caller in callers] == [[4 * item] for item in range(5)]
        assert sorted(second.batches) == [
            [2 * item] for item in range(5)
        ]  # the last, behind which nothing waits, may overtake

    run_async(scenario())


def test_where_nothing_waits_both_stages_run_in_one_thread() -> None:
    async def scenario() -> None:
        threads: list[int] = []

        def noted(payloads: list[int]) -> list[int]:
            threads.append(threading.get_ident())
            return payloads

        async with serving(noted, max_batch=2, then=noted) as batcher:
            assert values(await batcher.submit([1, 2])) == [1, 2]
            assert len(set(threads)) == 1
            threads.clear()
            assert values(await batcher.submit([1, 2, 3])) == [1, 2, 3]
            assert len(set(threads)) == 2  # the third waited while the first two were in theirs

    run_async(scenario())


def test_each_stage_keeps_its_poison_to_itself() -> None:
    async def scenario() -> None:
        first, second = Doubler(poison=frozenset({3})), Doubler(poison=frozenset({10}))
        async with serving(first, max_batch=8, then=second) as batcher:
            assert values(await batcher.submit(list(range(8)))) == [0, 4, 8, PoisonError, 16, PoisonError, 24, 28]
            assert values(await batcher.submit([3])) == [PoisonError]
        # what failed in the first is not tried in the second
        assert all(6 not in batch for batch in second.batches)

    run_async(scenario())


def test_who_leaves_between_the_stages_is_not_worked_for() -> None:
    async def scenario() -> None:
        first, second = Doubler(gate=threading.Event()), Doubler()
        async with serving(first, then=second) as batcher:
            callers = [asyncio.create_task(batcher.submit([item])) for item in range(2)]
            await until(first.started.is_set)
            callers[0].cancel()
            await asyncio.sleep(0)
            assert first.gate is not None
            first.gate.set()
            assert values(await callers[1]) == [4]
        assert second.batches == [[2]]

    run_async(scenario())


@pytest.mark.parametrize("stage", ["first", "second"])
def test_a_worker_that_never_comes_back_is_replaced_and_told_of_meanwhile(stage: str) -> None:
    async def scenario() -> None:
        stuck, gate, quick = threading.Event(), threading.Event(), Doubler()

        def hang(payloads: list[int]) -> list[int]:
            if not stuck.is_set():
                stuck.set()
                assert gate.wait(PATIENCE_S)
            return quick(payloads)

        run, then = (hang, Doubler()) if stage == "first" else (Doubler(), hang)
        async with serving(run, max_batch=2, then=then, stall_s=0.05) as batcher:
            callers = [asyncio.create_task(batcher.submit([item, item])) for item in range(3)]
            await until(stuck.is_set)
            assert not batcher.lost
            assert values(await callers[0]) == [WorkerLost] * 2
            assert [values(await caller) for caller in callers[1:]] == [[4, 4], [8, 8]]
            assert not batcher.lost
            gate.set()  # what comes back late is nobody's
            assert values(await batcher.submit([5])) == [20]

    run_async(scenario())


def test_a_replacement_that_hangs_too_stays_lost() -> None:
    async def scenario() -> None:
        gate = threading.Event()

        def hang(payloads: list[int]) -> list[int]:
            assert gate.wait(PATIENCE_S)
            return payloads

        async with serving(hang, stall_s=0.02) as batcher:
            for _ in range(2):
                assert values(await batcher.submit([1])) == [WorkerLost]
                assert batcher.lost
            gate.set()
            assert values(await batcher.submit([1])) == [1]
            assert not batcher.lost

    run_async(scenario())


def test_close_waits_for_the_second_stage_too() -> None:
    async def scenario() -> None:
        second = Doubler(gate=threading.Event())
        async with serving(Doubler(), max_batch=1, then=second) as batcher:
            callers = [asyncio.create_task(batcher.submit([item])) for item in range(3)]
            await until(second.started.is_set)
            closing = asyncio.create_task(batcher.close())
            await asyncio.sleep(0.01)
            assert not closing.done()
            assert second.gate is not None
            second.gate.set()
            await closing
            assert [values(await caller) for caller in callers] == [[0], [4], [8]]

    run_async(scenario())


def test_a_cancelled_serve_leaves_no_caller_waiting_in_either_stage() -> None:
    async def scenario() -> None:
        second = Doubler(gate=threading.Event())
        batcher: Batcher[int, int] = Batcher(Doubler(), name="double", max_batch=1, max_queue=9, then=second)
        task = asyncio.create_task(batcher.serve())
        # in the second stage, before it, and two waiting
        caller = asyncio.create_task(batcher.submit([1, 2, 3, 4]))
        await until(second.started.is_set)
        await asyncio.sleep(0.01)
        task.cancel()
        assert values(await caller) == [BatcherClosed] * 4
        with pytest.raises(asyncio.CancelledError):
            await task
        assert second.gate is not None
        second.gate.set()

    run_async(scenario())


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"max_queue": 0}, {"stall_s": 0.0}])
def test_senseless_limits_are_refused(wrong: dict[str, Any]) -> None:
    limits: dict[str, Any] = {"max_batch": 1, "max_queue": 1, **wrong}
    with pytest.raises(ValueError, match="batcher odd"):
        Batcher(Doubler(), name="odd", **limits)
