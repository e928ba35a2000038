"""The sampler on real snapshots: what the gauge says is what brute force says, and only of the version being served."""

import asyncio
import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from index_store import Memory, Snapshot
from index_store.tests.small import opened, some_pairs, unit_rows
from models.reco import Timings
from service import recall
from service.errors import NotServing
from service.metrics import Metrics
from service.recall import RecallSampler
from service.work import Row

D = 16


def rows(count: int, seed: int = 1) -> list[Row]:
    """Answers as the model thread gives them, each searched with its own key."""
    return [Row(key, key, None, True, 0.5, [], Timings()) for key in unit_rows(count, D, seed)]


def gauge(metrics: Metrics, side: str = "image") -> float | None:
    return metrics.registry.get_sample_value("reco_recall_sampled", {"name": "things", "side": side})


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(version="0", torch="0", faiss="0")


@pytest.fixture
def coarse(tmp_path: Path) -> Snapshot:
    """Four bits a number: its index misses some of the exact answers."""
    return opened(tmp_path, some_pairs(500), index="SQ4", recall_floor=0.01)


def sampler(memory: Memory, metrics: Metrics, share: float = 0.01) -> RecallSampler:
    return RecallSampler(lambda _: memory.current, metrics, share=share)


def test_the_gauge_is_the_mean_over_checks_of_the_first_item_of_each_request(coarse: Snapshot, metrics: Metrics) -> None:
    sampled = sampler(Memory(coarse), metrics)
    expected = []
    for check in range(3):
        requests = [rows(2, seed=10 * check + i) for i in range(4)]
        for request in requests:
            sampled.note(coarse, "image", request)
        asyncio.run(sampled.check())
        expected.append(coarse.recall_of(np.stack([request[0].vector for request in requests]), "image"))
    assert min(expected) < 1
    assert gauge(metrics) == pytest.approx(np.mean(expected))
    assert gauge(metrics, "text") is None


def test_only_the_latest_queries_wait(coarse: Snapshot, metrics: Metrics) -> None:
    sampled, many = sampler(Memory(coarse), metrics), rows(40)
    for row in many:
        sampled.note(coarse, "image", [row])
    asyncio.run(sampled.check())
    latest = np.stack([row.vector for row in many[-recall.WAITING :]])
    assert gauge(metrics) == pytest.approx(coarse.recall_of(latest, "image"))


def test_plain_vectors_and_a_share_of_zero_are_never_sampled(coarse: Snapshot, metrics: Metrics) -> None:
    plain = [replace(row, searched=False) for row in rows(2)]
    never, sampled = sampler(Memory(coarse), metrics, share=0), sampler(Memory(coarse), metrics)
    never.note(coarse, "image", rows(2))
    sampled.note(coarse, "image", plain)
    sampled.note(None, "image", plain)
    asyncio.run(asyncio.wait_for(never.run(), 1))  # returns at once
    asyncio.run(sampled.check())
    assert gauge(metrics) is None


def test_after_a_swap_the_old_version_is_told_no_more(coarse: Snapshot, metrics: Metrics, tmp_path: Path) -> None:
    memory = Memory(coarse)
    sampled = sampler(memory, metrics)
    sampled.note(coarse, "image", rows(1))
    asyncio.run(sampled.check())
    assert gauge(metrics) is not None
    sampled.note(coarse, "image", rows(1))  # asked of the old version, checked after the swap
    other = opened(tmp_path, some_pairs(60, D, seed=3), "v2")
    memory.swap(other)
    asyncio.run(sampled.check())
    assert gauge(metrics) is None
    sampled.note(other, "image", rows(1))
    asyncio.run(sampled.check())
    assert gauge(metrics) == 1.0  # a flat index is exact


def test_a_memory_that_is_gone_is_told_no_more(coarse: Snapshot, metrics: Metrics) -> None:
    there = True

    def resolve(name: str) -> Snapshot:
        if there:
            return coarse
        raise NotServing(f"no memory {name}")

    sampled = RecallSampler(resolve, metrics, share=0.01)
    sampled.note(coarse, "image", rows(1))
    asyncio.run(sampled.check())
    there = False
    sampled.note(coarse, "image", rows(1))
    asyncio.run(sampled.check())
    assert gauge(metrics) is None


def test_a_sampled_snapshot_is_free_to_die(tmp_path: Path, metrics: Metrics) -> None:
    memory = Memory(opened(tmp_path, some_pairs(60, D)))
    sampled, held = sampler(memory, metrics), weakref.ref(memory.current)
    sampled.note(memory.current, "image", rows(1))
    asyncio.run(sampled.check())
    sampled.note(memory.current, "image", rows(1))
    memory.swap(opened(tmp_path, some_pairs(60, D), "v2"))
    gc.collect()
    assert held() is None


def test_a_check_that_fails_is_logged_and_the_next_one_goes_on(
    coarse: Snapshot, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recall, "PAUSE_S", 0.01)
    known: dict[str, Snapshot] = {}
    sampled = RecallSampler(known.__getitem__, metrics, share=1.0)  # the memory is gone: KeyError
    sampled.note(coarse, "image", rows(1))

    async def some_time() -> None:
        task = asyncio.create_task(sampled.run())
        await asyncio.sleep(0.1)
        assert not task.done()
        task.cancel()

    asyncio.run(some_time())
    assert "recall of live queries could not be measured" in caplog.text
