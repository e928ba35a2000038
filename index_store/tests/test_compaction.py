"""Redundant versions: those whose pairs and edits a served version contains."""

from pathlib import Path

import pytest

from index_store.compaction import redundant_versions
from index_store.editor import Editor
from index_store.store import Store
from index_store.tests.support.small import ENCODER, build_memory, some_pairs, unlock


@pytest.fixture
def store(tmp_path: Path) -> Store:
    build_memory(tmp_path, some_pairs(30), "v1")
    Store(tmp_path).activate("things", "v1")
    return Store(tmp_path)


def edit_version(store: Store, version: str, first: int) -> Editor:
    editor = Editor.open(store, "things", version, encoder=ENCODER)
    editor.put(some_pairs(3, first=first))
    return editor


def compact_version(store: Store, version: str, into: str, first: int, *, meanwhile: bool = True) -> None:
    """Compact a version with one edit before and, `meanwhile`, one while the compaction runs."""
    editor = edit_version(store, version, first)
    built = editor.compact_build(into)
    if meanwhile:
        editor.put(some_pairs(3, first=first + 500))
    editor.switch(built)
    editor.close()


def test_compacted_versions_are_redundant(store: Store) -> None:
    for number, (version, into) in enumerate([("v1", "c1"), ("c1", "c2"), ("c2", "c3")]):
        compact_version(store, version, into, 100 * number)
    assert redundant_versions(store, "things", {"c3", "c2"}) == ["c1"]
    assert redundant_versions(store, "things", {"c3"}) == ["c1", "c2"]
    assert redundant_versions(store, "things", {"v1"}) == []  # c1 was edited after its compaction
    store.delete("things", "c1")
    assert redundant_versions(store, "things", {"c3", "c2"}) == []


def test_a_version_edited_before_a_rollback_is_kept(store: Store) -> None:
    compact_version(store, "v1", "c1", 100)
    edit_version(store, "c1", 200).close()
    store.activate("things", "v1")
    compact_version(store, "v1", "c2", 300)
    assert redundant_versions(store, "things", {"c2", "v1"}) == []


def test_a_version_edited_after_its_compaction_is_kept(store: Store) -> None:
    compact_version(store, "v1", "c1", 100)
    compact_version(store, "c1", "c2", 200)
    assert redundant_versions(store, "things", {"c2"}) == ["c1"]
    store.activate("things", "c1")
    edit_version(store, "c1", 300).close()
    store.activate("things", "c2")
    compact_version(store, "c2", "c3", 400)
    assert redundant_versions(store, "things", {"c3", "c2"}) == []


@pytest.mark.parametrize("meanwhile", [True, False])
def test_a_compaction_that_was_never_activated_is_redundant(
    store: Store, monkeypatch: pytest.MonkeyPatch, meanwhile: bool
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Store, "activate", lambda *_, **__: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            compact_version(store, "v1", "c1", 100, meanwhile=meanwhile)
    assert store.current("things") == "v1"
    assert redundant_versions(store, "things", {"v1"}) == ["c1"]
    edit_version(store, "v1", 200).close()
    assert redundant_versions(store, "things", {"v1"}) == ["c1"]


@pytest.mark.parametrize("file", ["c1/manifest.json", "c1.journal", "c2.journal"])
def test_an_unreadable_version_is_kept(store: Store, file: str) -> None:
    compact_version(store, "v1", "c1", 100)
    compact_version(store, "c1", "c2", 200)
    unlock(store.root / "things" / "c1")
    (store.root / "things" / file).write_bytes(b"?" * 100)
    assert redundant_versions(store, "things", {"c2"}) == []
