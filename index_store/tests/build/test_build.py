import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index_store.build.build import build_version
from index_store.build.tuning import MeasuredSetting
from index_store.errors import PairsRefused, RecallTooLow, RecipeRefused, StoreBusy, StoreError, VersionExists
from index_store.store import Store
from index_store.tests.support.small import (
    ENCODER,
    TRUNKS,
    VECTORS,
    build_memory,
    open_memory,
    some_pairs,
    store_is_empty,
    unit_rows,
)
from index_store.types import Pairs


def test_the_manifest_tells_what_was_built(tmp_path: Path) -> None:
    said: list[str] = []

    def blocks() -> Iterator[Pairs]:
        yield some_pairs(30, key_width=12)
        said.append("read")

    manifest = build_version(
        Store(tmp_path),
        "things",
        None,
        blocks(),
        encoder=ENCODER,
        kinds=TRUNKS,
        parent="things@v0",
        source=lambda: {"events": list(said)},
    )
    assert manifest == Store(tmp_path).manifest("things", manifest.version)
    assert (manifest.pairs, manifest.dim, manifest.encoder, manifest.parent) == (30, 16, ENCODER, "things@v0")
    assert manifest.keys == {"image": {"kind": "trunk", "dim": 12}, "text": {"kind": "vector", "dim": 16}}
    assert manifest.shards == [{"folder": "shard-0000", "pairs": 30}]
    assert {key: manifest.index[key] for key in ("asked", "recipe", "probes")} == {
        "asked": "auto",
        "recipe": "Flat",
        "probes": 0,
    }
    assert [(point["recipe"], point["recall"]) for point in manifest.index["curve"]] == [("Flat", 1.0)]
    assert manifest.recall == {"k": 10, "floor": 0.99, "image": 1.0, "text": 1.0}
    assert manifest.source == {"events": ["read"]}
    assert manifest.created.endswith("+00:00")
    assert sorted(path.name for path in (tmp_path / "things").iterdir()) == [manifest.version]
    with pytest.raises(StoreError, match="no current version"):
        Store(tmp_path).current("things")


def test_one_pair_is_a_memory(tmp_path: Path) -> None:
    snapshot = open_memory(tmp_path, some_pairs(1))
    assert snapshot.check_recall() == {"image": 1.0, "text": 1.0}
    found = snapshot.retrieve(unit_rows(2, 16, 0), "text", 10)
    assert found.mask.sum(axis=1).tolist() == [1, 1]


def test_auto_takes_lists_where_the_memory_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index_store.build.index.FLAT_PAIRS", 1000)
    monkeypatch.setattr("index_store.build.index.SMALL_SHARD", 100)
    monkeypatch.setattr(
        "index_store.build.index.estimate_flat",
        lambda *_: MeasuredSetting("Flat", 0, {"image": 1.0, "text": 1.0}, 1.0, 1e6),
    )
    centres = unit_rows(40, 16, 3)[np.arange(2050) % 40]
    rows = (centres + 0.05 * unit_rows(2050, 16, 4)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = replace(some_pairs(2050), image=rows, text=rows[::-1].copy())
    snapshot = open_memory(tmp_path, pairs, shard_pairs=1000)
    manifest = snapshot.manifest
    assert manifest.index["recipe"] == "IVF32,SQfp16"
    assert 1 <= manifest.index["probes"] < 32
    assert sorted(name for name in manifest.files if name.endswith("faiss")) == [
        f"shard-000{shard}/{side}.faiss" for shard in (0, 1) for side in ("image", "text")
    ]  # the last fifty rows are searched flat
    assert min(snapshot.check_recall().values()) >= 0.99
    exact = open_memory(tmp_path, pairs, "v2", index="Flat")
    asked = rows[::41]
    same = snapshot.retrieve(asked, "image", 10).ids == exact.retrieve(asked, "image", 10).ids
    assert same.mean() > 0.95


def changed_ids(*names: str) -> Pairs:
    return replace(some_pairs(len(names)), ids=np.array(names))


REFUSED: dict[str, tuple[list[Pairs], dict[str, Any], str]] = {
    "nothing": ([], {}, "no valid pair"),
    "only empty blocks": ([some_pairs(0)], {}, "no valid pair"),
    "an id twice in a block": ([changed_ids("a", "b", "a")], {}, "id 'a' comes twice"),
    "an id twice in two blocks": ([some_pairs(5), some_pairs(5, first=4)], {}, "id 'pair-4' comes twice"),
    "a number twice": ([some_pairs(5, ints=True), some_pairs(1, first=2, ints=True)], {}, "id 2 comes twice"),
    "numbers among words": ([some_pairs(5), some_pairs(5, ints=True)], {}, "id_kind"),
    "another width": ([some_pairs(5), some_pairs(5, 8, first=5)], {}, "dim 8, those before it 16"),
    "another key width": (
        [some_pairs(5, key_width=8), some_pairs(5, first=5, key_width=9)],
        {"kinds": TRUNKS},
        "a block has keys",
    ),
    "trunk without keys": ([some_pairs(5)], {"kinds": TRUNKS}, "compare trunk keys, but own keys are not given"),
    "keys without trunk": (
        [some_pairs(5, key_width=8)],
        {"kinds": VECTORS},
        "compare vector keys, but own keys are given",
    ),
    "not json": (
        [replace(some_pairs(1), records=[{"caption": "", "x": {1, 2}}])],
        {},
        "record of id 'pair-0' is not JSON",
    ),
    "nan in json": (
        [replace(some_pairs(1), records=[{"caption": "", "x": float("nan")}])],
        {},
        "record of id 'pair-0' is not JSON",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_blocks_leave_nothing(tmp_path: Path, case: str) -> None:
    blocks, options, message = REFUSED[case]
    with pytest.raises(PairsRefused, match=message) as refused:
        build_memory(tmp_path, blocks, shard_pairs=3, **options)
    assert "\n" not in str(refused.value)
    assert store_is_empty(tmp_path)


@pytest.mark.parametrize("recipe", ["IVF", "Flat,", "no such thing", "PQ7"])
def test_a_recipe_that_faiss_does_not_know(tmp_path: Path, recipe: str) -> None:
    with pytest.raises(RecipeRefused, match="try auto") as refused:
        build_memory(tmp_path, some_pairs(20), index=recipe)
    assert "\n" not in str(refused.value)
    assert store_is_empty(tmp_path)


def test_a_recipe_that_numbers_rows_itself_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeRefused, match="'IDMap,Flat' numbers its rows itself, which a shard does already: leave IDMap out"
    ):
        build_memory(tmp_path, some_pairs(20), index="IDMap,Flat")
    assert store_is_empty(tmp_path)


def test_a_recipe_that_cannot_be_searched_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError(
            "Error in void faiss::search() at /build/x.cpp:7: Error: 'params' failed: not supported\nmore"
        )

    monkeypatch.setattr("index_store.build.tuning.measure", refuse)
    with pytest.raises(
        RecipeRefused, match=r"^SQ8 cannot be filled or searched \('params' failed: not supported\): try auto"
    ) as refused:
        build_memory(tmp_path, some_pairs(20), index="SQ8")
    assert "\n" not in str(refused.value)
    assert store_is_empty(tmp_path)


def test_too_few_rows_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(RecipeRefused, match="IVF64,Flat cannot be trained on 20 image rows"):
        build_memory(tmp_path, some_pairs(20), index="IVF64,Flat")
    assert store_is_empty(tmp_path)


def test_an_index_below_the_floor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecallTooLow, match=r"SQ4 finds 0\.\d+ of the (image|text) side's best 10, the floor is 0.99"):
        build_memory(tmp_path, some_pairs(500), index="SQ4")
    assert store_is_empty(tmp_path)
    low = build_memory(tmp_path, some_pairs(500), index="SQ4", recall_floor=0.01)
    assert min(low.recall["image"], low.recall["text"]) < 0.95


def test_a_version_is_never_overwritten(tmp_path: Path) -> None:
    build_memory(tmp_path, some_pairs(5))
    with pytest.raises(VersionExists, match="things@v1 exists already"):
        build_memory(tmp_path, some_pairs(6))
    assert len(Store(tmp_path).open("things", "v1", encoder=ENCODER)) == 5
    assert [path.name for path in (tmp_path / "things").iterdir()] == ["v1"]


def test_an_interrupted_source_leaves_nothing(tmp_path: Path) -> None:
    def blocks() -> Iterator[Pairs]:
        yield some_pairs(50)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_memory(tmp_path, blocks(), shard_pairs=20)
    assert store_is_empty(tmp_path)
    assert len(open_memory(tmp_path, some_pairs(50))) == 50


def test_an_error_of_the_source_stays_its_own(tmp_path: Path) -> None:
    def blocks() -> Iterator[Pairs]:
        yield some_pairs(5)
        raise FileNotFoundError("photos.tar")

    with pytest.raises(FileNotFoundError, match="photos"):
        build_memory(tmp_path, blocks())
    assert store_is_empty(tmp_path)


def test_two_builders_of_one_version(tmp_path: Path) -> None:
    started, go = threading.Event(), threading.Event()

    def slow() -> Iterator[Pairs]:
        yield some_pairs(20)
        started.set()
        go.wait(20)
        yield some_pairs(20, first=20)

    results: list[object] = []
    first = threading.Thread(target=lambda: results.append(build_memory(tmp_path, slow())))
    first.start()
    started.wait(20)
    with pytest.raises(StoreBusy, match="things@v1 is being built by another process"):
        build_memory(tmp_path, some_pairs(5))
    assert build_memory(tmp_path, some_pairs(7), "v2").pairs == 7  # another version of the same memory is free
    go.set()
    first.join()
    assert len(results) == 1
    assert len(Store(tmp_path).open("things", "v1", encoder=ENCODER)) == 40


def test_many_builders_race_and_one_wins(tmp_path: Path) -> None:
    won: list[int] = []
    lost: list[StoreError] = []

    def race(n: int) -> None:
        try:
            build_memory(tmp_path, some_pairs(n))
            won.append(n)
        except (StoreBusy, VersionExists) as error:
            lost.append(error)

    racers = [threading.Thread(target=race, args=[n]) for n in range(3, 11)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert (len(won), len(lost)) == (1, 7)
    assert len(Store(tmp_path).open("things", "v1", encoder=ENCODER)) == won[0]
    assert Store(tmp_path).versions("things") == ["v1"]
