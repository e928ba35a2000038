from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from index_store.build import index as indexing
from index_store.build import tuning as curve
from index_store.build.index import candidate_recipes, check_recipe
from index_store.build.tuning import MeasuredSetting, RelativeTimer
from index_store.errors import RecipeRefused
from index_store.search.filters import SearchParams
from index_store.search.probes import ProbeQueries
from index_store.search.shard import Shard
from index_store.search.sharded import ShardedIndex
from index_store.storage.manifest import Manifest
from index_store.tests.support.small import build_memory, normalize, open_memory, some_pairs, unit_rows
from index_store.types import SIDES, Pairs


@pytest.mark.parametrize(
    ("shard", "memory", "recipes"),
    [
        (1, 1, ["Flat"]),
        (50_000, 50_000, ["Flat"]),
        (50_001, 50_001, ["IVF256,SQfp16", "IVF1024,SQfp16"]),
        (1_000_000, 1_000_000, ["IVF1024,SQfp16", "IVF4096,SQfp16"]),
        (1_000_000, 9_000_000, ["IVF1024,SQfp16", "IVF4096,SQfp16"]),
        (30_000, 1_030_000, ["IVF128,SQfp16", "IVF512,SQfp16"]),
        (400, 1_000_400, ["Flat"]),
    ],
)
def test_auto_goes_by_size(shard: int, memory: int, recipes: list[str]) -> None:
    assert candidate_recipes("auto", shard, memory) == recipes


def test_what_is_asked_for_is_taken() -> None:
    assert candidate_recipes("SQfp16", 3, 10**9) == ["SQfp16"]


def test_both_widths_must_suit() -> None:
    check_recipe("PQ8", [16, 24])
    check_recipe("auto", [16, 20])
    with pytest.raises(RecipeRefused, match="'PQ8' is no faiss index over rows of width 20"):
        check_recipe("PQ8", [16, 20])


def clustered(n: int, width: int = 32) -> Pairs:
    """n pairs around 60 centres."""
    rng = np.random.default_rng(0)
    rows = [
        normalize(unit_rows(60, width, seed)[rng.integers(60, size=n)] + 0.4 * unit_rows(n, width, seed + 1))
        for seed in (5, 7)
    ]
    return replace(some_pairs(n, width), image=rows[0], text=rows[1])


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` tries lists from a thousand pairs on; a flat search is said to be slow, since a
    thousand rows tell nothing of that.
    """
    monkeypatch.setattr(indexing, "FLAT_PAIRS", 1000)
    monkeypatch.setattr(indexing, "SMALL_SHARD", 100)
    monkeypatch.setattr(
        indexing, "estimate_flat", lambda *_: MeasuredSetting("Flat", 0, {"image": 1.0, "text": 1.0}, 1.0, 1e6)
    )


def curve_of(manifest: Manifest, recipe: str) -> list[dict[str, float]]:
    return [point for point in manifest.index["curve"] if point["recipe"] == recipe]


def test_auto_takes_the_fewest_lists_that_surely_reach_the_floor(tmp_path: Path, small_is_large: None) -> None:
    snapshot = open_memory(tmp_path, clustered(4000), recall_floor=0.97)
    found = snapshot.manifest.index
    assert found["recipe"] == "IVF64,SQfp16"
    points = curve_of(snapshot.manifest, "IVF64,SQfp16")
    assert [point["probes"] for point in points] == sorted({point["probes"] for point in points})
    assert 1 < found["probes"] < 64
    chosen = next(point for point in points if point["probes"] == found["probes"])
    assert chosen["recall"] >= 0.97
    assert min(snapshot.check_recall().values()) == pytest.approx(chosen["recall"], abs=1e-4)
    fewer = [point for point in points if point["probes"] < found["probes"]]
    assert fewer[-1]["recall"] < 0.98  # within a standard error of the floor
    assert curve_of(snapshot.manifest, "Flat")[0]["ms"] == 1e6


def test_lists_hold_the_very_rows(tmp_path: Path, small_is_large: None) -> None:
    pairs = clustered(2000)
    snapshot = open_memory(tmp_path, pairs)
    asked = unit_rows(20, 32, 77)
    stored = pairs.image.astype(np.float16).astype(np.float32)
    exact = -np.sort(-(asked @ stored.T), axis=1)[:, :10]
    np.testing.assert_allclose(
        snapshot.retrieve(asked, "image", 10, SearchParams(probes=10_000)).scores, exact, atol=1e-6
    )


def test_finer_lists_are_tried_where_the_first_are_dear_and_kept_where_faster(
    tmp_path: Path, small_is_large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = clustered(2000)
    real, costs = curve.measure, {"IVF32,SQfp16": 2.0, "IVF128,SQfp16": 1.0}

    def measure(fans: Any, questions: Any, clock: Any, recipe: str, probes: int) -> MeasuredSetting:
        return replace(real(fans, questions, clock, recipe, probes), ms=costs[recipe])

    monkeypatch.setattr(curve, "measure", measure)
    monkeypatch.setattr(indexing, "ENOUGH_SPEEDUP", 1e9)
    finer = build_memory(tmp_path, pairs, "v1")
    assert finer.index["recipe"] == "IVF128,SQfp16"
    assert curve_of(finer, "IVF32,SQfp16")
    costs["IVF128,SQfp16"] = 3.0
    coarser = build_memory(tmp_path, pairs, "v2")
    assert coarser.index["recipe"] == "IVF32,SQfp16"
    assert curve_of(coarser, "IVF128,SQfp16")
    index: Any = faiss.read_index(str(tmp_path / "things" / "v2" / "shard-0000" / "text.faiss"))
    assert (index.nlist, index.ntotal) == (32, 2000)


def test_a_slower_minute_makes_no_search_dearer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down five times after the block was timed: a search of three blocks'
    work still costs three blocks.
    """
    manifest = build_memory(tmp_path, clustered(2000))
    fan = ShardedIndex([Shard(tmp_path / "things" / "v1", "shard-0000", 2000, manifest)], "image")
    questions = ProbeQueries.sample(fan)
    now, pace = 0.0, 1.0

    def work(blocks: float) -> None:
        nonlocal now
        now += blocks * pace

    monkeypatch.setattr(curve, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(curve, "build_flat_index", lambda rows: SimpleNamespace(search=lambda queries, k: work(1)))
    clock = RelativeTimer(dict.fromkeys(SIDES, fan), dict.fromkeys(SIDES, questions))
    block = clock.flat_ms("image", 2000)
    assert clock.flat_ms("image", 20_000) == pytest.approx(10 * block)
    pace = 5.0
    assert clock.ms("image", lambda queries: work(3)) == pytest.approx(3 * block)


def test_lists_that_are_no_faster_are_not_kept(
    tmp_path: Path, small_is_large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        indexing, "estimate_flat", lambda *_: MeasuredSetting("Flat", 0, {"image": 1.0, "text": 1.0}, 1.0, 0.0)
    )
    snapshot = open_memory(tmp_path, clustered(2500), shard_pairs=1500)
    assert (snapshot.manifest.index["recipe"], snapshot.manifest.index["probes"]) == ("Flat", 0)
    assert not [name for name in snapshot.manifest.files if name.endswith("faiss")]
    assert snapshot.check_recall() == {"image": 1.0, "text": 1.0}


def test_lossy_codes_reach_a_lower_floor(tmp_path: Path) -> None:
    manifest = build_memory(tmp_path, clustered(2000), index="IVF16,PQ16x4", recall_floor=0.3)
    assert manifest.index["asked"] == manifest.index["recipe"] == "IVF16,PQ16x4"
    assert 0.3 <= min(manifest.recall["image"], manifest.recall["text"]) < 0.99
    assert manifest.recall["floor"] == 0.3
