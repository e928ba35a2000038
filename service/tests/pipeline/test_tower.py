"""A tower whose model hangs, whose batcher ends, and whose stages overlap: replies and probes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from service.decoding.fork_server import ForkServer
from service.engine import Engine
from service.observability.metrics import Metrics
from service.tests.inside import PATIENCE_S, scenario


async def until(client: httpx.AsyncClient, status: int) -> httpx.Response:
    while (reply := await client.get("/livez")).status_code != status:  # noqa: ASYNC110  as a probe does
        await asyncio.sleep(0.02)
    return reply


@pytest.mark.parametrize("stage", ["encode", "enhance"])
def test_a_model_that_hangs_is_told_by_livez_and_its_thread_replaced(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    hung, let_go, own = threading.Event(), threading.Event(), getattr(engine.reco, stage)

    def hanging(*arguments: Any, **options: Any) -> Any:
        if not let_go.is_set():
            hung.set()
            assert let_go.wait(PATIENCE_S)
        return own(*arguments, **options)

    async def work(client: httpx.AsyncClient) -> None:
        monkeypatch.setattr(engine.reco, stage, hanging)
        lost = asyncio.create_task(client.post("/embed/text", json={"texts": ["lost"]}))
        told = await until(client, 503)
        assert hung.is_set()
        assert "the text worker hangs" in told.json()["reason"]
        assert (await client.get("/readyz")).status_code == 503
        assert ((await lost).status_code, (await lost).json()["error"]["code"]) == (503, "worker_lost")
        let_go.set()
        assert (await client.post("/embed/text", json={"texts": ["found"]})).status_code == 200
        await until(client, 200)

    scenario(engine, work)


def test_a_model_that_hangs_does_not_hold_up_the_end(
    opened: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, reco, store = opened
    patient = Engine(
        settings.model_copy(update={"stall_s": 60.0, "drain_s": 0.5}),
        reco,
        store,
        Metrics(version="0", torch="0", faiss="0"),
        ForkServer(),
    )
    hung, let_go = threading.Event(), threading.Event()
    replies: list[asyncio.Task[httpx.Response]] = []

    def hanging(*_: Any) -> Any:
        hung.set()
        assert let_go.wait(PATIENCE_S)
        raise RuntimeError("too late")

    async def work(client: httpx.AsyncClient) -> None:
        monkeypatch.setattr(reco, "encode", hanging)
        replies.append(asyncio.create_task(client.post("/embed/text", json={"texts": ["lost"]})))
        while not hung.is_set():  # noqa: ASYNC110  set by the model's thread
            await asyncio.sleep(0.01)

    begun = time.monotonic()
    scenario(patient, work)
    assert time.monotonic() - begun < 20
    let_go.set()


def test_a_batcher_that_ends_is_put_back(engine: Engine) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        ended = engine.embedder.towers["text"]._batcher
        ended.max_batch = None  # type: ignore[assignment]  # it may change while serving; nonsense ends the loop
        assert (await client.post("/embed/text", json={"texts": ["lost"]})).status_code == 503
        assert "put back" in (await until(client, 503)).json()["reason"]
        await until(client, 200)
        assert engine.embedder.towers["text"]._batcher is not ended
        assert (await client.post("/embed/text", json={"texts": ["found"]})).status_code == 200

    scenario(engine, work)


def test_a_batch_is_encoded_while_the_one_before_is_enhanced(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    spans: dict[str, list[tuple[float, float]]] = {"encode": [], "enhance": []}

    def slowed(stage: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            time.sleep(0.05)
            made = own(*arguments, **options)
            spans[stage].append((start, time.perf_counter()))
            return made

        return run

    async def work(client: httpx.AsyncClient) -> None:
        for stage, found in spans.items():
            monkeypatch.setattr(engine.reco, stage, slowed(stage, getattr(engine.reco, stage)))
            found.clear()
        reply = await client.post("/embed/text", json={"texts": [f"text {i}" for i in range(12)]})
        assert reply.status_code == 200

    scenario(engine, work)
    overlaps = [a for a in spans["encode"] if any(a[0] < b[1] and b[0] < a[1] for b in spans["enhance"])]
    assert len(overlaps) >= 3


def test_a_large_request_is_decoded_while_its_first_batch_is_encoded(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, photos: dict[str, bytes]
) -> None:
    encoded, decoded, own, read = list[float](), list[float](), engine.reco.encode, engine.embedder.decoder.decode
    one_by_one = asyncio.Semaphore(2)
    files = [("file", photos[name]) for name in ("astronaut", "chelsea", "coffee")] * 3
    found: dict[str, list[list[float]]] = {}

    def encode(*arguments: Any) -> Any:
        encoded.append(time.perf_counter())
        return own(*arguments)

    async def decode(*arguments: Any) -> Any:
        # of nine images two at a time: the last are done well after the first batch has begun
        async with one_by_one:
            made = await read(*arguments)
            await asyncio.sleep(0.02)
        decoded.append(time.perf_counter())
        return made

    async def work(client: httpx.AsyncClient) -> None:
        for name, some in (("together", files), *((str(i), files[i : i + 1]) for i in range(3))):
            found[name] = [row["embedding"] for row in (await client.post("/embed/image", files=some)).json()["data"]]
            if name == "together":
                assert encoded[0] < decoded[-3]
                bad = await client.post("/embed/image?on_error=null", files=[*files[:7], ("file", b"broken")])
                assert [row["index"] for row in bad.json()["data"] if row["embedding"] is None] == [7]
                assert bad.json()["data"][7]["error"]["param"] == "images[7]"

    monkeypatch.setattr(engine.embedder.decoder, "decode", decode)

    async def warmed(client: httpx.AsyncClient) -> None:
        monkeypatch.setattr(engine.reco, "encode", encode)
        await work(client)

    scenario(engine, warmed)
    for i in range(9):
        np.testing.assert_allclose(found["together"][i], found[str(i % 3)][0], atol=1e-5)
