import dataclasses
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from index_store.edits.journal import Journal
from index_store.errors import (
    DamagedVersion,
    IncompatibleSnapshot,
    NameRefused,
    StoreError,
    UnknownMemory,
    UnknownVersion,
)
from index_store.store import Store
from index_store.tests.support.small import ENCODER, build_memory, some_pairs, unlock

EVIL = ["../x", "..", ".", "", "/etc", "a/b", "a\\b", ".hidden", "a\0b", "a b", "ä", "x" * 65, "-x", "a\n", "a@b"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    for version in ("v1", "v2", "v3"):
        build_memory(tmp_path, some_pairs(5), version)
    return Store(tmp_path)


def test_only_finished_versions_are_listed(store: Store) -> None:
    build_memory(store.root, some_pairs(5), "v1", name="animals")
    (store.root / "things" / "v4").mkdir()
    (store.root / "things" / ".v5.partial").mkdir()
    (store.root / "empty").mkdir()
    (store.root / "README").write_text("not a memory")
    assert store.names() == ["animals", "things"]
    assert store.versions("things") == ["v1", "v2", "v3"]
    with pytest.raises(UnknownVersion, match="things has no version 'v4', only v1, v2, v3"):
        store.path("things", "v4")


def test_a_missing_folder_is_an_empty_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "nowhere")
    assert store.names() == []
    with pytest.raises(UnknownMemory, match="no memory 'things' here, there is none at all"):
        store.open("things", encoder=ENCODER)


def test_current_and_previous(store: Store) -> None:
    with pytest.raises(UnknownVersion, match="no current version: activate one of v1, v2, v3"):
        store.current("things")
    store.activate("things", "v1")
    assert (store.current("things"), store.previous("things")) == ("v1", None)
    store.activate("things", "v3")
    assert (store.current("things"), store.previous("things")) == ("v3", "v1")
    store.activate("things", "v3")  # again: the way back is kept
    assert (store.current("things"), store.previous("things")) == ("v3", "v1")
    assert Store(store.root).open("things", encoder=ENCODER).ref == "things@v3"
    assert store.open("things", "v2", encoder="renamed@0123456789ab").ref == "things@v2"
    assert store.manifest("things").version == "v3"


def test_activating_an_unknown_version_changes_nothing(store: Store) -> None:
    store.activate("things", "v1")
    with pytest.raises(UnknownVersion):
        store.activate("things", "v9")
    with pytest.raises(UnknownMemory, match="no memory 'thongs' here, there is things"):
        store.activate("thongs", "v1")
    assert store.current("things") == "v1"


@pytest.mark.parametrize("text", ["", "../x\n", "v1\nv2\nv3\n", "\n\n", "v1\n../x\n", "\udcff"])
def test_a_damaged_pointer_is_refused_and_repaired_by_activating(store: Store, text: str) -> None:
    (store.root / "things" / "CURRENT").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DamagedVersion, match="things/CURRENT"):
        store.current("things")
    store.activate("things", "v2")
    assert (store.current("things"), store.previous("things")) == ("v2", None)


def test_a_pointer_to_a_missing_version(store: Store) -> None:
    (store.root / "things" / "CURRENT").write_text("v9\n")
    with pytest.raises(UnknownVersion, match="v9"):
        store.open("things", encoder=ENCODER)


@pytest.mark.parametrize("name", EVIL)
def test_a_path_is_not_a_name(store: Store, name: str) -> None:
    for attempt in (
        lambda: store.versions(name),
        lambda: store.open(name, encoder=ENCODER),
        lambda: store.path("things", name),
        lambda: store.activate("things", name),
        lambda: store.next_version(name),
        lambda: build_memory(store.root, some_pairs(3), "v1", name=name),
        lambda: build_memory(store.root, some_pairs(3), name),
    ):
        with pytest.raises(NameRefused, match="is not a name") as refused:
            attempt()
        assert "\n" not in str(refused.value)
    assert not (store.root.parent / "x").exists()


@pytest.mark.parametrize("version", ["CURRENT", "current"])
def test_no_version_has_the_name_of_the_pointer_file(store: Store, version: str) -> None:
    with pytest.raises(NameRefused, match="pointer"):
        build_memory(store.root, some_pairs(3), version)


def test_another_encoder_is_refused(store: Store) -> None:
    with pytest.raises(
        IncompatibleSnapshot, match=f"things@v1 was built by {ENCODER}, this service encodes with tiny/test@ffff"
    ):
        store.open("things", "v1", encoder="tiny/test@ffff")


def test_next_version_names_sort_by_time(tmp_path: Path) -> None:
    store, day = Store(tmp_path), datetime(2026, 11, 22, tzinfo=UTC)
    folder = tmp_path / "things"
    labels = []
    for _ in range(60):
        labels.append(store.next_version("things", day))
        (folder / labels[-1]).mkdir(parents=True)
        (folder / labels[-1] / "manifest.json").touch()
    assert labels[:3] == ["2026-11-22a", "2026-11-22b", "2026-11-22c"]
    assert labels[25:28] == ["2026-11-22z", "2026-11-22za", "2026-11-22zb"]
    assert sorted(labels) == labels
    assert store.versions("things") == labels


@pytest.mark.parametrize("then", ["delete another", "build it again"])
def test_a_killed_deletion_is_finished_by_the_next_delete_or_build(
    store: Store, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    store.activate("things", "v3")
    Journal.open(store.journal_path("things", "v1"), store.manifest("things", "v1").sha256).close()
    (store.root / "things" / "rejects-v1.jsonl").touch()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            store.delete("things", "v1")
    assert store.versions("things") == ["v2", "v3"]
    if then == "delete another":
        store.delete("things", "v2")
        assert sorted(path.name for path in (store.root / "things").iterdir()) == ["CURRENT", "v3"]
    else:
        build_memory(store.root, some_pairs(7), "v1")
        assert len(store.open("things", "v1", encoder=ENCODER)) == 7
        assert sorted(path.name for path in (store.root / "things").iterdir()) == ["CURRENT", "v1", "v2", "v3"]


def test_the_name_of_a_deleted_version_is_not_used_again(tmp_path: Path) -> None:
    """A reply that says things@2026-11-22a must never mean two things."""
    store, day = Store(tmp_path), datetime(2026, 11, 22, tzinfo=UTC)
    for version in ("2026-11-22a", "2026-11-22b", "2026-11-22c", "2026-11-21z", "2026-11-22"):
        build_memory(tmp_path, some_pairs(5), version)
    store.activate("things", "2026-11-22c")
    store.activate("things", "2026-11-22b")
    store.delete("things", "2026-11-22a")
    assert store.next_version("things", day) == "2026-11-22d"
    store.delete("things", "2026-11-22c")  # what a rollback would still go to
    assert store.next_version("things", day) == "2026-11-22d"


def test_pruning_goes_by_build_time_not_by_name(tmp_path: Path) -> None:
    store, built_at = Store(tmp_path), ["2026-11-23", "2026-11-26", "2026-11-24", "2026-11-25"]
    for version, day in zip(("monday", "friday", "wednesday", "tuesday"), built_at, strict=True):
        manifest = build_memory(tmp_path, some_pairs(5), version)
        aged = dataclasses.replace(manifest, created=f"{day}T09:00:00+00:00")
        (unlock(tmp_path / "things" / version) / "manifest.json").write_text(aged.to_json())
    store.activate("things", "monday")
    assert store.prune("things", 1) == ["wednesday", "tuesday"]
    assert store.versions("things") == ["friday", "monday"]


def test_pruning_keeps_the_later_of_two_versions_of_one_second(tmp_path: Path) -> None:
    """`created` has whole seconds, and the later name may sort first."""
    store, second = Store(tmp_path), "2026-11-26T09:00:00+00:00"
    for version in ("z", "a"):
        manifest = dataclasses.replace(build_memory(tmp_path, some_pairs(5), version), created=second)
        (unlock(tmp_path / "things" / version) / "manifest.json").write_text(manifest.to_json())
    assert store.prune("things", 1) == ["z"]


def test_pruning_keeps_unreadable_versions(store: Store) -> None:
    (unlock(store.root / "things" / "v1") / "manifest.json").write_text("{}")
    assert store.prune("things", 1) == ["v2"]
    assert store.versions("things") == ["v1", "v3"]


def test_readers_never_see_a_half_written_pointer(store: Store) -> None:
    store.activate("things", "v1")
    stop, trouble = threading.Event(), []

    def read() -> None:
        reader = Store(store.root)
        while not stop.is_set():
            try:
                if reader.current("things") not in ("v1", "v2", "v3"):
                    trouble.append(reader.current("things"))
            except StoreError as error:
                trouble.append(str(error))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for turn in range(60):
        store.activate("things", f"v{turn % 3 + 1}")
    stop.set()
    for reader in readers:
        reader.join()
    assert trouble == []
    assert (store.current("things"), store.previous("things")) == ("v3", "v2")
    assert not list((store.root / "things").glob("*fresh*"))


def test_concurrent_activations_keep_a_valid_pointer(store: Store) -> None:
    def write(version: str) -> None:
        for _ in range(20):
            Store(store.root).activate("things", version)

    writers = [threading.Thread(target=write, args=[version]) for version in ("v1", "v2")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {store.current("things"), store.previous("things")} == {"v1", "v2"}
