"""What `reco memory list` says of unfinished builds, and what `delete` and `compact` do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from index_store import Store
from index_store.build.build import build_version
from index_store.build.source import BuildProgress, BuildSource, SourceStep
from index_store.build.staging import staging_folder
from index_store.editor import Editor
from index_store.tests.support.small import ENCODER, build_memory, some_pairs
from service.tests.cli.in_process import error_line, run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """things@v1, current, and things@v2, edited once; another memory; an unfinished build."""
    for version in ("v1", "v2"):
        build_memory(tmp_path, some_pairs(30), version)
    build_memory(tmp_path, some_pairs(5), name="others")
    store = Store(tmp_path)
    for version in ("v2", "v1"):
        store.activate("things", version)
    editor = Editor.open(store, "things", "v2", encoder=ENCODER)
    editor.put(some_pairs(2, first=100))
    editor.close()
    leave_unfinished(store, "things", "half")
    return store


def leave_unfinished(store: Store, name: str, version: str) -> None:
    """A build that is stopped after 20 pairs."""

    def steps(done: BuildProgress) -> Iterator[SourceStep]:
        yield SourceStep(some_pairs(20), 20)
        raise KeyboardInterrupt

    kinds = {"image": "vector", "text": "vector"}
    with pytest.raises(KeyboardInterrupt):
        build_version(store, name, version, BuildSource({}, steps), encoder=ENCODER, kinds=kinds)  # type: ignore[arg-type]


def test_unfinished_builds_are_listed_and_can_be_deleted(store: Store) -> None:
    where = ("--store", str(store.root))
    done = run("memory", "list", *where)
    (line,) = [line for line in done.stderr.splitlines() if "unfinished" in line]
    assert line.startswith("things@half is unfinished: 20 pairs, ")
    assert " s old; " in line
    assert len(json.loads(run("memory", "list", "--json", *where).stdout)) == 3
    with staging_folder(store.root / "things", "half"):
        assert "being built by another process" in error_line(run("memory", "delete", "things@half", *where), 1)
    assert "an unfinished build of 20 pairs, is deleted" in run("memory", "delete", "things@half", *where).stdout
    assert not list(store.root.rglob(".*.partial"))
    assert store.versions("things") == ["v1", "v2"]


def test_an_unfinished_build_of_a_memory_without_versions(tmp_path: Path) -> None:
    store, where = Store(tmp_path), ("--store", str(tmp_path))
    leave_unfinished(store, "new", "v1")
    assert "new@v1 is unfinished: 20 pairs" in run("memory", "list", *where).stderr
    assert run("memory", "delete", "new", "--yes", "new", *where).returncode == 0
    assert not (tmp_path / "new").exists()


def test_delete_says_what_else_goes(store: Store) -> None:
    done = run("memory", "delete", "things@v2", "--store", str(store.root))
    assert done.stdout == ("things@v2 is deleted, and the 1 edits made on it; a rollback would have gone to it\n")
    assert store.versions("things") == ["v1"]


def test_a_whole_memory_is_deleted_when_its_name_is_given_twice(store: Store) -> None:
    where = ("--store", str(store.root))
    for wrong in ((), ("--yes", "others")):
        line = error_line(run("memory", "delete", "things", *wrong, *where), 2)
        assert "things holds 2 versions and 1 unfinished builds: to delete all of it give --yes things" in line
    editor = Editor.open(store, "things", "v2", encoder=ENCODER)
    editor.put(some_pairs(1, first=300))  # holds the journal's lock
    (store.root / "things" / ".half.partial").rename(store.root / "kept")
    assert "is being edited by another process" in error_line(
        run("memory", "delete", "things", "--yes", "things", *where), 1
    )
    editor.close()
    (store.root / "kept").rename(store.root / "things" / ".half.partial")
    done = run("memory", "delete", "things", "--yes", "things", *where)
    assert done.stdout == "things is deleted: 2 versions with their edits, 1 unfinished builds\n"
    assert [path.name for path in store.root.iterdir()] == ["others"]
    assert "no memory 'gone' here" in error_line(run("memory", "delete", "gone", "--yes", "gone", *where), 1)


def test_a_compaction_without_edits_does_nothing(store: Store) -> None:
    done = run("memory", "compact", "things", "--store", str(store.root))
    assert (done.returncode, done.stdout) == (0, "things@v1 has no edits: there is nothing to compact\n")
    assert store.versions("things") == ["v1", "v2"]
