"""Hostile acts against a scripted service, and the verdict of a siege."""

import asyncio
import random
import time
from typing import Any

from loadtests.siege import verdicts
from loadtests.support.calls import open_client
from loadtests.support.hostile import Siege, hostile_calls
from loadtests.support.photos import crops
from loadtests.tests.conftest import Scripted

LATENCY = {"p50": 1.0, "p95": 2.0, "p99": 3.0, "max": 4.0}


def report(**changes: Any) -> dict[str, Any]:
    whole = {
        "faults": 0, "edits": {"200": 4}, "resident": {"growth": 0.01},
        "latency_ms": {"calm": LATENCY, "under siege": {**LATENCY, "p99": 5.0}},
    }  # fmt: skip
    return whole | changes


def test_a_siege_acts_at_its_rate_until_it_is_cancelled(scripted: Scripted) -> None:
    asked: list[str] = []

    def refuse(method: str, path: str, body: bytes) -> tuple[int, object, dict[str, str]]:
        asked.append(path)
        return 422, {"error": {}}, {}

    scripted.handle = refuse
    photo = next(photo for _, photo in crops(1))

    async def story() -> Siege:
        async with open_client(scripted.url) as client:
            siege = Siege(client, hostile_calls(photo, random.Random(0)), random.Random(1), 20)
            acting = asyncio.create_task(siege.run())
            await asyncio.sleep(3)
            acting.cancel()
            await asyncio.gather(acting, return_exceptions=True)
            return siege

    begun = time.monotonic()
    siege = asyncio.run(story())
    assert siege.codes[422] > 5
    assert {"/embed/text", "/embed/image"} <= {*asked}
    assert time.monotonic() - begun < 60


def test_every_target_decides() -> None:
    assert all(row["reached"] for row in verdicts(report()))
    for wrong in (
        {"faults": 1}, {"edits": {"200": 4, "503": 1}}, {"resident": {"growth": 0.05}},
        {"latency_ms": {"calm": LATENCY, "under siege": {**LATENCY, "p99": 7.0}}},
    ):  # fmt: skip
        assert [row["reached"] for row in verdicts(report(**wrong))].count(False) == 1
