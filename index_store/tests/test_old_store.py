"""Stores written by version 0.1.0: they open, verify, search and take edits."""

import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest

from index_store.editor import Editor
from index_store.snapshot import Snapshot
from index_store.store import Store
from index_store.tests.support.oracle import Oracle
from index_store.tests.support.small import ENCODER, some_pairs, unit_rows
from index_store.types import Pairs

ARCHIVE = Path(__file__).parent / "data" / "store-0.1.0.tar.gz"
VERSIONS = {
    ("things", "v1"): some_pairs(40, 16, key_width=24),
    ("things", "v2"): some_pairs(30, 16, seed=5, key_width=24),
    ("numbers", "n1"): some_pairs(20, 16, ints=True),
}
ADDED_ONLINE = some_pairs(3, 16, seed=9, first=100, key_width=24)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return Store(tmp_path / "store")


def expected_pairs(name: str, version: str) -> Oracle:
    """What a version of the archive holds, its journal included."""
    oracle = Oracle(VERSIONS[name, version])
    if version == "v2":
        oracle.put(ADDED_ONLINE)
        oracle.delete(["pair-4"])
    return oracle


def assert_searches_agree(oracle: Oracle, snapshot: Snapshot, pairs: Pairs) -> None:
    for k in (1, 7, 60):
        oracle.assert_agrees(snapshot, unit_rows(5, pairs.keys("image").shape[1], seed=3), "image", k)
        oracle.assert_agrees(snapshot, unit_rows(5, 16, seed=4), "text", k)


def file_digests(root: Path) -> dict[str, str]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_names_and_pointers_are_read(store: Store) -> None:
    assert {name: store.versions(name) for name in store.names()} == {"numbers": ["n1"], "things": ["v1", "v2"]}
    assert (store.current("things"), store.previous("things")) == ("v2", "v1")
    assert (store.current("numbers"), store.previous("numbers")) == ("n1", None)
    assert (store.count_edits("things", "v1"), store.count_edits("things", "v2")) == (0, 2)


@pytest.mark.parametrize(("name", "version"), VERSIONS)
def test_every_version_opens_verifies_and_searches(store: Store, name: str, version: str) -> None:
    before = file_digests(store.root)
    store.verify(name, version)
    snapshot, pairs = store.open(name, version, encoder=ENCODER), VERSIONS[name, version]
    assert snapshot.manifest.pairs == len(pairs)
    assert min(snapshot.check_recall().values()) == 1.0
    assert_searches_agree(expected_pairs(name, version), snapshot, pairs)
    assert file_digests(store.root) == before  # reading writes nothing into the store


def test_the_journal_is_replayed(store: Store) -> None:
    snapshot = store.open("things", encoder=ENCODER)
    assert (snapshot.ref, len(snapshot)) == ("things@v2+2", 32)
    nearest = snapshot.retrieve(ADDED_ONLINE.keys("image"), "image", 1)
    assert nearest.ids[:, 0].tolist() == ["pair-100", "pair-101", "pair-102"]
    np.testing.assert_array_equal(nearest.values[:, 0], ADDED_ONLINE.text)
    assert "pair-4" not in snapshot.retrieve(unit_rows(1, 24, seed=1), "image", 40).ids[0].tolist()


def test_the_store_is_edited_again(store: Store) -> None:
    oracle, more = expected_pairs("things", "v2"), some_pairs(4, 16, seed=11, first=27, key_width=24)
    editor = Editor.open(store, "things", encoder=ENCODER)
    editor.put(more)
    snapshot, missing = editor.delete(["pair-101", "pair-4"])
    oracle.put(more)
    oracle.delete(["pair-101"])
    assert (snapshot.ref, missing) == ("things@v2+4", ["pair-4"])
    assert_searches_agree(oracle, snapshot, more)
    editor.close()
    assert_searches_agree(oracle, store.open("things", encoder=ENCODER), more)


def test_the_store_is_compacted(store: Store) -> None:
    editor = Editor.open(store, "things", encoder=ENCODER)
    editor.compact("v3")
    editor.close()
    assert store.current("things") == "v3"
    oracle = expected_pairs("things", "v2")
    assert_searches_agree(oracle, store.open("things", encoder=ENCODER), ADDED_ONLINE)
