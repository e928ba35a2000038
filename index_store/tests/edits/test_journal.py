"""The journal truncated, corrupted and refused disk space at every byte."""

import logging
import os
import re
import resource
import stat
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from index_store.edits.journal import HEADER, RECORD_HEADER, Journal, _with_crc, read_records
from index_store.errors import DamagedVersion, IncompatibleSnapshot, StoreBusy, StoreUnwritable
from index_store.tests.support.child_process import tiny_disk

MANIFEST, OTHER_MANIFEST = "5e" * 32, "0d" * 32
PAYLOADS = [b"first" * 7, b"", b"third, a longer one" * 5, b"last" * 4]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "v1.journal"


def write_journal(path: Path, payloads: list[bytes] = PAYLOADS) -> bytes:
    journal = Journal.open(path, MANIFEST)
    for payload in payloads:
        journal.append(payload)
    journal.close()
    return path.read_bytes()


def read(path: Path, start: int = HEADER.size) -> list[bytes]:
    return [payload for _, payload in read_records(path, MANIFEST, start)]


def test_records_are_read_in_order(path: Path) -> None:
    assert read(path) == []
    write_journal(path)
    assert read(path) == PAYLOADS
    again = Journal.open(path, MANIFEST)
    assert (again.edits, again.size) == (4, path.stat().st_size)
    again.append(b"more")
    assert read(path) == [*PAYLOADS, b"more"]
    ends = [end for end, _ in read_records(path, MANIFEST)]
    assert ends[-1] == again.size == path.stat().st_size
    assert read(path, ends[2]) == [PAYLOADS[3], b"more"]
    assert [entry.name for entry in path.parent.iterdir()] == ["v1.journal"]


def test_a_journal_created_with_records(path: Path) -> None:
    journal = Journal.create(path, MANIFEST, PAYLOADS)
    journal.append(b"more")
    assert (journal.edits, journal.size) == (5, path.stat().st_size)
    assert read(path) == [*PAYLOADS, b"more"]
    with pytest.raises(StoreBusy, match=r"v1.journal exists already"):
        Journal.create(path, MANIFEST, [])
    journal.remove()
    assert not path.exists()


def test_truncation_at_every_byte_of_the_last_record(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = write_journal(path)
    start = len(whole) - RECORD_HEADER.size - len(PAYLOADS[-1])
    for size in range(start, len(whole)):
        path.write_bytes(whole[:size])
        assert read(path) == PAYLOADS[:-1]
        assert path.stat().st_size == size, "readers repair nothing"
        caplog.clear()
        with caplog.at_level(logging.WARNING, "reco"):
            journal = Journal.open(path, MANIFEST)
        torn = size - start
        assert [record.getMessage() for record in caplog.records] == (
            [f"{path.parent.name}/v1.journal: the last {torn} bytes were no whole record, dropped: 3 edits stand"]
            if torn
            else []
        )
        journal.append(b"after")
        journal.close()
        assert read(path) == [*PAYLOADS[:-1], b"after"]


def test_a_flipped_byte_is_refused_unless_in_the_last_record(path: Path) -> None:
    whole = write_journal(path)
    last = len(whole) - RECORD_HEADER.size - len(PAYLOADS[-1])
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        if place >= last:
            assert read(path) == PAYLOADS[:-1]
            continue
        for look in (read, lambda path: Journal.open(path, MANIFEST)):
            with pytest.raises(DamagedVersion, match=r"v1\.journal") as refused:
                look(path)
            assert "\n" not in str(refused.value)
            assert str(path.parent.parent) not in str(refused.value)
        found = re.search(r"bytes (\d+) to (\d+) are damaged", str(refused.value))
        assert (found is None) == (place < HEADER.size)
        assert found is None or int(found[1]) <= place < int(found[2])


def test_zeros_left_by_a_power_cut_are_truncated(path: Path) -> None:
    whole = write_journal(path)
    path.write_bytes(whole + bytes(4096))
    assert read(path) == PAYLOADS
    Journal.open(path, MANIFEST).close()
    assert path.read_bytes() == whole


def test_a_journal_inside_a_payload_is_no_record(path: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    strange = write_journal(tmp_path / "other" / "v1.journal")
    whole = write_journal(path, [b"one", strange])
    path.write_bytes(whole[:-1])
    assert read(path) == [b"one"]


def test_other_headers_are_refused(path: Path) -> None:
    write_journal(path)
    for look in (Journal.open, lambda path, sha256: list(read_records(path, sha256))):
        with pytest.raises(DamagedVersion, match="another build of this version"):
            look(path, OTHER_MANIFEST)
    whole = path.read_bytes()
    for size in (0, 7, HEADER.size - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedVersion, match="does not begin as a journal"):
            read(path)
    newer = whole[:8] + struct.pack("<I", 2) + whole[12 : HEADER.size - 4]
    path.write_bytes(newer + struct.pack("<I", zlib.crc32(newer)) + whole[HEADER.size :])
    with pytest.raises(IncompatibleSnapshot, match="format 2, this program reads up to 1"):
        read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DamagedVersion, match="cannot be read"):
        read(path)


def test_one_writer_at_a_time(path: Path) -> None:
    journal = Journal.open(path, MANIFEST)
    with pytest.raises(StoreBusy, match=r"v1\.journal is being written by another process"):
        Journal.open(path, MANIFEST)
    journal.append(b"one")
    journal.close()
    Journal.open(path, MANIFEST).close()


@pytest.mark.parametrize("trouble", ["a hole", "no room"])
def test_a_failed_open_keeps_no_lock(path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    refused = []
    if trouble == "a hole":
        whole = write_journal(path)
        flipped = bytes([whole[HEADER.size] ^ 0x10])
        path.write_bytes(whole[: HEADER.size] + flipped + whole[HEADER.size + 1 :])
    else:
        monkeypatch.setattr(
            os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
    for _ in range(2):
        with pytest.raises((DamagedVersion, StoreUnwritable)) as found:
            Journal.open(path, MANIFEST)
        refused.append(found.value)  # a service keeps this exception, and its traceback, too
    assert len({type(error) for error in refused}) == 1


def test_records_are_synced_before_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int | str] = []
    real = os.fsync

    def watched(descriptor: int) -> None:
        real(descriptor)
        found = os.fstat(descriptor)
        synced.append("folder" if stat.S_ISDIR(found.st_mode) else found.st_size)

    monkeypatch.setattr(os, "fsync", watched)
    journal = Journal.open(path, MANIFEST)
    assert synced == [HEADER.size, "folder"]
    journal.append(b"four")
    assert synced[2:] == [path.stat().st_size]


def test_after_a_failed_truncation_appends_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(path, MANIFEST)
    journal.append(b"one")

    def failing(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        with pytest.raises(StoreUnwritable, match=r"cannot write v1.journal: Input/output error"):
            journal.append(b"two")
    with pytest.raises(StoreUnwritable, match="restart"):
        journal.append(b"three")
    journal.close()
    assert read(path) == [b"one"]


FULL = """
import resource, sys
from pathlib import Path
from typing import Any
from index_store.errors import StoreUnwritable
from index_store.edits.journal import Journal
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
journal = Journal.open(Path(sys.argv[1]), "5e" * 32)
journal.append(b"x" * 500)
before = Path(sys.argv[1]).stat().st_size
try:
    journal.append(b"y" * 500)
except StoreUnwritable as error:
    print(error)
assert Path(sys.argv[1]).stat().st_size == before == journal.size
journal.append(b"z" * 100)
"""


def test_an_append_beyond_the_file_size_limit(path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.startswith("cannot write v1.journal: ")
    assert done.stdout.count("\n") == 1
    assert read(path) == [b"x" * 500, b"z" * 100]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with room for 64 KB."""
    with tiny_disk(tmp_path / "disk", "64k") as root:
        yield root


def test_an_append_on_a_full_disk(full_disk: Path) -> None:
    path = full_disk / "v1.journal"
    journal = Journal.open(path, MANIFEST)
    journal.append(b"x" * 20_000)
    (full_disk / "ballast").write_bytes(bytes(20_000))
    with pytest.raises(StoreUnwritable, match="No space left on device; free some room"):
        journal.append(b"y" * 40_000)
    assert path.stat().st_size == journal.size
    (full_disk / "ballast").unlink()
    journal.append(b"z" * 20_000)
    assert read(path) == [b"x" * 20_000, b"z" * 20_000]


def test_records_appended_while_a_reader_checks_the_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records appended behind what looked like the end are not mistaken for a hole."""
    from index_store.edits import journal as module

    writer, real, late = Journal.open(path, MANIFEST), module._read_payload, [b"two", b"three"]
    writer.append(b"one")

    def slow(file: Any, marker: bytes) -> bytes | None:
        found = real(file, marker)
        while found is None and late:
            writer.append(late.pop(0))
        return found

    monkeypatch.setattr(module, "_read_payload", slow)
    assert read(path) == [b"one", b"two", b"three"]


def test_a_reader_beside_a_writer(path: Path) -> None:
    """Without a lock, a reader sees complete records only, and never fewer than before."""
    journal, done, seen = Journal.open(path, MANIFEST), threading.Event(), [0]
    trouble: list[object] = []

    def watch() -> None:
        while not done.is_set():
            found = read(path)
            if len(found) < seen[-1] or found != [b"%d" % n * (n % 50) for n in range(len(found))]:
                trouble.append(found)
            seen.append(len(found))

    def watched() -> None:
        try:
            watch()
        except DamagedVersion as error:
            trouble.append(error)

    reader = threading.Thread(target=watched)
    reader.start()
    for n in range(400):
        journal.append(b"%d" % n * (n % 50))
    done.set()
    reader.join()
    assert trouble == []
    assert len(read(path)) == 400


def test_a_record_of_an_absurd_size_is_refused_before_memory_is_asked_for(path: Path) -> None:
    """A header with right checksums may name exabytes."""
    journal = Journal.open(path, MANIFEST)
    journal.append(b"an edit")
    journal.close()
    whole = path.read_bytes()
    marker = whole[HEADER.size : HEADER.size + 8]
    for size in (2**63 - 1, 2**64 - 1, 2**40):
        path.write_bytes(whole + _with_crc(RECORD_HEADER.pack(marker, size, 0, 0)) + b"x")
        assert [payload for _, payload in read_records(path, MANIFEST)] == [b"an edit"]
