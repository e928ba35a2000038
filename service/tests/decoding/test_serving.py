"""Decoding processes under the whole service: deadlines, readiness, and the end of the process."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from service.app import create_app
from service.engine import Engine
from service.tests.conftest import Server
from service.tests.inside import PATIENCE_S, scenario

SLOW_SIZE = (7000, 7000)


def slow_jpeg() -> bytes:
    """Seconds of decoding in a few kilobytes."""
    file = io.BytesIO()
    Image.new("RGB", SLOW_SIZE, "teal").save(file, "JPEG", progressive=True)
    once = file.getvalue()
    last = once.rfind(b"\xff\xda")
    return once[:-2] + once[last:-2] * 50 + once[-2:]


def test_slow_images_keep_to_their_deadline_and_hold_up_nobody(engine: Engine, photos: dict[str, bytes]) -> None:
    slow = slow_jpeg()

    async def work(client: httpx.AsyncClient) -> None:
        headers = {"X-Request-Timeout-Ms": "1000"}
        begun = time.monotonic()
        late = [
            asyncio.create_task(client.post("/embed/image", content=slow, headers=headers | JPEG)) for _ in range(4)
        ]
        await asyncio.sleep(0.5)
        good = await client.post("/embed/image", content=photos["coffee"], headers=JPEG)
        assert good.status_code == 200
        replies = await asyncio.gather(*late)
        assert [(r.status_code, r.json()["error"]["code"]) for r in replies] == [(504, "deadline_passed")] * 4
        assert time.monotonic() - begun < 20
        assert (await client.post("/embed/image", content=photos["coffee"], headers=JPEG)).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        text = (await client.get("/metrics")).text
        assert 'reco_decoder_workers{state="busy"}' in text
        assert "reco_decoder_queue_depth 0.0" in text

    scenario(engine, work)


def test_a_decoder_that_answers_nothing_is_told_by_readyz(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.pipeline.watchdog.IDLE_S", 0.05)
    monkeypatch.setattr("service.pipeline.watchdog.STALE_S", 2.0)

    async def work(client: httpx.AsyncClient) -> None:
        for worker in engine.embedder.decoder._workers:
            os.kill(worker.pid, signal.SIGSTOP)
        while "no image has been decoded" not in await told(client, "/readyz", 503):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        # a test item is killed at its deadline, and the process with it
        assert await told(client, "/readyz", 200) == ""

    scenario(engine, work)


def test_a_decoder_without_processes_is_told_by_livez(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise OSError(11, "Resource temporarily unavailable")

    async def work(client: httpx.AsyncClient) -> None:
        decoder = engine.embedder.decoder
        with monkeypatch.context() as patch:
            patch.setattr("service.decoding.decoder.fork_worker", refused)
            workers = list(decoder._workers)
            for worker in workers:
                os.kill(worker.pid, signal.SIGKILL)
            while any(worker.alive for worker in workers):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            with_deadline = {"X-Request-Timeout-Ms": "500"} | JPEG
            assert (await client.post("/embed/image", content=b"GIF89a", headers=with_deadline)).status_code == 504
            assert "Resource temporarily unavailable" in await told(client, "/livez", 503)
        assert await told(client, "/livez", 200) == ""

    scenario(engine, work)


def test_an_image_that_is_being_decoded_when_the_service_ends_is_answered_503(engine: Engine) -> None:
    async def run() -> None:
        transport = httpx.ASGITransport(create_app(engine))
        async with asyncio.timeout(PATIENCE_S), httpx.AsyncClient(transport=transport, base_url=LOCAL) as client:
            async with engine.running():
                inside = asyncio.create_task(client.post("/embed/image", content=slow_jpeg(), headers=JPEG))
                while len(engine.embedder.decoder._idle) == engine.settings.decode_workers:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            reply = await inside
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_serving")

    asyncio.run(run())


LOCAL = "http://127.0.0.1"
JPEG = {"Content-Type": "image/jpeg"}


async def told(client: httpx.AsyncClient, path: str, status: int) -> str:
    """The reason of a probe, once it answers with that status."""
    give_up = time.monotonic() + PATIENCE_S / 2
    while time.monotonic() < give_up:
        reply = await client.get(path)
        if reply.status_code == status:
            return str(reply.json().get("reason", ""))
        await asyncio.sleep(0.02)
    raise AssertionError(f"{path} never answered {status}: {reply.text}")


def test_no_process_outlives_the_service(serve: Callable[..., Server], tmp_path: Path) -> None:
    running = serve(tmp_path / "store", RECO_DECODE_WORKERS="3")
    family = descendants(running.process.pid)
    assert len(family) == 4  # the fork server and what it forked
    os.kill(running.process.pid, signal.SIGKILL)
    give_up = time.monotonic() + 10
    while any(alive(pid) for pid in family) and time.monotonic() < give_up:
        time.sleep(0.02)
    assert not [pid for pid in family if alive(pid)]


def test_an_orderly_end_answers_the_image_that_is_being_decoded(
    serve: Callable[..., Server], tmp_path: Path, photos: dict[str, bytes]
) -> None:
    running = serve(tmp_path / "store")
    family = descendants(running.process.pid)
    with running.client() as client:
        for pid in family:  # as a terminal or a service manager does: to the whole group
            os.kill(pid, signal.SIGTERM)
        assert client.post("/embed/image", content=photos["coffee"], headers=JPEG).status_code == 200
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(20) == 0
    give_up = time.monotonic() + 10
    while any(alive(pid) for pid in family) and time.monotonic() < give_up:
        time.sleep(0.02)
    assert not [pid for pid in family if alive(pid)]


def descendants(pid: int) -> list[int]:
    found = [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    return found + [each for child in found for each in descendants(child)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
