"""Tokenizing in steps: deadlines are kept, requests take turns, one text holds up no other."""

from __future__ import annotations

import asyncio
import random
import string
import threading
import time
from collections.abc import Sequence

import httpx
import numpy as np
import pytest

from service.batching.batcher import DeadlinePassed
from service.batching.shared_threads import ThreadsClosed
from service.engine import Engine
from service.errors import refusal
from service.pipeline.tokenizing import STEP_TEXTS, Tokenizing
from service.tests.inside import PATIENCE_S, scenario


class Held:
    """Counts texts, and goes on only as far as it is let."""

    def __init__(self) -> None:
        self.go, self.calls = threading.Semaphore(0), list[list[str]]()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self.calls.append(list(texts))
        assert self.go.acquire(timeout=PATIENCE_S)
        return np.array([[len(text)] for text in texts])


def test_texts_keep_their_order_over_the_steps() -> None:
    async def work() -> None:
        stage = Tokenizing(lambda texts: np.array([[len(text)] for text in texts]))
        texts = ["x" * (i % 90) for i in range(1000)]
        found = await stage.tokenize(texts, time.monotonic() + 30)
        np.testing.assert_array_equal(found[:, 0], [len(text) for text in texts])
        stage.close()

    asyncio.run(work())


@pytest.mark.parametrize("way", ["deadline", "caller left"])
def test_a_request_that_nobody_waits_for_is_tokenized_no_further(way: str) -> None:
    held = Held()

    async def work() -> None:
        stage = Tokenizing(held)
        wait_s = 0.2 if way == "deadline" else 30
        asked = asyncio.create_task(stage.tokenize(["text"] * 10 * STEP_TEXTS, time.monotonic() + wait_s))
        while not held.calls:  # noqa: ASYNC110  set by the thread
            await asyncio.sleep(0.005)
        if way == "deadline":
            with pytest.raises(DeadlinePassed, match=f"0 of {10 * STEP_TEXTS} texts"):
                await asked
        else:
            asked.cancel()
            await asyncio.sleep(0)
        held.go.release(50)
        await stage.tokenize(["another"], time.monotonic() + 30)
        assert [len(call) for call in held.calls] == [STEP_TEXTS, 1]
        stage.close()

    asyncio.run(work())


def test_requests_inside_are_refused_when_the_stage_is_closed() -> None:
    held = Held()

    async def work() -> None:
        stage = Tokenizing(held)
        until = time.monotonic() + 30
        inside = [asyncio.create_task(stage.tokenize(["text"] * 2 * STEP_TEXTS, until)) for _ in range(4)]
        while not held.calls:  # noqa: ASYNC110  set by the thread
            await asyncio.sleep(0.005)
        stage.close()
        held.go.release(50)
        outcomes = await asyncio.gather(*inside, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ThreadsClosed] * 4
        assert refusal(ThreadsClosed()).status == 503

    asyncio.run(work())


def test_requests_take_turns() -> None:
    held = Held()

    async def work() -> None:
        stage, until = Tokenizing(held), time.monotonic() + 30
        large = [asyncio.create_task(stage.tokenize(["text"] * 5 * STEP_TEXTS, until)) for _ in range(2)]
        while len(held.calls) < 2:  # noqa: ASYNC110  both threads are taken
            await asyncio.sleep(0.005)
        small = asyncio.create_task(stage.tokenize(["small"], until))
        await asyncio.sleep(0)
        held.go.release(50)
        await asyncio.gather(*large, small)
        assert held.calls.index(["small"]) <= 3
        stage.close()

    asyncio.run(work())


def test_long_random_texts_do_not_hold_up_an_ordinary_one(engine: Engine) -> None:
    drawn = random.Random(1)
    hostile = ["".join(drawn.choice(string.ascii_lowercase) for _ in range(12_000)) for _ in range(8)]

    async def work(client: httpx.AsyncClient) -> None:
        begun = time.monotonic()
        slow = asyncio.create_task(
            client.post("/embed/text", json={"texts": hostile}, headers={"X-Request-Timeout-Ms": "1000"})
        )
        await asyncio.sleep(0.05)
        assert (await client.post("/embed/text", json={"texts": ["a banana"]})).status_code == 200
        assert (await slow).status_code in (200, 504)
        assert time.monotonic() - begun < 15  # it was a minute

    scenario(engine, work)
