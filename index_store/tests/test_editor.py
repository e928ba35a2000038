"""Online edits: random sequences against an oracle, concurrency, other processes, failures."""

import errno
import logging
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index_store.editor import Editor
from index_store.edits.changes import Delete
from index_store.edits.journal import Journal
from index_store.errors import DamagedVersion, NameRefused, PairsRefused, StoreBusy, StoreUnwritable
from index_store.memory import Memory
from index_store.search.filters import SearchParams
from index_store.snapshot import Snapshot
from index_store.store import Store
from index_store.tests.support.oracle import Oracle
from index_store.tests.support.small import ENCODER, build_memory, normalize, open_memory, some_pairs, unit_rows
from index_store.types import Id, Pairs, Side

RECIPES: dict[str, dict[str, Any]] = {
    "flat": {"index": "Flat"},
    "flat shards": {"index": "Flat", "shard_pairs": 10},
    "lists": {"index": "IVF2,Flat"},
}
KINDS: dict[str, dict[str, Any]] = {"words": {}, "numbers": {"ints": True}, "trunks": {"key_width": 12}}
POOL = 40  # ids that the random edits draw from


def open_editor(root: Path, pairs: Pairs | None = None, **options: Any) -> Editor:
    """An editor of a new version, which is current."""
    build_memory(root, some_pairs() if pairs is None else pairs, **options)
    Store(root).activate("things", "v1")
    return Editor.open(Store(root), "things", encoder=ENCODER)


def draw_pairs(data: st.DataObject, options: dict[str, Any]) -> Pairs:
    """Random pairs with ids from the pool, half of the time with images close together."""
    numbers = data.draw(st.lists(st.integers(0, POOL - 1), max_size=12, unique=True))
    pairs = some_pairs(len(numbers), 8, seed=data.draw(st.integers(0, 99)), **options)
    if not numbers:
        return pairs
    ids = np.array(numbers, np.int64) if options.get("ints") else np.array([f"pair-{number}" for number in numbers])
    image = normalize(unit_rows(1, 8, 1) + data.draw(st.sampled_from([0.02, 3.0])) * pairs.image)
    return Pairs(ids, image, pairs.text, pairs.records, image_key=pairs.image_key)


@pytest.fixture(scope="module", params=[f"{kind} {recipe}" for kind in KINDS for recipe in RECIPES])
def fresh(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Pairs, Path]:
    """A store to copy with one current version: the options of its pairs, the pairs, its folder."""
    kind, _, recipe = request.param.partition(" ")
    root, base = tmp_path_factory.mktemp("fresh"), some_pairs(25, 8, **KINDS[kind])
    build_memory(root, base, **RECIPES[recipe])
    Store(root).activate("things", "v1")
    return KINDS[kind], base, root


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_random_edits_agree_with_brute_force(
    fresh: tuple[dict[str, Any], Pairs, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    options, base, store = fresh
    root = tmp_path_factory.mktemp("store")
    shutil.copytree(store, root, dirs_exist_ok=True)
    editor, oracle = Editor.open(Store(root), "things", encoder=ENCODER), Oracle(base)
    for number in range(data.draw(st.integers(1, 7))):
        step = data.draw(st.sampled_from(["put", "put", "delete", "delete", "compact", "reopen"]))
        if step == "put":
            pairs = draw_pairs(data, options)
            oracle.put(pairs)
            editor.put(pairs)
        elif step == "delete":
            numbers = data.draw(st.lists(st.integers(0, POOL - 1), max_size=20))
            ids: list[Id] = [number if options.get("ints") else f"pair-{number}" for number in numbers]
            assert editor.delete(ids)[1] == oracle.delete(ids)
        elif step == "compact" and len(oracle.pairs_by_id) > 10:
            before = editor.snapshot.ref
            assert editor.compact(f"v2-{number}").manifest.parent == before
        elif step == "reopen":
            ref = editor.snapshot.ref
            editor.close()
            editor = Editor.open(Store(root), "things", encoder=ENCODER)
            assert editor.snapshot.ref == ref
        check_search(data, editor.snapshot, oracle, options)
    editor.close()
    check_search(data, Store(root).open("things", encoder=ENCODER), oracle, options)


def check_search(data: st.DataObject, snapshot: Snapshot, oracle: Oracle, options: dict[str, Any]) -> None:
    """Compare one search with random parameters."""
    side: Side = data.draw(st.sampled_from(["image", "text"]))
    batch = data.draw(st.sampled_from([1, 2, 6]))
    some = st.lists(st.integers(0, POOL - 1), max_size=30).map(
        lambda rows: [row if options.get("ints") else f"pair-{row}" for row in rows]
    )
    ceilings = st.sampled_from([np.inf, 0.99, 0.4, -2.0]) | st.just(np.linspace(0, 1, batch))
    params = SearchParams(
        exclude=data.draw(st.none() | st.lists(some, min_size=batch, max_size=batch)),
        max_similarity=data.draw(ceilings),
        probes=2 if snapshot.manifest.index["probes"] else None,
    )
    width = options.get("key_width", 8) if side == "image" else 8
    queries = unit_rows(batch, width, 1 if data.draw(st.booleans()) else data.draw(st.integers(0, 9)))
    k = data.draw(st.sampled_from([1, 5, 20, 2 * POOL]))
    oracle.assert_agrees(snapshot, queries, side, k, params)


def test_names_and_counts_after_edits(tmp_path: Path) -> None:
    editor = open_editor(tmp_path)
    assert (editor.snapshot.ref, editor.snapshot.edits, len(editor.snapshot)) == ("things@v1", 0, 60)
    assert editor.put(some_pairs(0)) is editor.snapshot
    assert editor.put(some_pairs(5, first=58, seed=3)) is editor.snapshot
    assert (editor.snapshot.ref, editor.snapshot.edits, len(editor.snapshot)) == ("things@v1+1", 1, 63)
    after, missing = editor.delete(["nobody", "pair-0", "pair-0", "pair-62"])
    assert (after, missing) == (editor.snapshot, ["nobody"])
    assert (after.ref, len(after)) == ("things@v1+2", 61)
    same, missing = editor.delete(["pair-0", "nobody"])
    assert (same, missing) == (after, ["pair-0", "nobody"])
    store = Store(tmp_path)
    assert store.count_edits("things", "v1") == 2
    assert store.open("things", encoder=ENCODER).ref == "things@v1+2"
    assert store.versions("things") == ["v1"]


def test_ids_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    words, numbers = open_editor(tmp_path / "words"), open_editor(tmp_path / "numbers", some_pairs(ints=True))
    for refused in (
        lambda: words.put(some_pairs(2, ints=True)),
        lambda: words.delete([3]),
        lambda: numbers.delete(["pair-1"]),
    ):
        with pytest.raises(PairsRefused, match="is not one that things@v1 can hold"):
            refused()
    assert numbers.delete(["3", 4, "99"])[1] == ["99"]
    assert len(numbers.snapshot) == 58
    assert (words.snapshot.edits, words.snapshot.ref) == (0, "things@v1")


def test_edits_stay_with_their_version(tmp_path: Path) -> None:
    editor, store = open_editor(tmp_path), Store(tmp_path)
    editor.put(some_pairs(5, first=100))
    editor.close()
    build_memory(tmp_path, some_pairs(30), "v2")
    store.activate("things", "v2")
    assert store.open("things", encoder=ENCODER).ref == "things@v2"
    assert store.count_edits("things", "v1") == 1
    store.activate("things", "v1")
    assert len(store.open("things", encoder=ENCODER)) == 65
    with pytest.raises(NameRefused, match="ends like the edits"):
        build_memory(tmp_path, some_pairs(5), "v1.journal")


def test_a_rebuilt_version_refuses_the_old_journal(tmp_path: Path) -> None:
    editor = open_editor(tmp_path)
    editor.put(some_pairs(5, first=100))
    editor.close()
    shutil.rmtree(tmp_path / "things" / "v1")
    build_memory(tmp_path, some_pairs(30))
    with pytest.raises(DamagedVersion, match=r"things/v1\.journal holds edits of another build"):
        Store(tmp_path).open("things", encoder=ENCODER)


def test_a_second_editor_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    """Opening takes no lock; the first edit locks the journal and reads edits editor until then."""
    one = open_editor(tmp_path)
    two = Editor.open(Store(tmp_path), "things", encoder=ENCODER)
    one.put(some_pairs(5, first=100))
    with pytest.raises(
        StoreBusy, match=r"things/v1\.journal is being written by another process: send the edits there"
    ):
        two.delete(["pair-1"])
    assert two.snapshot.ref == "things@v1"
    one.delete(["pair-100"])
    one.close()
    after, missing = two.delete(["pair-100", "pair-101"])
    assert (after.ref, len(after), missing) == ("things@v1+3", 63, ["pair-100"])
    with pytest.raises(StoreBusy):
        one.put(some_pairs(1))
    two.close()
    assert one.delete(["pair-101"])[1] == ["pair-101"]
    assert one.snapshot.ref == "things@v1+3"


def test_a_deleted_journal_is_noticed(tmp_path: Path) -> None:
    editor = open_editor(tmp_path)
    editor.put(some_pairs(5, first=100))
    editor.close()
    (tmp_path / "things" / "v1.journal").unlink()
    with pytest.raises(DamagedVersion, match=r"v1\.journal held 1 edits and now holds 0"):
        editor.put(some_pairs(5))


def test_an_edit_that_does_not_fit_its_base_is_refused(tmp_path: Path) -> None:
    manifest = build_memory(tmp_path, some_pairs())
    journal = Journal.open(tmp_path / "things" / "v1.journal", manifest.sha256)
    journal.append(Delete(np.array([b"pair-1"])).encode())
    journal.append(Delete(np.array([7])).encode())
    with pytest.raises(DamagedVersion, match="edit 2 of things@v1 cannot be read"):
        Store(tmp_path).open("things", "v1", encoder=ENCODER)


def test_a_torn_record_is_ignored_by_readers_and_truncated_by_the_next_edit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    editor = open_editor(tmp_path)
    editor.put(some_pairs(5, first=100))
    editor.close()
    with (tmp_path / "things" / "v1.journal").open("ab") as file:
        file.write(b"half a record")
    with caplog.at_level(logging.WARNING, "reco"):
        again = Editor.open(Store(tmp_path), "things", encoder=ENCODER)
        assert (
            "things/v1.journal: the last 13 bytes are no whole record, so never acknowledged: ignored, 1 edits stand"
            in caplog.text
        )
        again.delete(["pair-101"])
        assert "the last 13 bytes were no whole record, dropped: 1 edits stand" in caplog.text
    assert again.snapshot.ref == Store(tmp_path).open("things", encoder=ENCODER).ref == "things@v1+2"


def test_compaction_keeps_the_settings(tmp_path: Path) -> None:
    base = some_pairs(200, key_width=24)
    editor, oracle = (
        open_editor(tmp_path, base, index="IVF4,Flat", shard_pairs=80, recall_floor=0.9, source={"from": "x"}),
        Oracle(base),
    )
    more = some_pairs(60, key_width=24, seed=5, first=180)
    oracle.put(more)
    editor.put(more)
    oracle.delete(["pair-0", "pair-200"])
    editor.delete(["pair-0", "pair-200"])
    reported: list[tuple[int, int]] = []
    new = editor.compact(on_progress=lambda done, total: reported.append((done, total)))
    manifest = new.manifest
    assert reported[-1] == (238, 238)
    assert (new.edits, len(new), manifest.pairs, manifest.parent) == (0, 238, 238, "things@v1+2")
    assert (manifest.index["recipe"], manifest.recall["floor"], manifest.keys) == (
        "IVF4,Flat",
        0.9,
        editor.snapshot.manifest.keys,
    )
    assert [shard["pairs"] for shard in manifest.shards] == [80, 80, 78]
    assert manifest.source == {"from": "x", "compacted": {"edits": 2, "from": "things@v1"}}
    store = Store(tmp_path)
    assert (store.current("things"), store.previous("things")) == (manifest.version, "v1")
    oracle.assert_agrees(new, unit_rows(4, 24, 3), "image", 12, SearchParams(probes=4))
    oracle.assert_agrees(
        store.open("things", "v1", encoder=ENCODER), unit_rows(4, 24, 3), "image", 12, SearchParams(probes=4)
    )


def test_edits_during_a_compaction_are_copied(tmp_path: Path) -> None:
    base, store = some_pairs(), Store(tmp_path)
    editor, oracle = open_editor(tmp_path, base), Oracle(base)
    for pairs in (some_pairs(20, seed=1, first=50), some_pairs(20, seed=2, first=60)):
        oracle.put(pairs)
        editor.put(pairs)
    compacted = editor.compact_build("v2")
    assert (store.current("things"), editor.snapshot.ref) == ("v1", "things@v1+2")
    late = some_pairs(9, seed=7, first=55)
    oracle.put(late)
    editor.put(late)
    oracle.delete(["pair-1", "pair-57"])
    assert editor.delete(["pair-1", "pair-57", "pair-999"])[1] == ["pair-999"]
    pinned = editor.snapshot
    new = editor.switch(compacted)
    assert (new.ref, new, store.current("things")) == ("things@v2+2", editor.snapshot, "v2")
    for snapshot in (new, pinned, store.open("things", encoder=ENCODER), store.open("things", "v1", encoder=ENCODER)):
        oracle.assert_agrees(snapshot, unit_rows(3, 16, 1), "image", 11)
    oracle.delete(["pair-2"])
    editor.delete(["pair-2"])
    assert store.open("things", encoder=ENCODER).ref == "things@v2+3"
    assert store.count_edits("things", "v1") == 4
    with pytest.raises(StoreBusy, match=r"things@v2 was compacted from things@v1, by now things@v2\+3 is being edited"):
        editor.switch(compacted)


def test_a_compaction_leaves_a_moved_pointer_alone(tmp_path: Path) -> None:
    editor, store = open_editor(tmp_path), Store(tmp_path)
    editor.delete(["pair-1"])
    compacted = editor.compact_build("v2")
    build_memory(tmp_path, some_pairs(30), "other")
    store.activate("things", "other")
    assert editor.switch(compacted).ref == "things@v2"
    assert store.current("things") == "other"


def test_a_memory_without_pairs_is_not_compacted(tmp_path: Path) -> None:
    editor = open_editor(tmp_path, some_pairs(4))
    editor.delete([f"pair-{n}" for n in range(4)])
    with pytest.raises(PairsRefused, match=r"things@v1\+1 holds no pair any more"):
        editor.compact()
    assert Store(tmp_path).versions("things") == ["v1"]


def test_a_compaction_that_is_stopped_changes_nothing(tmp_path: Path) -> None:
    editor = open_editor(tmp_path)
    editor.put(some_pairs(5, first=100))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        editor.compact("v2", stop)
    assert sorted(path.name for path in (tmp_path / "things").iterdir()) == ["CURRENT", "v1", "v1.journal"]
    assert editor.put(some_pairs(5, first=200)).ref == "things@v1+2"
    assert editor.compact("v2").ref == "things@v2"


def test_a_pointer_that_cannot_be_written_leaves_the_old_version_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor, store = open_editor(tmp_path), Store(tmp_path)
    editor.put(some_pairs(5, first=100))
    compacted = editor.compact_build("v2")

    def refuse(*_: object, prefix: str, **__: object) -> tuple[int, str]:
        raise OSError(errno.ENOSPC, "No space left on device", prefix)

    with monkeypatch.context() as patch, pytest.raises(StoreUnwritable, match="cannot write"):
        patch.setattr("index_store.storage.atomic.tempfile.mkstemp", refuse)
        editor.switch(compacted)
    assert (store.current("things"), editor.snapshot.ref) == ("v1", "things@v1+1")
    assert not (tmp_path / "things" / "v2.journal").exists()
    assert editor.put(some_pairs(5, first=200)).ref == "things@v1+2"
    assert editor.switch(compacted).ref == "things@v2+1"


@pytest.mark.parametrize("step", ["before the journal", "before the pointer", "after the pointer"])
def test_a_crash_between_the_steps_of_a_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    base, store = some_pairs(), Store(tmp_path)
    editor, oracle = open_editor(tmp_path, base), Oracle(base)
    more = some_pairs(20, seed=1, first=50)
    oracle.put(more)
    editor.put(more)
    compacted = editor.compact_build("v2")
    oracle.delete(["pair-3", "pair-55"])
    editor.delete(["pair-3", "pair-55"])
    activate = Store.activate

    def dying(*args: Any, **options: Any) -> None:
        if step == "after the pointer":
            activate(*args, **options)
        raise SystemExit

    owner, name = (Journal, "create") if step == "before the journal" else (Store, "activate")
    monkeypatch.setattr(owner, name, dying)
    with pytest.raises(SystemExit):
        editor.switch(compacted)
    monkeypatch.undo()
    editor.close()
    again = Editor.open(store, "things", encoder=ENCODER)
    assert again.snapshot.ref == ("things@v2+1" if step == "after the pointer" else "things@v1+2")
    oracle.assert_agrees(again.snapshot, unit_rows(3, 16, 1), "image", 30)
    oracle.put(more)
    again.put(more)
    oracle.assert_agrees(again.compact("v3"), unit_rows(3, 16, 1), "image", 30)
    assert store.open("things", encoder=ENCODER).ref == "things@v3"


def test_searches_concurrent_with_edits_and_compactions(tmp_path: Path) -> None:
    """Every result shows exactly the state of the snapshot that was searched."""
    base = some_pairs(30)
    editor, oracle = open_editor(tmp_path, base), Oracle(base)
    memory, queries, stop = Memory(editor.snapshot), unit_rows(2, 16, 5), threading.Event()
    states = {"things@v1": {name: pair["record"]["caption"] for name, pair in oracle.pairs_by_id.items()}}
    trouble: list[object] = []
    answered = [0] * 3

    def ask(reader: int) -> None:
        while not stop.is_set():
            pinned = memory.current
            found = pinned.retrieve(queries[: 1 + reader % 2], "image" if reader else "text", 500)
            seen = {record["id"]: record["caption"] for record in found.records(0)}
            if (
                seen != states[pinned.ref]
                or len(pinned) != len(seen)
                or (np.diff(found.scores[0, : len(seen)]) > 0).any()
            ):
                trouble.append((pinned.ref, len(seen), len(states[pinned.ref])))
            answered[reader] += 1

    def publish(snapshot: Snapshot) -> None:
        states[snapshot.ref] = {name: pair["record"]["caption"] for name, pair in oracle.pairs_by_id.items()}
        memory.swap(snapshot)

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(ask, reader) for reader in range(3)]
        building = None
        for step in range(120):
            if building is not None and building.done():
                publish(editor.switch(building.result()))
                building = None
            elif building is None and step % 30 == 5:
                building = pool.submit(editor.compact_build, f"v2-{step}")
            batch = some_pairs(17, seed=step, first=(7 * step) % 300)
            batch = Pairs(batch.ids, batch.image, batch.text, [{"caption": f"{step}"} for _ in range(17)])
            oracle.put(batch)
            publish(editor.put(batch))
            gone: list[Id] = [f"pair-{(11 * step + n) % 300}" for n in range(5)]
            oracle.delete(gone)
            publish(editor.delete(gone)[0])
        while min(answered) < 20 and not trouble:
            stop.wait(0.01)
        stop.set()
        for reader in readers:
            reader.result()
    assert trouble == []
    oracle.assert_agrees(Store(tmp_path).open("things", encoder=ENCODER), queries, "image", 20)
    assert len(Store(tmp_path).versions("things")) > 1


def test_concurrent_edits_are_all_kept(tmp_path: Path) -> None:
    editor = open_editor(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: editor.put(some_pairs(3, seed=n, first=100 + 3 * n)), range(40)))
    assert (editor.snapshot.ref, len(editor.snapshot)) == ("things@v1+40", 180)
    assert len(Store(tmp_path).open("things", encoder=ENCODER)) == 180


def test_a_version_opened_by_name_shows_its_edits(tmp_path: Path) -> None:
    open_memory(tmp_path, some_pairs())
    editor = Editor.open(Store(tmp_path), "things", "v1", encoder=ENCODER)
    editor.put(some_pairs(2, first=100))
    assert len(Store(tmp_path).open("things", "v1", encoder=ENCODER)) == 62


def test_a_compaction_that_cannot_switch_leaves_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = open_editor(tmp_path)
    editor.put(some_pairs(5, first=100))

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StoreUnwritable, match="No space left"):
        patch.setattr("index_store.edits.journal._write_all", refuse)
        editor.compact("v2")
    with monkeypatch.context() as patch, pytest.raises(DamagedVersion):
        patch.setattr("index_store.editor.Snapshot.open", lambda *_, **__: (_ for _ in ()).throw(DamagedVersion("cut")))
        editor.compact("v3")
    assert sorted(path.name for path in (tmp_path / "things").iterdir()) == ["CURRENT", "v1", "v1.journal"]
    assert editor.put(some_pairs(5, first=200)).ref == "things@v1+2"
    assert editor.compact("v4").ref == "things@v4"
