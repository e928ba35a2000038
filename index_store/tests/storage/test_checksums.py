"""Verification by recorded stats: what is trusted, what is read again, what is found later."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from index_store.errors import DamagedVersion
from index_store.snapshot import Snapshot
from index_store.storage import atomic, checksums
from index_store.storage.checksums import FileStats, record_verified, verified_record_path, verify
from index_store.storage.manifest import Manifest
from index_store.store import Store
from index_store.tests.storage.test_damage import DAMAGE, flip
from index_store.tests.support.small import ENCODER, build_memory, some_pairs


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read, in order; files of any size count as large."""
    names: list[str] = []

    def digest(path: Path) -> dict[str, str | int]:
        names.append(path.name)
        return atomic.file_digest(path)

    monkeypatch.setattr(checksums, "SMALL_BYTES", 0)
    monkeypatch.setattr(checksums, "file_digest", digest)
    return names


@pytest.fixture
def version(read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("index_store.build.build.READ_ONLY", 0o644)  # a later chmod would void the record
    build_memory(tmp_path, some_pairs(400), index="IVF4,SQfp16")
    return tmp_path / "things" / "v1"


def open_version(version: Path) -> Snapshot:
    return Snapshot.open(version, encoder=ENCODER)


def record_current_stats(version: Path, manifest: Manifest) -> None:
    """Record the files as intact, so that damage looks as if it had left the stat unchanged."""
    verified_record_path(version).unlink(missing_ok=True)
    record_verified(version, manifest, FileStats.collect(version, manifest.files))
    assert verified_record_path(version).exists()


def test_a_built_version_opens_without_reading_large_files(version: Path, read: list[str]) -> None:
    assert len(open_version(version)) == 400
    assert read == []


def test_small_files_are_always_read(version: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "SMALL_BYTES", 8000)
    open_version(version)
    assert "ids.npy" in read
    assert "image.npy" not in read


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "file", ["shard-0000/image.npy", "shard-0000/text.faiss", "shard-0000/records.jsonl", "probes/image.npy"]
)
def test_every_damage_is_noticed(version: Path, file: str, damage: str) -> None:
    DAMAGE[damage](version / file)
    with pytest.raises(DamagedVersion, match=file):
        open_version(version)
    assert not verified_record_path(version).exists()


def test_a_write_that_restores_size_and_mtime_is_noticed(version: Path) -> None:
    file = version / "shard-0000" / "text.npy"
    before = file.stat()
    flip(file, 2000)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(DamagedVersion, match=r"shard-0000/text.npy differs in bytes 0-12927"):
        open_version(version)


def copy_version(version: Path) -> None:
    shutil.copytree(version, version.with_name("copy"))
    shutil.rmtree(version)
    version.with_name("copy").rename(version)


def replace_file(version: Path) -> None:
    shutil.copy2(version / "shard-0000" / "image.npy", version / "fresh")
    (version / "fresh").replace(version / "shard-0000" / "image.npy")


UNTRUSTED: dict[str, Callable[[Path], object]] = {
    "copied": copy_version,
    "a file restored": replace_file,
    "touched": lambda version: (version / "shard-0000" / "image.npy").touch(),
    "no record": lambda version: verified_record_path(version).unlink(),
    "half a record": lambda version: verified_record_path(version).write_bytes(
        verified_record_path(version).read_bytes()[:90]
    ),
    "a wrong record": lambda version: flip(verified_record_path(version), -20),
    "an empty record": lambda version: verified_record_path(version).write_bytes(b""),
    "a binary record": lambda version: verified_record_path(version).write_bytes(b"\xff\n\xff"),
}


@pytest.mark.parametrize("case", UNTRUSTED)
def test_files_without_a_valid_record_are_read_and_recorded(version: Path, read: list[str], case: str) -> None:
    UNTRUSTED[case](version)
    open_version(version)
    assert "image.npy" in read
    read.clear()
    open_version(version)
    assert read == []


def test_a_record_of_another_build_is_ignored(version: Path, read: list[str], tmp_path: Path) -> None:
    old = verified_record_path(version).read_bytes()
    shutil.rmtree(version)
    build_memory(tmp_path, some_pairs(400, seed=5), index="IVF4,SQfp16")
    verified_record_path(version).write_bytes(old)
    open_version(version)
    assert read.count("image.npy") == 2  # the vectors and the probes


def test_damage_with_an_unchanged_stat_is_found_by_verify(version: Path, read: list[str]) -> None:
    store, manifest = Store(version.parents[1]), open_version(version).manifest
    flip(version / "shard-0000" / "image.faiss", -300)
    flip(version / "shard-0000" / "records.jsonl", 5)
    record_current_stats(version, manifest)
    serving = open_version(version)  # trusted, because the stat equals the record
    assert read == []
    with pytest.raises(
        DamagedVersion, match=r"/image.faiss differs in .*; shard-0000/records.jsonl differs in bytes 0-"
    ) as found:
        verify(store.path("things", "v1"), serving.manifest, threads=1)
    assert "\n" not in str(found.value)
    with pytest.raises(DamagedVersion):  # the record is gone
        open_version(version)


def test_verify_names_the_first_wrong_range_of_each_file(
    version: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(atomic, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(atomic, "CHUNK_BYTES", 1024)
    monkeypatch.setattr("index_store.storage.manifest.BLOCK_BYTES", 4096)
    build_memory(tmp_path, some_pairs(400), "v2")
    folder = tmp_path / "things" / "v2"
    for position in (9000, 4097, 12_900):
        flip(folder / "shard-0000" / "image.npy", position)
    flip(folder / "shard-0000" / "text.npy", -1)
    (folder / "shard-0000" / "ids.npy").unlink()
    with pytest.raises(DamagedVersion) as found:
        Store(tmp_path).verify("things", "v2")
    assert str(found.value) == (
        "things@v2: shard-0000/ids.npy cannot be read (No such file or directory); "
        "shard-0000/image.npy differs in bytes 4096-12927; "
        "shard-0000/text.npy differs in bytes 12288-12927: restore or rebuild the version"
    )


def test_nothing_is_recorded_while_a_write_may_leave_the_stat_unchanged(
    version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = open_version(version).manifest
    verified_record_path(version).unlink()
    ahead = 10**18  # the file server's clock runs ahead of ours: a later write may leave the same ctime
    monkeypatch.setattr("index_store.storage.checksums.time.time_ns", lambda: ahead)
    verify(version, manifest)
    assert not verified_record_path(version).exists()


def test_a_change_while_reading_is_not_recorded(version: Path) -> None:
    manifest = open_version(version).manifest
    stats = FileStats.collect(version, manifest.files)
    verified_record_path(version).unlink()
    (version / "shard-0000" / "image.npy").touch()
    record_verified(version, manifest, stats)
    assert not verified_record_path(version).exists()


def test_a_read_only_store_opens(version: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    verified_record_path(version).unlink()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert len(open_version(version)) == 400
    assert "image.npy" in read
    assert not verified_record_path(version).exists()


def test_a_small_version_needs_no_record(tmp_path: Path) -> None:
    build_memory(tmp_path, some_pairs(5))
    assert [path.name for path in (tmp_path / "things").iterdir()] == ["v1"]
    assert np.isfinite(len(Store(tmp_path).open("things", "v1", encoder=ENCODER)))
