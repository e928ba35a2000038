"""Hostile acts against a scripted service, and the verdict of a hostile_load."""

import asyncio
import random
import time
from typing import Any

from loadtests.hostile_load import verdicts
from loadtests.support.calls import open_client
from loadtests.support.hostile import HostileLoad, hostile_calls
from loadtests.support.photos import crops
from loadtests.tests.conftest import Scripted

LATENCY = {"p50": 1.0, "p95": 2.0, "p99": 3.0, "max": 4.0}


def report(**changes: Any) -> dict[str, Any]:
    whole = {
        "faults": 0, "edits": {"200": 4}, "resident": {"growth": 0.01},
        "latency_ms": {"baseline": LATENCY, "with hostile callers": {**LATENCY, "p99": 5.0}},
    }  # fmt: skip
    return whole | changes


def test_hostile_load_acts_at_its_rate_until_it_is_cancelled(scripted: Scripted) -> None:
    asked: list[str] = []

    def refuse(method: str, path: str, body: bytes) -> tuple[int, object, dict[str, str]]:
        asked.append(path)
        return 422, {"error": {}}, {}

    scripted.handle = refuse
    photo = next(photo for _, photo in crops(1))

    async def story() -> HostileLoad:
        async with open_client(scripted.url) as client:
            hostile_load = HostileLoad(client, hostile_calls(photo, random.Random(0)), random.Random(1), 20)
            acting = asyncio.create_task(hostile_load.run())
            await asyncio.sleep(3)
            acting.cancel()
            await asyncio.gather(acting, return_exceptions=True)
            return hostile_load

    begun = time.monotonic()
    hostile_load = asyncio.run(story())
    assert hostile_load.codes[422] > 5
    assert {"/embed/text", "/embed/image"} <= {*asked}
    assert time.monotonic() - begun < 60


def test_every_target_decides() -> None:
    assert all(row["reached"] for row in verdicts(report()))
    for wrong in (
        {"faults": 1}, {"edits": {"200": 4, "503": 1}}, {"resident": {"growth": 0.05}},
        {"latency_ms": {"baseline": LATENCY, "with hostile callers": {**LATENCY, "p99": 7.0}}},
    ):  # fmt: skip
        assert [row["reached"] for row in verdicts(report(**wrong))].count(False) == 1
