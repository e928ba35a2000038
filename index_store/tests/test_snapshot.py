import gc
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index_store.errors import QueryRefused, RecallTooLow
from index_store.search.filters import SearchParams
from index_store.snapshot import Snapshot
from index_store.store import Store
from index_store.tests.support.small import build_memory, open_memory, slice_pairs, some_pairs, unit_rows, unlock
from index_store.types import Pairs, Side, other

RECIPES: dict[str, dict[str, Any]] = {
    "flat": {"index": "Flat"},
    "four shards": {"index": "Flat", "shard_pairs": 61},
    "half precision": {"index": "SQfp16", "shard_pairs": 150},
    "lists": {"index": "IVF4,Flat"},
    "lists in two shards": {"index": "IVF4,Flat", "shard_pairs": 120},
    "lists and a short flat shard": {"index": "IVF4,Flat", "shard_pairs": 239},
}
N = 240


@pytest.fixture(scope="module", params=RECIPES)
def memory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pairs, Snapshot]:
    """A memory per recipe; its images have keys of another width than the vectors."""
    pairs = some_pairs(N, 16, key_width=24)
    return pairs, open_memory(tmp_path_factory.mktemp("store"), pairs, **RECIPES[request.param])


def ranking(pairs: Pairs, queries: np.ndarray, side: Side) -> tuple[np.ndarray, np.ndarray]:
    """(B, N) rows by brute force, best first, and their scores."""
    scores = queries @ pairs.keys(side).T
    order = np.argsort(-scores, axis=1, kind="stable")
    return order, np.take_along_axis(scores, order, axis=1)


def all_lists(snapshot: Snapshot) -> int | None:
    """The number of all lists, with which a recipe with lists is exact; None for other recipes."""
    return 4 if snapshot.manifest.index["probes"] else None


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("k", [1, 7, N, N + 5])
def test_searches_agree_with_brute_force(memory: tuple[Pairs, Snapshot], side: Side, count: int, k: int) -> None:
    pairs, snapshot = memory
    queries = unit_rows(count, pairs.keys(side).shape[1], 99)
    rows, scores = (found[:, :k] for found in ranking(pairs, queries, side))
    found = snapshot.retrieve(queries, side, k, SearchParams(probes=all_lists(snapshot)))
    present = min(k, N)
    assert found.mask.shape == found.ids.shape == found.scores.shape == (count, k)
    assert found.mask[:, :present].all()
    assert not found.mask[:, present:].any()
    np.testing.assert_array_equal(found.ids[:, :present], pairs.ids[rows])
    np.testing.assert_allclose(found.scores[:, :present], scores, atol=1e-6)
    np.testing.assert_array_equal(found.values[:, :present], pairs.values(other(side))[rows])
    assert not found.values[:, present:].any()
    assert not found.scores[:, present:].any()
    assert (found.ids[:, present:] == "").all()
    assert [found.ids.dtype.kind, found.scores.dtype.str, found.values.dtype.str] == ["U", "<f4", "<f4"]


def test_properties_of_a_snapshot(memory: tuple[Pairs, Snapshot]) -> None:
    _, snapshot = memory
    assert (len(snapshot), snapshot.dim, snapshot.ref) == (N, 16, "things@v1")
    assert (snapshot.key_kind("image"), snapshot.key_kind("text")) == ("trunk", "vector")
    assert snapshot.bytes["mapped"] > N * (16 + 16 + 24) * 2
    assert (snapshot.bytes["resident"] == N * 40 * 4) == (snapshot.manifest.index["recipe"] == "Flat")
    recall = snapshot.check_recall()
    assert min(recall.values()) >= 0.99
    assert recall == {side: snapshot.manifest.recall[side] for side in ("image", "text")}


def test_records_are_read_on_demand(memory: tuple[Pairs, Snapshot]) -> None:
    pairs, snapshot = memory
    queries = unit_rows(3, 16, 5)
    rows = ranking(pairs, queries, "text")[0][:, :4]
    found = snapshot.retrieve(queries, "text", 4, SearchParams(probes=all_lists(snapshot)))
    for b in range(3):
        assert found.records(b) == [{"id": pairs.ids[row], **pairs.records[row]} for row in rows[b]]
    one = found.row(2)
    assert len(one) == 1
    assert one.records(0) == found.records(2)
    np.testing.assert_array_equal(one.values, found.values[2:3])
    none = snapshot.retrieve(queries, "text", 4, SearchParams(max_similarity=-2.0))
    assert none.records(0) == []


def test_a_search_without_queries(memory: tuple[Pairs, Snapshot]) -> None:
    found = memory[1].retrieve(np.empty((0, 16), np.float32), "text", 3)
    assert found.values.shape == (0, 3, 16)


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (unit_rows(2, 16, 0), 3, re.escape("things@v1 compares image trunk keys of width 24, the queries are (2, 16)")),
        (unit_rows(2, 24, 0)[0], 3, "width 24"),
        (unit_rows(2, 24, 0), 0, "k is 0"),
        (np.full((1, 24), np.nan, np.float32), 3, "not finite"),
    ],
)
def test_queries_that_do_not_fit_are_refused(
    memory: tuple[Pairs, Snapshot], queries: np.ndarray, k: int, message: str
) -> None:
    with pytest.raises(QueryRefused, match=message):
        memory[1].retrieve(queries, "image", k)


def test_queries_of_other_layouts_are_converted(memory: tuple[Pairs, Snapshot]) -> None:
    queries = unit_rows(4, 16, 8)
    expected = memory[1].retrieve(queries, "text", 3)
    for same in (queries.astype(np.float64), np.asfortranarray(queries), np.repeat(queries, 2, axis=0)[::2]):
        np.testing.assert_array_equal(memory[1].retrieve(same, "text", 3).ids, expected.ids)


def test_integer_ids_and_unusual_names(tmp_path: Path) -> None:
    numbers = some_pairs(20, first=-7, ints=True)
    found = open_memory(tmp_path, numbers, name="numbers").retrieve(numbers.image[:3], "image", 22)
    assert found.ids.dtype == np.int64
    assert found.ids[:, 0].tolist() == [-7, -6, -5]
    assert found.ids[0, 20:].tolist() == [0, 0]
    words = some_pairs(3)
    named = Pairs(np.array(["naïve/ä", "日本", "a" * 200]), words.image, words.text, words.records)
    snapshot = open_memory(tmp_path, [some_pairs(5, seed=3), named], name="words", shard_pairs=6)
    assert snapshot.retrieve(named.image, "image", 1).ids[:, 0].tolist() == named.ids.tolist()


def test_repeated_captions_do_not_lower_recall(tmp_path: Path) -> None:
    few = unit_rows(3, 16, 1)[np.arange(600) % 3]
    pairs = some_pairs(600)
    snapshot = open_memory(tmp_path, Pairs(pairs.ids, pairs.image, few, pairs.records), index="IVF2,Flat")
    assert snapshot.check_recall()["text"] >= 0.99


def test_an_index_of_other_rows_fails_the_recall_check(tmp_path: Path) -> None:
    """The index of another version in this one: all counts agree, the answers do not."""
    import faiss

    from index_store.tests.storage.test_damage import reseal

    build_memory(tmp_path, some_pairs(300), index="SQfp16")
    path = unlock(tmp_path / "things" / "v1") / "shard-0000" / "image.faiss"
    index = faiss.index_factory(16, "SQfp16", faiss.METRIC_INNER_PRODUCT)
    rows = some_pairs(300).image[::-1].copy()
    index.train(rows)
    index.add(rows)
    faiss.write_index(index, str(path))
    reseal(tmp_path / "things" / "v1")
    snapshot = Store(tmp_path).open("things", "v1", encoder="@0123456789ab")
    with pytest.raises(RecallTooLow, match=r"things@v1: image recall@10 is 0\.\d+, the floor is 0.99"):
        snapshot.check_recall()


def test_search_parameters_travel_with_the_call(tmp_path: Path) -> None:
    """Concurrent searches of one list and of all lists: each gets its own parameters."""
    from concurrent.futures import ThreadPoolExecutor

    snapshot = open_memory(tmp_path, some_pairs(2000), index="IVF16,Flat")
    queries = unit_rows(20, 16, 4)
    alone = {probes: snapshot.retrieve(queries, "image", 10, SearchParams(probes=probes)).ids for probes in (1, 16)}
    assert (alone[1] != alone[16]).any()
    with ThreadPoolExecutor(4) as pool:
        together = list(
            pool.map(
                lambda probes: (probes, snapshot.retrieve(queries, "image", 10, SearchParams(probes=probes)).ids),
                [1, 16] * 20,
            )
        )
    for probes, ids in together:
        np.testing.assert_array_equal(ids, alone[probes])


def test_probes_reach_lists_behind_a_transform(tmp_path: Path) -> None:
    pairs = some_pairs(400)
    snapshot = open_memory(tmp_path, pairs, index="L2norm,IVF8,Flat", shard_pairs=200)
    queries = unit_rows(30, 16, 3)
    rows = ranking(pairs, queries, "image")[0][:, :10]
    share = {
        probes: np.mean(snapshot.retrieve(queries, "image", 10, SearchParams(probes=probes)).ids == pairs.ids[rows])
        for probes in (1, 8)
    }
    assert share[1] < 0.8
    assert share[8] > 0.95  # the transform normalises the rounded rows: scores move by 1e-4


@pytest.mark.parametrize("recipe", ["PQ4x4,RFlat", "IVF8,PQ4x4,RFlat", "PCA8,IVF8,SQ4,Refine(SQfp16)"])
def test_candidates_of_lossy_codes_are_compared_again(tmp_path: Path, recipe: str) -> None:
    pairs = some_pairs(600)
    snapshot = open_memory(tmp_path, pairs, index=recipe, shard_pairs=300, recall_floor=0.9)
    queries, lists = unit_rows(30, 16, 3), 8 if "IVF" in recipe else None
    rows = ranking(pairs, queries, "image")[0][:, :10]
    found = snapshot.retrieve(queries, "image", 10, SearchParams(probes=lists))
    assert np.mean([len({*mine} & {*exact}) / 10 for mine, exact in zip(found.ids, pairs.ids[rows], strict=True)]) > 0.9
    exact = {
        (b, name): score for b in range(30) for name, score in zip(pairs.ids, queries[b] @ pairs.image.T, strict=True)
    }
    np.testing.assert_allclose(found.scores, [[exact[b, name] for name in found.ids[b]] for b in range(30)], atol=1e-3)
    codes = build_memory(tmp_path, pairs, "v2", index=recipe.rpartition(",")[0], recall_floor=0.01)
    assert codes.recall["image"] < 0.8  # the codes alone, without the second comparison
    if lists is not None:
        assert (snapshot.retrieve(queries, "image", 10, SearchParams(probes=1)).ids != found.ids).any()


def count_maps(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
@pytest.mark.parametrize("recipe", ["Flat", "IVF4,Flat"])
def test_files_are_unmapped_with_the_last_reference(tmp_path: Path, recipe: str) -> None:
    snapshot = open_memory(tmp_path, some_pairs(300), name="mortal", index=recipe, shard_pairs=150)
    assert count_maps(tmp_path) >= 8
    assert Snapshot.count_open()["mortal"] == 1
    neighbors, watch = snapshot.retrieve(unit_rows(2, 16, 0), "image", 3), weakref.ref(snapshot)
    gc.disable()  # reference counts alone must free it
    try:
        del snapshot
        assert watch() is not None
        assert len(neighbors.records(0)) == 3
        del neighbors
        assert watch() is None
    finally:
        gc.enable()
    assert count_maps(tmp_path) == 0
    assert "mortal" not in Snapshot.count_open()


def test_an_open_version_outlives_its_deleted_files(tmp_path: Path) -> None:
    import shutil

    pairs = some_pairs(300)
    snapshot = open_memory(tmp_path, pairs, index="IVF4,Flat")
    shutil.rmtree(tmp_path / "things")
    found = snapshot.retrieve(pairs.image[:5], "image", 2, SearchParams(probes=4))
    assert found.ids[:, 0].tolist() == pairs.ids[:5].tolist()
    assert found.records(1)[0]["caption"] == "caption 1"


def test_block_sizes_do_not_change_the_files(tmp_path: Path) -> None:
    pairs = some_pairs(100)
    blocks = [slice_pairs(pairs, slice(a, b)) for a, b in ((0, 1), (1, 1), (1, 48), (48, 50), (50, 100))]
    whole = open_memory(tmp_path, pairs, "v1", shard_pairs=30)
    pieces = open_memory(tmp_path, blocks, "v2", shard_pairs=30)
    assert whole.manifest.files == pieces.manifest.files
    assert [shard["pairs"] for shard in whole.manifest.shards] == [30, 30, 30, 10]


@pytest.mark.parametrize("side", ["image", "text"])
def test_measured_recall_is_the_share_of_the_exact_ten_best(tmp_path: Path, side: Side) -> None:
    pairs = some_pairs(500)
    coarse = open_memory(tmp_path, pairs, index="SQ4", recall_floor=0.01)  # four bits per number: misses some
    queries = unit_rows(8, 16, seed=5)
    best = pairs.ids[ranking(pairs, queries, side)[0][:, :10]]  # (B, 10)
    found = coarse.retrieve(queries, side, 10).ids  # (B, 10)
    share = np.mean([len({*mine} & {*exact}) / 10 for mine, exact in zip(found, best, strict=True)])
    assert share < 1
    assert coarse.measure_recall(queries, side) == pytest.approx(share)


def test_measured_recall_in_a_memory_of_fewer_than_ten_pairs(tmp_path: Path) -> None:
    assert open_memory(tmp_path, some_pairs(3)).measure_recall(unit_rows(2, 16, seed=5), "image") == 1.0
