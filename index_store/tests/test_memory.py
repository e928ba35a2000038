import threading
import weakref
from pathlib import Path

import numpy as np

from index_store.memory import Memory
from index_store.snapshot import Snapshot
from index_store.tests.support.small import open_memory, some_pairs, unit_rows
from index_store.types import Pairs


def marked(root: Path, version: str, sign: int, name: str = "things") -> Snapshot:
    """A version with the same ids and images, texts times `sign`, and its name as captions.

    A result that mixes two versions shows in the texts and captions.
    """
    pairs = some_pairs(200)
    records = [{"caption": version} for _ in range(200)]
    texts = (sign * pairs.text).astype(np.float32)
    return open_memory(root, Pairs(pairs.ids, pairs.image, texts, records), version, name, shard_pairs=70)


def test_swap_returns_the_retired_snapshot(tmp_path: Path) -> None:
    one, two = marked(tmp_path, "v1", 1), marked(tmp_path, "v2", -1)
    memory = Memory(one)
    assert memory.current is one
    assert memory.swap(two) is one
    assert memory.current is two


def test_the_retired_snapshot_is_freed_with_its_last_reference(tmp_path: Path) -> None:
    memory = Memory(marked(tmp_path, "v1", 1, "retired"))
    batch, watch = memory.current, weakref.ref(memory.current)
    retired = memory.swap(marked(tmp_path, "v2", -1, "retired"))
    assert Snapshot.count_open()["retired"] == 2
    del retired
    assert watch() is batch
    del batch
    assert watch() is None
    assert Snapshot.count_open()["retired"] == 1


def test_searches_during_swaps_never_mix_versions(tmp_path: Path) -> None:
    versions = {"v1": marked(tmp_path, "v1", 1), "v2": marked(tmp_path, "v2", -1)}
    sign = {"v1": 1, "v2": -1}
    memory, queries, stop = Memory(versions["v1"]), unit_rows(3, 16, 5), threading.Event()
    truth = versions["v1"].retrieve(queries, "image", 4)
    answered = {"v1": 0, "v2": 0}
    trouble: list[object] = []

    def ask() -> None:
        while not stop.is_set():
            pinned = memory.current
            version = pinned.manifest.version
            found = pinned.retrieve(queries, "image", 4)
            if not (
                np.array_equal(found.ids, truth.ids) and np.array_equal(found.values, sign[version] * truth.values)
            ):
                trouble.append(found)
            if {record["caption"] for record in found.records(0)} != {version}:
                trouble.append(found.records(0))
            answered[version] += 1

    readers = [threading.Thread(target=ask) for _ in range(4)]
    for reader in readers:
        reader.start()
    turn = 0
    while (turn < 300 or min(answered.values()) < 20) and not trouble:
        memory.swap(versions["v2" if turn % 2 == 0 else "v1"])
        turn += 1
        stop.wait(0.001)
    stop.set()
    for reader in readers:
        reader.join()
    assert trouble == []


def test_many_swaps_leave_one_snapshot_and_no_mapped_files(tmp_path: Path) -> None:
    from index_store.store import Store
    from index_store.tests.support.small import ENCODER

    marked(tmp_path, "v1", 1, "swapped")
    marked(tmp_path, "v2", -1, "swapped")
    store, queries = Store(tmp_path), unit_rows(2, 16, 1)
    memory = Memory(store.open("swapped", "v1", encoder=ENCODER))
    mapped = Path("/proc/self/maps")
    before = mapped.read_text().count(str(tmp_path)) if mapped.exists() else 0
    for turn in range(40):
        memory.swap(store.open("swapped", f"v{turn % 2 + 1}", encoder=ENCODER))
        memory.current.retrieve(queries, "text", 3)
    assert Snapshot.count_open()["swapped"] == 1
    assert (mapped.read_text().count(str(tmp_path)) if mapped.exists() else 0) == before
