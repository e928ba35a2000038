"""Journal of online edits: an append-only file with checksums, synced before each acknowledgement.

A journal lies beside its version, which never changes:

    file   = header · record …
    header = magic (8) · format (u32) · marker (8) · sha256 of the manifest (32) · crc32 (u32)
    record = marker (8) · payload size (u64) · crc32 of the payload (u32) · crc32 (u32) · payload

Numbers are little-endian. The crc32 at the end of a header, and the second one of a record, cover
the bytes before them. The marker is random per journal, so that no payload can contain a record.
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
HEADER = struct.Struct("<8sI8s32sI")
RECORD_HEADER = struct.Struct("<8sQII")
CRC_BYTES = 4  # both headers end with the crc32 of their earlier bytes

log = logging.getLogger("reco")


class Journal:
    """The only writer of a journal, which holds the file's lock until closed or the process ends.

    edits: number of records.  size: bytes up to the end of the last record, the header included.
    """

    def __init__(self, path: Path, file: FileIO, marker: bytes, edits: int, size: int) -> None:
        self._path, self._file, self._marker = path, file, marker
        self.edits, self.size = edits, size
        self._writable = True  # False once a failed append could not be truncated

    @classmethod
    def open(cls, path: Path, manifest_sha256: str) -> "Journal":
        """Open a journal for writing, creating it if there is none.

        A torn record at the end, left by a writer that died, is truncated and logged.
        Raises StoreBusy while another process writes it, DamagedVersion where it is unreadable.
        """
        with translate_write_errors(path.name), lock_folder(path.parent):
            if not path.exists():
                return cls._write_new(path, manifest_sha256, ())
            file = FileIO(path, "r+")
        with _lock_file(file, path):
            edits, size = 0, HEADER.size
            for end, _ in read_records(path, manifest_sha256):
                edits, size = edits + 1, end
            journal = cls(path, file, _read_marker(file, path, manifest_sha256), edits, size)
            with translate_write_errors(path.name):
                if os.fstat(file.fileno()).st_size > size:
                    journal._truncate_torn_record()
        return journal

    @classmethod
    def create(cls, path: Path, manifest_sha256: str, payloads: Iterable[bytes]) -> "Journal":
        """Create a journal that holds these records from the moment it exists.

        Raises StoreBusy where there is a journal already.
        """
        with translate_write_errors(path.name), lock_folder(path.parent):
            if path.exists():
                raise StoreBusy(
                    f"{short_path(path)} exists already: edits of that version, or left by one of its name; "
                    "compact again"
                )
            return cls._write_new(path, manifest_sha256, payloads)

    @classmethod
    def _write_new(cls, path: Path, manifest_sha256: str, payloads: Iterable[bytes]) -> "Journal":
        """Write a journal under a temporary name, then rename it: every journal has a header."""
        fresh, marker, edits = path.with_name(f".{path.name}.fresh"), secrets.token_bytes(8), 0
        file = FileIO(fresh, "w+")
        with _lock_file(file, path):
            try:
                header = HEADER.pack(MAGIC, FORMAT_VERSION, marker, bytes.fromhex(manifest_sha256), 0)
                _write_all(file, _with_crc(header))
                for payload in payloads:
                    _write_all(file, _encode_record(marker, payload))
                    edits += 1
                os.fsync(file.fileno())
                fresh.rename(path)
                fsync_path(path.parent)
            except BaseException:
                with suppress(OSError):
                    fresh.unlink(missing_ok=True)
                raise
        return cls(path, file, marker, edits, file.tell())

    def append(self, payload: bytes) -> None:
        """Append one record; returns once it is on the disk.

        Raises StoreUnwritable where it cannot be written; the file then ends as before.
        """
        if not self._writable:
            raise StoreUnwritable(
                f"{self._path.name} could not be repaired after a failed write: free some room, then restart"
            )
        try:
            with translate_write_errors(self._path.name):
                self._file.seek(self.size)
                _write_all(self._file, _encode_record(self._marker, payload))
                os.fsync(self._file.fileno())
        except StoreUnwritable:
            self._truncate_failed_append()
            raise
        self.size += RECORD_HEADER.size + len(payload)
        self.edits += 1

    def close(self) -> None:
        """Close the file and free its lock."""
        self._file.close()

    def remove(self) -> None:
        """Close and delete a journal that `create` made."""
        self.close()
        with suppress(OSError):
            self._path.unlink()

    def _truncate_failed_append(self) -> None:
        """Truncate what a failed append wrote, because records behind it would be unreadable."""
        self._writable = False
        with suppress(OSError):
            self._file.truncate(self.size)
            os.fsync(self._file.fileno())
            self._writable = True

    def _truncate_torn_record(self) -> None:
        torn = os.fstat(self._file.fileno()).st_size - self.size
        self._file.truncate(self.size)
        os.fsync(self._file.fileno())
        log.warning(
            "%s: the last %d bytes were no whole record, dropped: %d edits stand",
            short_path(self._path),
            torn,
            self.edits,
        )


def read_records(path: Path, manifest_sha256: str, start: int = HEADER.size) -> Iterator[tuple[int, bytes]]:
    """(end, payload) of every complete record from byte `start` on, without a lock.

    Yields nothing where there is no journal. A bad record at the end was never acknowledged, or is
    being written at the moment: reading stops before it.
    Raises DamagedVersion for a bad record with a complete one behind it, since that one was
    acknowledged, and for a header of another version; IncompatibleSnapshot for a newer format.
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
        marker = _read_marker(file, path, manifest_sha256)
        while True:
            file.seek(start)
            payload = _read_payload(file, marker)
            if payload is not None:
                start += RECORD_HEADER.size + len(payload)
                yield start, payload
                continue
            file.seek(start)
            rest = file.readall() or b""
            if _read_payload(BytesIO(rest), marker) is None:  # else the writer has completed it since
                _refuse_holes(rest, marker, path, start)
                return


def _refuse_holes(rest: bytes, marker: bytes, path: Path, start: int) -> None:
    """Raise DamagedVersion where a complete record follows the bad one at the start of `rest`."""
    place = rest.find(marker, 1)
    while place >= 0:
        if _read_payload(BytesIO(rest[place:]), marker) is not None:
            raise DamagedVersion(
                f"{short_path(path)}: bytes {start} to {start + place} are damaged, and acknowledged edits follow: "
                "restore the file from a copy"
            )
        place = rest.find(marker, place + 1)


def _read_payload(file: RawIOBase | BytesIO, marker: bytes) -> bytes | None:
    """The payload of the record at the file's position, None where there is no complete record."""
    header = file.read(RECORD_HEADER.size) or b""
    if len(header) < RECORD_HEADER.size or not header.startswith(marker) or not _crc_matches(header):
        return None
    _, size, crc, _ = RECORD_HEADER.unpack(header)
    if size > _rest(file):  # before the memory for it is asked for
        return None
    payload = file.read(size) or b""
    return payload if len(payload) == size and zlib.crc32(payload) == crc else None


def _rest(file: RawIOBase | BytesIO) -> int:
    """The bytes from the file's position to its end."""
    if isinstance(file, BytesIO):
        return file.getbuffer().nbytes - file.tell()
    return os.fstat(file.fileno()).st_size - file.tell()


def _read_marker(file: FileIO, path: Path, manifest_sha256: str) -> bytes:
    """Check the header of a journal; returns the marker of its records."""
    file.seek(0)
    header = file.read(HEADER.size) or b""
    if len(header) < HEADER.size or header[:8] != MAGIC or not _crc_matches(header):
        raise DamagedVersion(
            f"{short_path(path)} does not begin as a journal of edits: restore a copy, or remove it and lose its edits"
        )
    _, found, marker, base, _ = HEADER.unpack(header)
    if found > FORMAT_VERSION:
        raise IncompatibleSnapshot(
            f"{short_path(path)} has format {found}, this program reads up to {FORMAT_VERSION}: upgrade it"
        )
    if base.hex() != manifest_sha256:
        raise DamagedVersion(
            f"{short_path(path)} holds edits of another build of this version: restore that build, "
            "or remove the journal"
        )
    return bytes(marker)


def _encode_record(marker: bytes, payload: bytes) -> bytes:
    return _with_crc(RECORD_HEADER.pack(marker, len(payload), zlib.crc32(payload), 0)) + payload


def _with_crc(header: bytes) -> bytes:
    """The header with the crc32 of its earlier bytes in its last four."""
    return header[:-CRC_BYTES] + struct.pack("<I", zlib.crc32(header[:-CRC_BYTES]))


def _crc_matches(header: bytes) -> bool:
    return header == _with_crc(header)


def _write_all(file: FileIO, content: bytes) -> None:
    """Write all bytes; a raw write may stop half-way on a full disk, and the next one says why."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) or 0 :]


@contextmanager
def _lock_file(file: FileIO, path: Path) -> Iterator[None]:
    """Lock a journal exclusively, without waiting; the lock outlives the block. Raises StoreBusy.

    An exception in the block closes the file, since a kept traceback would keep the lock too.
    """
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
    """name/version.journal, for messages: never the whole path."""
    return f"{path.parent.name}/{path.name}"
