"""Edits in memory: each snapshot keeps its state whatever edits follow."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index_store.edits.changes import Delete, encode_ids, make_put
from index_store.edits.overlay import MIN_BOUNDED_ROWS, Overlay
from index_store.search.filters import SearchParams
from index_store.snapshot import Snapshot
from index_store.tests.support.oracle import Oracle
from index_store.tests.support.small import normalize, open_memory, slice_pairs, some_pairs, unit_rows
from index_store.types import Id, Pairs, Side

RECIPES: list[dict[str, Any]] = [
    {"index": "Flat"},
    {"index": "Flat", "shard_pairs": 25},
    {"index": "IVF4,Flat"},
    {"index": "SQfp16"},
]


def put(overlay: Overlay, pairs: Pairs) -> Snapshot:
    return overlay.apply(make_put(pairs, overlay.base.manifest, overlay.base.id_kind))


def delete(overlay: Overlay, ids: list[Id]) -> Snapshot:
    return overlay.apply(Delete(encode_ids(ids, overlay.base.id_kind, "things@v1")))


@pytest.mark.parametrize("options", RECIPES, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("queries", [1, 4, 5, 40])
def test_added_replaced_and_deleted_pairs(tmp_path: Path, options: dict[str, Any], queries: int) -> None:
    base = some_pairs(60, key_width=24)
    overlay, oracle = Overlay(open_memory(tmp_path, base, **options)), Oracle(base)
    for step in range(4):
        more = some_pairs(30, key_width=24, seed=step + 1, first=20 * step)
        oracle.put(more)
        put(overlay, more)
        oracle.delete([f"pair-{5 * step}", f"pair-{5 * step + 31}"])
        snapshot = delete(overlay, [f"pair-{5 * step}", f"pair-{5 * step + 31}"])
        probes = 4 if "IVF" in str(options["index"]) else None
        sides: tuple[Side, Side] = ("image", "text")
        for side, width in zip(sides, (24, 16), strict=True):
            for k in (7, 200):
                oracle.assert_agrees(snapshot, unit_rows(queries, width, step), side, k, SearchParams(probes=probes))
    assert (snapshot.edits, snapshot.ref) == (8, "things@v1+8")


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_a_delta_with_score_bounds_is_exact(tmp_path: Path, spread: float) -> None:
    """Enough rows for score bounds, in few directions (few candidates) or in all (many)."""
    rng = np.random.default_rng(1)
    base, more = some_pairs(300, 32, key_width=40), some_pairs(MIN_BOUNDED_ROWS + 500, 32, key_width=40, first=250)
    low_rank = rng.standard_normal((len(more), 4)) @ unit_rows(4, 40, 5)
    keys = normalize(low_rank + spread * rng.standard_normal((len(more), 40)) / 40**0.5)
    more = Pairs(more.ids, more.image, more.text, more.records, image_key=keys)
    base = Pairs(base.ids, base.image, base.text, base.records, image_key=keys[-300:])
    overlay, oracle = Overlay(open_memory(tmp_path, base, index="IVF4,Flat")), Oracle(base)
    for rows in (slice(0, 900), slice(900, 1100), slice(1100, None)):
        oracle.put(slice_pairs(more, rows))
        snapshot = put(overlay, slice_pairs(more, rows))
    oracle.delete(["pair-1200", "pair-4"])
    snapshot = delete(overlay, ["pair-1200", "pair-4"])
    for queries in (1, 40):
        oracle.assert_agrees(snapshot, normalize(keys[:queries] + 0.01), "image", 10, SearchParams(probes=4))
        oracle.assert_agrees(
            snapshot,
            unit_rows(queries, 40, 7),
            "image",
            10,
            SearchParams(probes=4, max_similarity=0.3, exclude=[["pair-3"]] * queries),
        )
        oracle.assert_agrees(snapshot, unit_rows(queries, 32, 7), "text", 400, SearchParams(probes=4))


def test_a_snapshot_never_changes(tmp_path: Path) -> None:
    """Columns grow, ids get longer, pairs are replaced and deleted: old snapshots stay the same."""
    base = some_pairs(50)
    overlay, oracle = Overlay(open_memory(tmp_path, base)), Oracle(base)
    states: list[tuple[Snapshot, dict[Id, object]]] = [(overlay.snapshot, dict(oracle.pairs_by_id))]
    for step in range(30):
        more = some_pairs(60, seed=step, first=37 * step)
        named = Pairs(
            np.array([name + "x" * (step // 10) * 20 for name in more.ids.tolist()]),
            more.image,
            more.text,
            more.records,
        )
        for pairs in (more, named) if step % 10 == 9 else (more,):
            oracle.put(pairs)
            snapshot = put(overlay, pairs)
        states.append((snapshot, dict(oracle.pairs_by_id)))
    queries = unit_rows(2, 16, 4)
    for snapshot, there in states:
        old = Oracle(base)
        old.pairs_by_id = there  # type: ignore[assignment]
        old.assert_agrees(snapshot, queries, "image", 20)
        old.assert_agrees(snapshot, queries, "text", len(there) + 3)


def test_snapshots_of_edits_share_all_files(tmp_path: Path) -> None:
    base = open_memory(tmp_path, some_pairs(50))
    overlay = Overlay(base)
    snapshot = put(overlay, some_pairs(3, first=50))
    assert snapshot.manifest is base.manifest
    assert snapshot._base_indexes is base._base_indexes
    assert (len(base), base.edits, base.ref) == (50, 0, "things@v1")
    assert (len(snapshot), snapshot.edits, snapshot.ref) == (53, 1, "things@v1+1")
    assert snapshot.bytes["mapped"] == base.bytes["mapped"]
    assert snapshot.bytes["resident"] >= base.bytes["resident"] + 3 * 16 * (2 + 4) * 2
    assert snapshot.check_recall() == base.check_recall()


def test_snapshots_of_edits_are_freed_with_their_last_reference(tmp_path: Path) -> None:
    overlay = Overlay(open_memory(tmp_path, some_pairs(20), name="mortal"))
    held = put(overlay, some_pairs(2, first=50))
    for n in range(5):
        put(overlay, some_pairs(2, first=60 + n))
    assert Snapshot.count_open()["mortal"] == 1  # six snapshots of one opened version
    watched = weakref.ref(held)
    del held
    assert watched() is None


def test_added_ids_longer_than_any_of_the_base(tmp_path: Path) -> None:
    base = some_pairs(5)
    overlay, oracle = Overlay(open_memory(tmp_path, base)), Oracle(base)
    more = some_pairs(3, seed=9)
    named = Pairs(np.array(["pair-3", "pair-3" + "ä" * 100, "日本"]), more.image, more.text, more.records)
    oracle.put(named)
    snapshot = put(overlay, named)
    assert snapshot.retrieve(named.image, "image", 1).ids[:, 0].tolist() == named.ids.tolist()
    params = SearchParams(exclude=[["pair-3" + "ä" * 100], ["pair-3"], []])
    oracle.assert_agrees(snapshot, unit_rows(3, 16, 0), "image", 9, params)
    oracle.delete(["pair-3" + "ä" * 100])
    oracle.assert_agrees(delete(overlay, ["pair-3" + "ä" * 100]), unit_rows(3, 16, 0), "image", 9)


def test_many_near_tombstones_are_passed_over(tmp_path: Path) -> None:
    """Thousands of deleted pairs are nearer than any live one: a scan finds the live ones."""
    n = 3000
    pairs = some_pairs(n)
    image = pairs.image.copy()
    image[: n - 5] = image[0]
    base = Pairs(pairs.ids, image, pairs.text, pairs.records)
    for recipe in ("Flat", "IVF4,Flat"):
        overlay, oracle = Overlay(open_memory(tmp_path, base, recipe.replace(",", "-"), index=recipe)), Oracle(base)
        ids: list[Id] = base.ids[: n - 5].tolist()
        oracle.delete(ids)
        snapshot = delete(overlay, ids)
        oracle.assert_agrees(snapshot, image[:2], "image", 10, SearchParams(probes=4))
        params = SearchParams(probes=4, max_similarity=0.5, exclude=[[ids[0]], [str(base.ids[-1])]])
        oracle.assert_agrees(snapshot, image[:2], "image", 3, params)


def test_all_pairs_deleted(tmp_path: Path) -> None:
    base = some_pairs(6, ints=True)
    overlay = Overlay(open_memory(tmp_path, base))
    snapshot = delete(overlay, base.ids.tolist())
    assert len(snapshot) == 0
    found = snapshot.retrieve(base.image[:2], "image", 3)
    assert not found.mask.any()
    back = put(overlay, slice_pairs(base, slice(2, 4)))
    assert back.retrieve(base.image[:1], "image", 3).mask.tolist() == [[True, True, False]]
    assert next(iter(back.blocks())).ids.tolist() == [2, 3]


@pytest.mark.parametrize("ints", [False, True])
def test_rows_are_found_by_id(tmp_path: Path, ints: bool) -> None:
    pairs = some_pairs(500, ints=ints, first=-20 if ints else 0)
    mixed = pairs.ids[np.random.default_rng(3).permutation(500)]
    shuffled = Pairs(mixed, pairs.image, pairs.text, pairs.records)
    base = open_memory(tmp_path, shuffled, shard_pairs=120)
    stored = encode_ids(shuffled.ids.tolist(), base.id_kind, "")
    assert base.find_rows(stored).tolist() == list(range(500))
    strange: list[Id] = (
        [-21, 480, 2**63 - 1, -(2**63)] if ints else ["", "pair", "pair-", "pair-4999", "zz", "pair-7" + "x" * 90, "ä"]
    )
    assert base.find_rows(encode_ids(strange, base.id_kind, "")).tolist() == [-1] * len(strange)
    assert base.find_rows(stored[:0]).tolist() == []


def test_blocks_hold_the_live_pairs(tmp_path: Path) -> None:
    base = some_pairs(60, key_width=24)
    overlay, oracle = Overlay(open_memory(tmp_path, base, shard_pairs=25)), Oracle(base)
    more = some_pairs(30, key_width=24, seed=5, first=45)
    oracle.put(more)
    put(overlay, more)
    oracle.delete(["pair-0", "pair-50", "pair-70"])
    snapshot = delete(overlay, ["pair-0", "pair-50", "pair-70"])
    blocks = list(snapshot.blocks(rows=16))
    assert [max(len(block) for block in blocks) <= 16, sum(map(len, blocks))] == [True, len(snapshot)]
    assert {name for block in blocks for name in block.ids.tolist()} == set(oracle.pairs_by_id)
    for block in blocks:
        for i, name in enumerate(block.ids.tolist()):
            pair = oracle.pairs_by_id[name]
            assert block.records[i] == pair["record"]
            assert block.image_key is not None
            assert block.text_key is None
            np.testing.assert_array_equal(block.image[i], pair["image"])
            np.testing.assert_array_equal(block.image_key[i], pair["image_key"])
