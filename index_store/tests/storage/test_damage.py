"""Damaged versions: each file missing, truncated or altered, and intact files that disagree."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from index_store.errors import DamagedVersion, IncompatibleSnapshot, StoreError, UnknownVersion
from index_store.snapshot import Snapshot
from index_store.storage.atomic import file_digest
from index_store.storage.manifest import MANIFEST_FILE, Manifest
from index_store.store import Store
from index_store.tests.support.small import ENCODER, build_memory, open_memory, some_pairs, unlock

FILES = [
    MANIFEST_FILE,
    *(f"probes/{name}.npy" for name in ("image", "image_scores", "text", "text_scores")),
    *(
        f"shard-000{shard}/{name}"
        for shard in (0, 1)
        for name in (
            *("ids.npy", "order.npy", "image.npy", "text.npy", "image_key.npy"),
            *("records.jsonl", "records.npy", "image.faiss", "text.faiss"),
        )
    ),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version with every kind of file: two shards, image keys, indexes with lists."""
    root = tmp_path_factory.mktemp("sound")
    build_memory(root, some_pairs(80, key_width=20), index="IVF2,Flat", shard_pairs=40)
    return root


@pytest.fixture
def version(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "store")
    return unlock(tmp_path / "store" / "things" / "v1")


def reseal(version: Path, **changes: object) -> None:
    """Write a manifest with the checksums of the files as they are, as a faulty build would."""
    manifest = Manifest.from_json((version / MANIFEST_FILE).read_text())
    files = {name: file_digest(version / name) for name in manifest.files if (version / name).exists()}
    (version / MANIFEST_FILE).write_text(dataclasses.replace(manifest, files=files, **changes).to_json())  # type: ignore[arg-type]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(bytes(data))


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "truncated in the header": lambda path: path.write_bytes(path.read_bytes()[:5]),
    "truncated in the middle": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "truncated at the end": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "bit at the header": lambda path: flip(path, 3),
    "bit in the middle": lambda path: flip(path, path.stat().st_size // 2),
    "bit at the end": lambda path: flip(path, -1),
    "a folder instead": replace_by_folder,
}


def test_the_list_of_files_is_complete(sound: Path) -> None:
    version = sound / "things" / "v1"
    assert sorted(FILES) == sorted(str(path.relative_to(version)) for path in version.rglob("*") if path.is_file())
    assert Store(sound).open("things", "v1", encoder=ENCODER).check_recall()


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_refused_in_one_line_that_names_the_file(version: Path, file: str, damage: str) -> None:
    DAMAGE[damage](version / file)
    with pytest.raises((DamagedVersion, UnknownVersion)) as refused:
        Snapshot.open(version, encoder=ENCODER)
    message = str(refused.value)
    assert message.startswith("things@v1")
    assert file in message
    assert "\n" not in message
    assert str(version.parent.parent) not in message


def use_small_blocks(patch: pytest.MonkeyPatch) -> None:
    """Use a CRC-32 per 64 bytes, not per 16 MiB, so that small files have many."""
    for owner in ("index_store.storage.atomic", "index_store.storage.manifest"):
        patch.setattr(f"{owner}.BLOCK_BYTES", 64)
    patch.setattr("index_store.storage.atomic.CHUNK_BYTES", 64)


@pytest.mark.parametrize("file", [file for file in FILES if file != MANIFEST_FILE])
def test_verify_names_the_first_wrong_bytes_of_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    use_small_blocks(monkeypatch)
    build_memory(tmp_path, some_pairs(80, key_width=20), index="IVF2,Flat", shard_pairs=40)
    path = tmp_path / "things" / "v1" / file
    whole = path.read_bytes()

    def named_range() -> tuple[int, int]:
        with pytest.raises(DamagedVersion) as refused:
            Store(tmp_path).verify("things", "v1")
        found = re.search(
            rf"^things@v1: {file} (?:has \d+ bytes, the manifest says {len(whole)}, and )?"
            r"differs in bytes (\d+)-(\d+):",
            str(refused.value),
        )
        assert found is not None, refused.value
        return int(found[1]), int(found[2])

    for place in (3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        assert named_range() == (place // 64 * 64, min(place // 64 * 64 + 63, len(whole) - 1))
        path.write_bytes(whole[:place])
        assert named_range() == (place // 64 * 64, len(whole) - 1)
    path.write_bytes(whole + bytes(100))
    assert named_range() == (len(whole) // 64 * 64, len(whole) + 99)
    path.write_bytes(whole)
    Store(tmp_path).verify("things", "v1")


def forge(version: Path, file: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(version / file, change(np.load(version / file)))


CONTRADICTIONS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "an id too few": ("shard-0000/ids.npy", lambda rows: rows[:-1]),
    "ids of another kind": (
        "shard-0001/ids.npy",
        lambda rows: rows.astype("f4") if rows.dtype.kind != "S" else np.zeros(len(rows)),
    ),
    "a row too many": ("shard-0000/image.npy", lambda rows: np.vstack([rows, rows[:1]])),
    "another width": ("shard-0001/text.npy", lambda rows: rows[:, :-1]),
    "another precision": ("shard-0000/text.npy", lambda rows: rows.astype(np.float32)),
    "another key width": ("shard-0000/image_key.npy", lambda rows: rows[:, :3]),
    "an offset too few": ("shard-0000/records.npy", lambda rows: rows[:-1]),
    "lines that overlap": ("shard-0000/records.npy", lambda rows: rows[::-1].copy()),
    "lines beyond the end": ("shard-0001/records.npy", lambda rows: rows + 1),
    "a probe too few": ("probes/text.npy", lambda rows: rows[:-1]),
    "no scores": ("probes/image_scores.npy", lambda rows: rows[:, :0]),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradicting_files_are_refused(version: Path, case: str) -> None:
    file, change = CONTRADICTIONS[case]
    forge(version, file, change)
    reseal(version)
    with pytest.raises(DamagedVersion) as refused:
        Snapshot.open(version, encoder=ENCODER)
    assert file in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_index_of_other_rows_is_refused(version: Path, tmp_path: Path) -> None:
    build_memory(tmp_path / "other", some_pairs(81, key_width=20), index="IVF2,Flat", shard_pairs=41)
    shutil.copy(
        tmp_path / "other" / "things" / "v1" / "shard-0000" / "image.faiss", version / "shard-0000" / "image.faiss"
    )
    reseal(version)
    with pytest.raises(
        DamagedVersion, match=r"shard-0000/image.faiss holds 41 rows of width 20, the manifest says 40 of 20"
    ):
        Snapshot.open(version, encoder=ENCODER)


def test_a_file_of_another_kind_is_refused(version: Path) -> None:
    for file in ("shard-0000/text.faiss", "shard-0000/ids.npy", "shard-0000/records.jsonl"):
        kept = (version / file).read_bytes()
        (version / file).write_bytes(b"" if file.endswith("jsonl") else b"not at all")
        reseal(version)
        with pytest.raises(DamagedVersion, match=f"{file} cannot be read"):
            Snapshot.open(version, encoder=ENCODER)
        (version / file).write_bytes(kept)


def test_shards_with_other_counts_than_the_manifest_are_refused(version: Path) -> None:
    reseal(version, shards=[{"folder": "shard-0000", "pairs": 41}, {"folder": "shard-0001", "pairs": 39}])
    with pytest.raises(DamagedVersion, match="shard-0000/"):
        Snapshot.open(version, encoder=ENCODER)
    reseal(version, shards=[{"folder": "shard-0000", "pairs": 40}, {"folder": "shard-0007", "pairs": 40}])
    with pytest.raises(DamagedVersion, match="shard-0007/"):
        Snapshot.open(version, encoder=ENCODER)


def test_a_newer_format_is_refused_before_any_other_file_is_read(version: Path) -> None:
    shutil.rmtree(version / "shard-0000")
    fields = json.loads((version / MANIFEST_FILE).read_text())
    (version / MANIFEST_FILE).write_text(json.dumps({**fields, "format": 7, "more": True}))
    with pytest.raises(
        IncompatibleSnapshot, match=r"things@v1: manifest.json has format 7, this program reads format 2"
    ):
        Snapshot.open(version, encoder=ENCODER)


def test_a_refused_version_leaves_the_served_one_working(sound: Path, tmp_path: Path) -> None:
    serving = open_memory(tmp_path, some_pairs(30), "v1")
    build_memory(tmp_path, some_pairs(30), "v2")
    store = Store(tmp_path)
    store.activate("things", "v1")
    flip(unlock(tmp_path / "things" / "v2") / "shard-0000" / "text.npy", 200)
    with pytest.raises(StoreError):
        store.open("things", "v2", encoder=ENCODER)
    assert store.current("things") == "v1"
    assert serving.retrieve(some_pairs(30).image[:1], "image", 1).ids[0, 0] == "pair-0"


def test_the_files_of_a_version_are_read_only_and_can_be_deleted(tmp_path: Path) -> None:
    """Nothing cuts or overwrites by accident what a service has mapped."""
    build_memory(tmp_path, some_pairs(20))
    path = tmp_path / "things" / "v1"
    files = [file for file in path.rglob("*") if file.is_file()]
    assert len(files) > 5
    assert {file.stat().st_mode & 0o777 for file in files} == {0o444}
    Store(tmp_path).delete("things", "v1")
    assert not path.exists()


@pytest.mark.parametrize("name", ["image.npy", "ids.npy", "records.jsonl", "text.faiss"])
def test_a_file_cut_under_an_open_version_refuses_the_search_and_ends_nothing(version: Path, name: str) -> None:
    """Reading behind the end of a mapped file is SIGBUS, the end of the process."""
    pairs = some_pairs(80, key_width=20)
    snapshot = Snapshot.open(version, encoder=ENCODER)
    found = snapshot.retrieve(pairs.text[:3], "text", 2)
    os.truncate(version / "shard-0001" / name, 100)
    with pytest.raises(DamagedVersion, match=rf"shard-0001/{name} had \d+ bytes when it was opened and has 100 now"):
        snapshot.retrieve(pairs.text[:3], "text", 2)
    with pytest.raises(DamagedVersion):
        next(iter(snapshot.blocks()))
    with pytest.raises(DamagedVersion):
        for row in range(3):
            found.records(row)
