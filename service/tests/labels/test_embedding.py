"""Lists being embedded: dropped when nobody waits, resumed where they stopped, admitted by size, in
turns.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import httpx
import numpy as np
import pytest

from index_store import Snapshot
from service.batching.batcher import QueueFull
from service.engine import Engine
from service.errors import TooLarge
from service.labels.cache import CACHED_LISTS, LabelVectors
from service.labels.label_set import LabelSet
from service.labels.list_embedding import STEP_TEXTS
from service.labels.scoring import ScoreFunction
from service.observability.metrics import Metrics
from service.tests.inside import scenario

PATIENCE_S = 20.0


class Held:
    """An embedding of width 1, which notes the first label of each step and waits to be let,
    except for a single label.
    """

    def __init__(self) -> None:
        self.go, self.steps = threading.Semaphore(0), list[str]()

    def __call__(self, labels: Sequence[str], templates: Sequence[str], snapshot: Snapshot | None) -> np.ndarray:
        self.steps.append(labels[0])
        if len(labels) > 1:
            assert self.go.acquire(timeout=PATIENCE_S)
        return np.array([[len(label)] for label in labels], np.float32)


def named(name: str, steps: int) -> LabelSet:
    """A list of that many steps."""
    return LabelSet(tuple(f"{name}{i:05}" for i in range(steps * STEP_TEXTS)), ("{}",))


def run(
    work: Callable[[LabelVectors, Held], Coroutine[Any, Any, None]],
    *,
    max_characters: int = 10**9,
    large: int = 10**6,
) -> None:
    async def whole() -> None:
        held, metrics = Held(), Metrics(version="0", torch="0", faiss="0")
        function = ScoreFunction(20.0)
        vectors = LabelVectors(held, function=function, large=large, max_characters=max_characters, metrics=metrics)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await work(vectors, held)
        finally:
            vectors.close()
            held.go.release(1000)

    asyncio.run(whole())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  set by a thread
        await asyncio.sleep(0.005)


def test_a_list_that_nobody_waits_for_is_dropped_and_goes_on_where_it_stopped() -> None:
    async def work(vectors: LabelVectors, held: Held) -> None:
        labels = named("a", 4)
        callers = [asyncio.create_task(vectors.get(labels, None)) for _ in range(2)]
        held.go.release(1)
        await until(lambda: len(held.steps) == 2)
        callers[0].cancel()
        held.go.release(1)
        await until(lambda: len(held.steps) == 3)  # one caller still waits
        callers[1].cancel()
        await asyncio.sleep(0)
        held.go.release(9)
        await vectors.get(named("b", 1), None)
        assert held.steps[3:] == ["b00000"]
        assert vectors.progress(labels)[0]["done"] == 2 * STEP_TEXTS
        rows = await vectors.get(labels, None)
        assert isinstance(rows, np.ndarray)
        np.testing.assert_array_equal(rows, 6)
        assert held.steps[4:] == [f"a{i * STEP_TEXTS:05}" for i in (2, 3)]

    run(work)


def test_lists_take_turns() -> None:
    async def work(vectors: LabelVectors, held: Held) -> None:
        long = [asyncio.create_task(vectors.get(named(name, 6), None)) for name in "abc"]
        await until(lambda: len(held.steps) == 2)
        short = asyncio.create_task(vectors.get(named("s", 1), None))
        await asyncio.sleep(0)
        held.go.release(100)
        await asyncio.gather(*long, short)
        assert held.steps.index("s00000") <= 5

    run(work)


def test_lists_are_admitted_by_their_characters() -> None:
    async def work(vectors: LabelVectors, held: Held) -> None:
        one = named("a", 1)
        callers = [asyncio.create_task(vectors.get(one, None))]
        callers += [asyncio.create_task(vectors.get(named(f"{i}", 1), None)) for i in range(3)]
        await until(lambda: len(held.steps) == 2)
        with pytest.raises(QueueFull, match="characters are being embedded"):
            await vectors.get(named("x", 1), None)
        callers.append(asyncio.create_task(vectors.get(one, None)))  # the same list costs nothing more
        callers[1].cancel()  # and one that is dropped makes room
        await asyncio.sleep(0.01)
        callers[1] = asyncio.create_task(vectors.get(named("y", 1), None))
        held.go.release(100)
        await asyncio.gather(*callers)

    run(work, max_characters=named("a", 1).characters)


def test_many_small_lists_do_not_evict_a_large_one_that_is_being_embedded() -> None:
    async def work(vectors: LabelVectors, held: Held) -> None:
        large = named("large", 3)
        vectors.prepare(large, None)
        held.go.release(1)
        await until(lambda: len(held.steps) == 2)
        for i in range(CACHED_LISTS):
            await vectors.get(LabelSet((f"small {i}",), ("{}",)), None)
        assert vectors.progress(large) == [{"memory": None, "done": STEP_TEXTS, "of": 3 * STEP_TEXTS}]
        assert len(vectors._entries) == CACHED_LISTS
        held.go.release(5)
        await vectors.get(large, None)
        assert [step for step in held.steps if step.startswith("large")] == [
            f"large{i * STEP_TEXTS:05}" for i in range(3)
        ]
        await vectors.get(LabelSet(("small 0",), ("{}",)), None)  # it was evicted, as the oldest
        assert held.steps.count("small 0") == 2

    run(work, large=STEP_TEXTS)


def test_characters_are_those_of_all_texts() -> None:
    labels = LabelSet(("ab", "cde"), ("a {}!", "{}"))
    assert labels.characters == sum(len(t.replace("{}", label)) for label in labels.labels for t in labels.templates)
    assert LabelSet.of(["ab", "cde"], ["a {}!", "{}"], 4, 16) == labels
    with pytest.raises(TooLarge, match="16 characters, at most 15"):
        LabelSet.of(["ab", "cde"], ["a {}!", "{}"], 4, 15)


def test_new_lists_whose_callers_left_do_not_hold_up_another(engine: Engine) -> None:
    def body(name: str, count: int) -> dict[str, Any]:
        return {"texts": ["milk"], "labels": [f"{name} {i} of many" for i in range(count)], "enhance": "none"}

    async def work(client: httpx.AsyncClient) -> None:
        hasty = {"X-Request-Timeout-Ms": "200"}
        gone = [client.post("/classify", json=body(f"kind {n}", 3000), headers=hasty) for n in range(12)]
        assert {reply.status_code for reply in await asyncio.gather(*gone)} <= {504, 429}
        honest = await client.post("/classify", json=body("other", 5), headers={"X-Request-Timeout-Ms": "10000"})
        assert honest.status_code == 200
        assert not any(entry.running for entry in engine.label_sets.vectors._entries.values())

    scenario(engine, work)
