"""GPU clones, run with clones in host memory and compared with the original indexes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from index_store.errors import DeviceRefused
from index_store.search.filters import SearchParams
from index_store.search.gpu import HOST_MEMORY, ClonedIndex, DeviceThread
from index_store.snapshot import Snapshot
from index_store.store import Store
from index_store.tests.support.small import ENCODER, build_memory, some_pairs, unit_rows

RECIPES: dict[str, dict[str, Any]] = {
    "flat": {"index": "Flat"},
    "flat shards": {"index": "Flat", "shard_pairs": 70},
    "lists": {"index": "IVF4,SQfp16", "shard_pairs": 90},
    "lists and a short flat shard": {"index": "IVF4,SQfp16", "shard_pairs": 199},
    "codes compared again": {"index": "PQ4x4,RFlat", "shard_pairs": 100, "recall_floor": 0.5},
    "lists of codes compared again": {"index": "IVF4,PQ4x4,RFlat", "shard_pairs": 100, "recall_floor": 0.5},
    "lists behind a transform": {"index": "PCAR16,IVF4,Flat", "shard_pairs": 100, "recall_floor": 0.5},
}


def open_mapped_and_cloned(root: Path, **options: Any) -> tuple[Snapshot, Snapshot]:
    """One version opened twice, with mapped and with cloned indexes."""
    build_memory(root, some_pairs(200), **options)
    return Store(root).open("things", "v1", encoder=ENCODER), Store(root).open(
        "things", "v1", encoder=ENCODER, devices=[HOST_MEMORY, HOST_MEMORY]
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_clones_return_the_results_of_the_originals(tmp_path: Path, recipe: str) -> None:
    plain, cloned = open_mapped_and_cloned(tmp_path, **RECIPES[recipe])
    queries = unit_rows(9, 16, 5)
    for params in (
        SearchParams(),
        SearchParams(probes=1),
        SearchParams(probes=4),
        SearchParams(max_similarity=0.3),
        SearchParams(exclude=[["pair-3"]] * 9),
    ):
        for k in (1, 10, 200, 205):
            one, two = plain.retrieve(queries, "image", k, params), cloned.retrieve(queries, "image", k, params)
            np.testing.assert_array_equal(one.ids, two.ids)
            np.testing.assert_allclose(one.scores, two.scores, atol=1e-6)
    assert cloned.check_recall() == plain.check_recall()
    assert cloned.bytes["resident"] == 0


class ThreadRecorder:
    """An index that records the threads which search and free it."""

    def __init__(self, index: faiss.Index, threads: list[str]) -> None:
        self._index, self._threads = index, threads

    def search(self, *arguments: Any, **options: Any) -> Any:
        self._threads.append(threading.current_thread().name)
        return self._index.search(*arguments, **options)

    def __del__(self) -> None:
        self._threads.append(f"freed on {threading.current_thread().name}")


def test_searching_and_freeing_happen_on_the_device_thread_only(monkeypatch: pytest.MonkeyPatch) -> None:
    index, threads = faiss.IndexFlatIP(16), list[str]()
    index.add(unit_rows(50, 16, 0))
    monkeypatch.setattr(DeviceThread, "clone", lambda _, original: ThreadRecorder(original, threads))
    clone = ClonedIndex(index, DeviceThread.get(HOST_MEMORY))
    with ThreadPoolExecutor(8) as callers:
        begun = [callers.submit(clone.search, unit_rows(3, 16, seed), 5) for seed in range(40)]
        found = [search.result() for search in begun]
    np.testing.assert_array_equal(found[7][1], index.search(unit_rows(3, 16, 7), 5)[1])
    del clone, begun
    DeviceThread.get(HOST_MEMORY).submit(lambda: None).result()  # waits until the clone is freed
    assert threads == ["device--1_0"] * 40 + ["freed on device--1_0"]


def test_a_search_for_more_rows_than_a_gpu_returns_is_a_scan(tmp_path: Path) -> None:
    pairs = some_pairs(2500)
    build_memory(tmp_path, pairs, index="IVF4,SQfp16", shard_pairs=1300)
    cloned = Store(tmp_path).open("things", "v1", encoder=ENCODER, devices=[HOST_MEMORY])
    queries = unit_rows(2, 16, 5)
    found = cloned.retrieve(queries, "image", 2100, SearchParams(probes=1))
    np.testing.assert_array_equal(
        found.ids, pairs.ids[np.argsort(-(queries @ pairs.image.T), axis=1, kind="stable")[:, :2100]]
    )


def test_an_unknown_gpu_is_refused(tmp_path: Path) -> None:
    build_memory(tmp_path, some_pairs(20))
    with pytest.raises(DeviceRefused, match=r"device 99 is not there, faiss sees \d+ GPUs"):
        Store(tmp_path).open("things", "v1", encoder=ENCODER, devices=[99])


def test_an_index_that_cannot_be_cloned_is_refused(tmp_path: Path) -> None:
    build_memory(tmp_path, some_pairs(200), index="L2norm,Flat")
    with pytest.raises(
        DeviceRefused, match=r"an index of 200 rows cannot be put on device -1 \(clone not supported"
    ) as refused:
        Store(tmp_path).open("things", "v1", encoder=ENCODER, devices=[HOST_MEMORY])
    assert "\n" not in str(refused.value)
