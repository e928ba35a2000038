"""A lane whose model hangs, whose batcher ends, and whose two stages overlap: what callers and probes are told."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from index_store import Store
from models.reco import Reco
from models.starter import install_starter
from service.app import create_app
from service.engine import Engine
from service.loading import load_reco
from service.metrics import Metrics
from service.settings import Settings, read

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Reco, Store]:
    """The starter, loaded in this process: only here can its model be made to hang."""
    chosen = read({"store": tmp_path_factory.mktemp("store"), "device": "cpu", "stall_s": 1.0, "max_batch": 2}, environ={})
    store = Store(chosen.store)
    install_starter(store)
    return chosen, load_reco(chosen), store


@pytest.fixture
def engine(opened: tuple[Settings, Reco, Store]) -> Engine:
    return Engine(*opened, Metrics(version="0", torch="0", faiss="0"))


def scenario(engine: Engine, work: Callable[[httpx.AsyncClient], Any]) -> None:
    """Run `work` against the whole application, which starts and stops around it."""

    async def run() -> None:
        async with asyncio.timeout(PATIENCE_S), engine.running():
            transport = httpx.ASGITransport(create_app(engine))
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                await work(client)

    asyncio.run(run())


async def until(client: httpx.AsyncClient, status: int) -> httpx.Response:
    while (reply := await client.get("/livez")).status_code != status:  # noqa: ASYNC110  as a probe does
        await asyncio.sleep(0.02)
    return reply


@pytest.mark.parametrize("stage", ["encode", "enhance"])
def test_a_model_that_hangs_is_told_by_livez_and_its_thread_replaced(engine: Engine, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
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


def test_a_batcher_that_ends_is_put_back(engine: Engine) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        ended = engine._lanes["text"]._batcher
        ended.max_batch = None  # type: ignore[assignment]  # it may change while serving; nonsense ends the loop
        assert (await client.post("/embed/text", json={"texts": ["lost"]})).status_code == 503
        assert "put back" in (await until(client, 503)).json()["reason"]
        await until(client, 200)
        assert engine._lanes["text"]._batcher is not ended
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
