"""Edits on disk, in the order they were acknowledged: appended, checksummed, synced before anyone is told.

A journal lies beside its version, which itself never changes:

    file    = magic (8) · format (u32) · mark (8) · sha256 seal of the version's manifest (32) · crc32 of these (u32) · records
    record  = mark (8) · bytes of the payload (u64) · crc32 of the payload (u32) · crc32 of these (u32) · payload

The mark is drawn at random for each journal, so that no payload can be taken for a record. All numbers are little-endian.
"""

import fcntl
import logging
import os
import secrets
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO, FileIO, RawIOBase
from pathlib import Path

from index_store.errors import DamagedVersion, IncompatibleSnapshot, StoreBusy, StoreUnwritable
from index_store.storage.atomic import fsync_path, lock_folder, translate_write_errors

JOURNAL_SUFFIX = ".journal"
FORMAT_VERSION = 1
MAGIC = b"RECOEDIT"
HEAD = struct.Struct("<8sI8s32sI")
RECORD = struct.Struct("<8sQII")
CRC = 4  # the last four bytes of either are the crc32 of those before

log = logging.getLogger("reco")


class Journal:
    """The one writer of a journal: it holds the file's lock until it is closed or dies.

    edits: whole records.  size: bytes up to the end of the last, the head included.
    """

    def __init__(self, path: Path, file: FileIO, mark: bytes, edits: int, size: int) -> None:
        self._path, self._file, self._mark = path, file, mark
        self.edits, self.size = edits, size
        self._whole = True  # False once a failed append could not be cut off again

    @classmethod
    def open(cls, path: Path, seal: str) -> "Journal":
        """Take the journal for writing, made if there is none; what a dying writer left unfinished at its end is cut off and logged."""
        with translate_write_errors(path.name), lock_folder(path.parent):
            if not path.exists():
                return cls._made(path, seal, ())
            file = FileIO(path, "r+")
        with _locked(file, path):
            edits, size = 0, HEAD.size
            for end, _ in read_records(path, seal):
                edits, size = edits + 1, end
            journal = cls(path, file, _mark(file, path, seal), edits, size)
            with translate_write_errors(path.name):
                if os.fstat(file.fileno()).st_size > size:
                    journal._cut()
        return journal

    @classmethod
    def create(cls, path: Path, seal: str, payloads: Iterable[bytes]) -> "Journal":
        """A new journal that holds these records from the moment it exists; StoreBusy where there is one already."""
        with translate_write_errors(path.name), lock_folder(path.parent):
            if path.exists():
                raise StoreBusy(
                    f"{short_path(path)} exists already: edits of that version, or left by one of its name; compact again"
                )
            return cls._made(path, seal, payloads)

    @classmethod
    def _made(cls, path: Path, seal: str, payloads: Iterable[bytes]) -> "Journal":
        """Written beside its place and renamed into it, so that no journal ever lacks its head."""
        fresh, mark, edits = path.with_name(f".{path.name}.fresh"), secrets.token_bytes(8), 0
        file = FileIO(fresh, "w+")
        with _locked(file, path):
            _write_all(file, _sealed(HEAD.pack(MAGIC, FORMAT_VERSION, mark, bytes.fromhex(seal), 0)))
            for payload in payloads:
                _write_all(file, _record(mark, payload))
                edits += 1
            os.fsync(file.fileno())
            fresh.rename(path)
            fsync_path(path.parent)
        return cls(path, file, mark, edits, file.tell())

    def append(self, payload: bytes) -> None:
        """Return once the record is on the disk; StoreUnwritable if it cannot be, and then the file ends as it did before."""
        if not self._whole:
            raise StoreUnwritable(
                f"{self._path.name} could not be repaired after a failed write: free some room, then restart"
            )
        try:
            with translate_write_errors(self._path.name):
                self._file.seek(self.size)
                _write_all(self._file, _record(self._mark, payload))
                os.fsync(self._file.fileno())
        except StoreUnwritable:
            self._withdraw()
            raise
        self.size += RECORD.size + len(payload)
        self.edits += 1

    def close(self) -> None:
        """Let others write."""
        self._file.close()

    def remove(self) -> None:
        """Undo create()."""
        self.close()
        with suppress(OSError):
            self._path.unlink()

    def _withdraw(self) -> None:
        """Cut off what a failed append left: after it nothing more could be read."""
        self._whole = False
        with suppress(OSError):
            self._file.truncate(self.size)
            os.fsync(self._file.fileno())
            self._whole = True

    def _cut(self) -> None:
        torn = os.fstat(self._file.fileno()).st_size - self.size
        self._file.truncate(self.size)
        os.fsync(self._file.fileno())
        log.warning(
            "%s: the last %d bytes were no whole record, dropped: %d edits stand",
            short_path(self._path),
            torn,
            self.edits,
        )


def read_records(path: Path, seal: str, start: int = HEAD.size) -> Iterator[tuple[int, bytes]]:
    """(end, payload) of every whole record from byte `start` on, without any lock; nothing where there is no journal.

    A bad record that is the last one was never acknowledged, or is being written just now: reading ends before it.
    A bad record with a whole one behind it is DamagedVersion, because that one was acknowledged.
    """
    try:
        file = FileIO(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise DamagedVersion(
            f"{short_path(path)} cannot be read ({error.strerror}): restore it or its permissions"
        ) from error
    with file:
        mark = _mark(file, path, seal)
        while True:
            file.seek(start)
            payload = _payload(file, mark)
            if payload is not None:
                start += RECORD.size + len(payload)
                yield start, payload
                continue
            file.seek(start)
            rest = file.readall() or b""
            if _payload(BytesIO(rest), mark) is None:  # otherwise its writer has finished it just now
                _refuse_holes(rest, mark, path, start)
                return


def _refuse_holes(rest: bytes, mark: bytes, path: Path, start: int) -> None:
    place = rest.find(mark, 1)
    while place >= 0:
        if _payload(BytesIO(rest[place:]), mark) is not None:
            raise DamagedVersion(
                f"{short_path(path)}: bytes {start} to {start + place} are damaged, and acknowledged edits follow: restore the file from a copy"
            )
        place = rest.find(mark, place + 1)


def _payload(file: RawIOBase | BytesIO, mark: bytes) -> bytes | None:
    """The payload of the record that begins here, None where there is no whole one."""
    head = file.read(RECORD.size) or b""
    if len(head) < RECORD.size or not head.startswith(mark) or not _intact(head):
        return None
    _, size, crc, _ = RECORD.unpack(head)
    payload = file.read(size) or b""
    return payload if len(payload) == size and zlib.crc32(payload) == crc else None


def _mark(file: FileIO, path: Path, seal: str) -> bytes:
    """Check the head; the mark of this journal's records."""
    file.seek(0)
    head = file.read(HEAD.size) or b""
    if len(head) < HEAD.size or head[:8] != MAGIC or not _intact(head):
        raise DamagedVersion(
            f"{short_path(path)} does not begin as a journal of edits: restore a copy, or remove it and lose its edits"
        )
    _, found, mark, base, _ = HEAD.unpack(head)
    if found > FORMAT_VERSION:
        raise IncompatibleSnapshot(
            f"{short_path(path)} has format {found}, this program reads up to {FORMAT_VERSION}: upgrade it"
        )
    if base.hex() != seal:
        raise DamagedVersion(
            f"{short_path(path)} holds edits of another build of this version: restore that build, or remove the journal"
        )
    return bytes(mark)


def _record(mark: bytes, payload: bytes) -> bytes:
    return _sealed(RECORD.pack(mark, len(payload), zlib.crc32(payload), 0)) + payload


def _sealed(head: bytes) -> bytes:
    """The same with the crc32 of all before it in its last four bytes."""
    return head[:-CRC] + struct.pack("<I", zlib.crc32(head[:-CRC]))


def _intact(head: bytes) -> bool:
    return head == _sealed(head)


def _write_all(file: FileIO, content: bytes) -> None:
    """A raw write may stop half way, as on a disk that fills up: the next one then says why."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) or 0 :]


@contextmanager
def _locked(file: FileIO, path: Path) -> Iterator[None]:
    """Take the lock or refuse. A failure closes the file, since an error that someone keeps would keep the lock too."""
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreBusy(
                f"{short_path(path)} is being written by another process: send the edits there, or stop it"
            ) from error
        yield
    except BaseException:
        file.close()
        raise


def short_path(path: Path) -> str:
    """name/version.journal: never the whole path."""
    return f"{path.parent.name}/{path.name}"
