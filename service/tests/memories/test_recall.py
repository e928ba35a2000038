"""Recent queries, and the sampler on real snapshots: the gauge says what brute force says, and only
of the version being served.
"""

import asyncio
import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from index_store import Memory, Snapshot
from index_store.tests.support.small import open_memory, some_pairs, unit_rows
from models.encoder.encoder import Encoded, Encoder, EncoderSpec
from models.fusion.checkpoint import training_free_fusions
from models.reco import Reco, Timings
from models.tests.small import build_memory
from service.errors import ItemRefused, NotServing
from service.memories import recall
from service.memories.drift import lowest_mean, measure_drift
from service.memories.query_log import MAX_OF_REQUEST, MAX_QUERIES, QueryLog
from service.memories.recall import RecallSampler
from service.observability.metrics import Metrics
from service.pipeline.stages import EmbeddedItem

D = 16


def rows(count: int, seed: int = 1) -> list[EmbeddedItem]:
    """Answers as the model thread gives them, each searched with its own key."""
    return [EmbeddedItem(key, key, None, True, 0.5, [], Timings()) for key in unit_rows(count, D, seed)]


def gauge(metrics: Metrics, side: str = "image") -> float | None:
    return metrics.registry.get_sample_value("reco_recall_sampled", {"name": "things", "side": side})


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(version="0", torch="0", faiss="0")


@pytest.fixture
def coarse(tmp_path: Path) -> Snapshot:
    """Four bits a number: its index misses some of the exact answers."""
    return open_memory(tmp_path, some_pairs(500), index="SQ4", recall_floor=0.01)


def sampler(recent: QueryLog, memory: Memory, metrics: Metrics, share: float = 0.01) -> RecallSampler:
    return RecallSampler(recent, lambda _: memory.current, metrics, share=share)


def test_the_latest_of_each_memory_and_side_are_kept(coarse: Snapshot) -> None:
    recent, many = QueryLog(), [rows(3, seed=i) for i in range(200)]
    for request in many:
        recent.note(coarse, "image", request)
    kept = recent.latest("things", "image")
    assert kept is not None
    assert MAX_QUERIES <= len(kept.vectors) < MAX_QUERIES + 3
    np.testing.assert_array_equal(kept.vectors[-3:], [row.plain for row in many[-1]])
    latest = recent.latest("things", "image", 4)
    assert latest is not None
    np.testing.assert_array_equal(latest.vectors, [many[-2][2].plain, *(row.plain for row in many[-1])])
    assert recent.latest("things", "text") is None
    assert recent.counts() == {("things", "image"): 600}


def test_one_large_request_does_not_drive_out_all_others(coarse: Snapshot) -> None:
    recent = QueryLog()
    recent.note(coarse, "image", rows(2, seed=1))
    recent.note(coarse, "image", rows(200, seed=2))
    assert recent.counts() == {("things", "image"): 2 + MAX_OF_REQUEST}


def test_plain_vectors_and_refused_items_are_not_queries(coarse: Snapshot) -> None:
    recent, plain = QueryLog(), [replace(row, searched=False) for row in rows(2)]
    recent.note(coarse, "image", plain)
    recent.note(None, "image", rows(2))
    recent.note(coarse, "image", [ItemRefused("images[0]", ValueError())])
    assert recent.counts() == {}


@pytest.fixture(scope="module")
def reco(tmp_path_factory: pytest.TempPathFactory) -> Reco:
    """A tiny encoder with the training-free rule."""
    config = {
        "embed_dim": D,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(config))
    file = training_free_fusions("mean", D, alpha=2.0, k=4)
    return Reco(Encoder.load(EncoderSpec(str(path), "random", device="cpu")), file.fusions, file.fusion_id, file.k)


def test_drift_is_the_mean_and_the_5th_percentile_of_the_cosines(reco: Reco, tmp_path: Path) -> None:
    old, new = (
        build_memory(tmp_path, some_pairs(60, D, seed=seed), reco.encoder.fingerprint, name="things") for seed in (3, 4)
    )
    recent, asked = QueryLog(), [row for seed in range(41) for row in rows(1, seed)]
    for row in asked:
        recent.note(old, "image", [row])
    cosines = sorted(
        float(before.vectors[0] @ after.vectors[0])
        for before, after in (
            [reco.enhance(Encoded(row.plain[None], None), "image", memory) for memory in (old, new)] for row in asked
        )
    )
    found = measure_drift(reco, recent, old, new)
    assert found == {
        "image": {"mean": pytest.approx(sum(cosines) / 41), "p5": pytest.approx(cosines[2]), "queries": 41}
    }
    assert cosines[0] < cosines[2] < cosines[-1] < 0.99
    assert lowest_mean(found) == found["image"]["mean"]
    assert measure_drift(reco, recent, old, old)["image"]["p5"] == pytest.approx(1)


def test_the_gauge_is_the_mean_over_checks_of_the_latest_queries(coarse: Snapshot, metrics: Metrics) -> None:
    recent = QueryLog()
    sampled, expected = sampler(recent, Memory(coarse), metrics), []
    for check in range(3):
        asked = rows(20, seed=check)
        for row in asked:
            recent.note(coarse, "image", [row])
        asyncio.run(sampled.check())
        asyncio.run(sampled.check())  # nothing was asked since: nothing is measured again
        expected.append(
            coarse.measure_recall(np.stack([row.plain for row in asked[-recall.SAMPLE_QUERIES :]]), "image")
        )
    assert len({*expected}) > 1
    assert min(expected) < 1
    assert gauge(metrics) == pytest.approx(np.mean(expected))
    assert gauge(metrics, "text") is None


def test_with_a_share_of_zero_nothing_is_ever_measured(coarse: Snapshot, metrics: Metrics) -> None:
    recent = QueryLog()
    recent.note(coarse, "image", rows(2))
    # returns at once
    asyncio.run(asyncio.wait_for(sampler(recent, Memory(coarse), metrics, share=0).run(), 1))
    assert gauge(metrics) is None


def test_after_a_swap_the_old_version_is_told_no_more(coarse: Snapshot, metrics: Metrics, tmp_path: Path) -> None:
    memory, recent = Memory(coarse), QueryLog()
    sampled = sampler(recent, memory, metrics)
    recent.note(coarse, "image", rows(8, seed=5))
    asyncio.run(sampled.check())
    assert (gauge(metrics) or 1) < 1
    memory.swap(open_memory(tmp_path, some_pairs(60, D, seed=3), "v2"))
    asyncio.run(sampled.check())
    assert gauge(metrics) is None
    recent.note(memory.current, "image", rows(1))
    asyncio.run(sampled.check())
    assert gauge(metrics) == 1.0  # a flat index is exact


def test_a_memory_that_is_gone_is_told_no_more(coarse: Snapshot, metrics: Metrics) -> None:
    there, recent = True, QueryLog()

    def resolve(name: str) -> Snapshot:
        if there:
            return coarse
        raise NotServing(f"no memory {name}")

    sampled = RecallSampler(recent, resolve, metrics, share=0.01)
    recent.note(coarse, "image", rows(1))
    asyncio.run(sampled.check())
    assert gauge(metrics) is not None
    there = False
    asyncio.run(sampled.check())
    assert gauge(metrics) is None


def test_a_sampled_snapshot_is_free_to_die(tmp_path: Path, metrics: Metrics) -> None:
    memory, recent = Memory(open_memory(tmp_path, some_pairs(60, D))), QueryLog()
    sampled, held = sampler(recent, memory, metrics), weakref.ref(memory.current)
    recent.note(memory.current, "image", rows(1))
    asyncio.run(sampled.check())
    recent.note(memory.current, "image", rows(1))
    memory.swap(open_memory(tmp_path, some_pairs(60, D), "v2"))
    gc.collect()
    assert held() is None


def test_a_check_that_fails_is_logged_and_the_next_one_goes_on(
    coarse: Snapshot, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recall, "MIN_PAUSE_S", 0.01)
    known: dict[str, Snapshot] = {}
    recent = QueryLog()
    # the memory is gone: KeyError
    sampled = RecallSampler(recent, known.__getitem__, metrics, share=1.0)
    recent.note(coarse, "image", rows(1))

    async def some_time() -> None:
        task = asyncio.create_task(sampled.run())
        await asyncio.sleep(0.1)
        assert not task.done()
        task.cancel()

    asyncio.run(some_time())
    assert "recall of live queries could not be measured" in caplog.text
