"""Which compacted versions may go: only those of which an edit or a pair would not be missed."""

from pathlib import Path

import pytest

from index_store.compaction import redundant_versions
from index_store.editor import Editor
from index_store.store import Store
from index_store.tests.support.small import ENCODER, build_memory, some_pairs


@pytest.fixture
def store(tmp_path: Path) -> Store:
    build_memory(tmp_path, some_pairs(30), "v1")
    Store(tmp_path).activate("things", "v1")
    return Store(tmp_path)


def edited(store: Store, version: str, first: int) -> Editor:
    editor = Editor.open(store, "things", version, encoder=ENCODER)
    editor.put(some_pairs(3, first=first))
    return editor


def compacted(store: Store, version: str, into: str, first: int, *, meanwhile: bool = True) -> None:
    """One edit before the compaction, and one while it runs."""
    editor = edited(store, version, first)
    prepared = editor.compact_build(into)
    if meanwhile:
        editor.put(some_pairs(3, first=first + 500))
    editor.switch(prepared)
    editor.close()


def test_what_was_folded_away_repeats_what_is_served(store: Store) -> None:
    for number, (version, into) in enumerate([("v1", "c1"), ("c1", "c2"), ("c2", "c3")]):
        compacted(store, version, into, 100 * number)
    assert redundant_versions(store, "things", {"c3", "c2"}) == ["c1"]
    assert redundant_versions(store, "things", {"c3"}) == ["c1", "c2"]
    assert redundant_versions(store, "things", {"v1"}) == []  # c1 was edited since
    store.delete("things", "c1")
    assert redundant_versions(store, "things", {"c3", "c2"}) == []


def test_edits_that_a_rollback_left_behind_are_kept(store: Store) -> None:
    compacted(store, "v1", "c1", 100)
    edited(store, "c1", 200).close()
    store.activate("things", "v1")
    compacted(store, "v1", "c2", 300)
    assert redundant_versions(store, "things", {"c2", "v1"}) == []


def test_edits_of_a_version_that_came_back_for_a_while_are_kept(store: Store) -> None:
    compacted(store, "v1", "c1", 100)
    compacted(store, "c1", "c2", 200)
    assert redundant_versions(store, "things", {"c2"}) == ["c1"]
    store.activate("things", "c1")
    edited(store, "c1", 300).close()
    store.activate("things", "c2")
    compacted(store, "c2", "c3", 400)
    assert redundant_versions(store, "things", {"c3", "c2"}) == []


@pytest.mark.parametrize("meanwhile", [True, False])
def test_one_that_was_never_switched_to_repeats_its_base(
    store: Store, monkeypatch: pytest.MonkeyPatch, meanwhile: bool
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Store, "activate", lambda *_, **__: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            compacted(store, "v1", "c1", 100, meanwhile=meanwhile)
    assert store.current("things") == "v1"
    assert redundant_versions(store, "things", {"v1"}) == ["c1"]
    edited(store, "v1", 200).close()
    assert redundant_versions(store, "things", {"v1"}) == ["c1"]


@pytest.mark.parametrize("file", ["c1/manifest.json", "c1.journal", "c2.journal"])
def test_what_cannot_be_read_is_kept(store: Store, file: str) -> None:
    compacted(store, "v1", "c1", 100)
    compacted(store, "c1", "c2", 200)
    (store.root / "things" / file).write_bytes(b"?" * 100)
    assert redundant_versions(store, "things", {"c2"}) == []
