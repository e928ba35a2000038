"""Durable file operations: fsync of files and directories, checksums, atomic replacement, locks."""

import fcntl
import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from index_store.errors import StoreUnwritable, faiss_message

BLOCK_BYTES = 1 << 24  # bytes covered by one CRC-32: fine enough to locate damage within 16 MiB
CHUNK_BYTES = 1 << 20  # bytes read at a time, so that both checksums find them in the processor's cache
CRC_DIGITS = 8  # hexadecimal digits of one CRC-32
READ_THREADS = 4  # both checksums release the interpreter lock; more threads wait for the disk


def file_digest(path: Path) -> dict[str, str | int]:
    """Checksums of a file in one pass: {"sha256", "bytes", "crc32": CRC-32 per block in hex}."""
    whole, blocks, size = hashlib.sha256(), list[int](), 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb") as file:
        while read := file.readinto(buffer):  # full chunks until the end, so none spans two blocks
            if size % BLOCK_BYTES == 0:
                blocks.append(0)
            blocks[-1] = zlib.crc32(buffer[:read], blocks[-1])
            whole.update(buffer[:read])
            size += read
    return {"sha256": whole.hexdigest(), "bytes": size, "crc32": "".join(f"{block:0{CRC_DIGITS}x}" for block in blocks)}


def file_digests(root: Path, names: Sequence[str]) -> dict[str, dict[str, str | int]]:
    """Checksums of each named file under `root`, computed in parallel."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: file_digest(root / name), names), strict=True))


def first_difference(one: str, another: str) -> tuple[int, int] | None:
    """(first, last) byte of the first run of blocks whose CRC-32 differ, None where all agree.

    one, another: "crc32" of two file digests. A block that only one of them has differs.
    """
    cuts = range(0, max(len(one), len(another)), CRC_DIGITS)
    wrong = [at // CRC_DIGITS for at in cuts if one[at : at + CRC_DIGITS] != another[at : at + CRC_DIGITS]]
    if not wrong:
        return None
    run = next((n for n, block in enumerate(wrong) if block != wrong[0] + n), len(wrong))
    return wrong[0] * BLOCK_BYTES, (wrong[0] + run) * BLOCK_BYTES - 1


def fsync_path(path: Path) -> None:
    """fsync a file, or a folder's list of names; returns once it is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents; returns once every new name is on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_path(folder.parent)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file atomically: old or new text is read, even after a power cut."""
    # a name of its own: two writers of one temporary file would leave a mixture of both texts
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".fresh", dir=path.parent)
    fresh = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(handle, 0o644)
            os.fsync(handle)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


@contextmanager
def translate_write_errors(what: str) -> Iterator[None]:
    """Raise StoreUnwritable, naming `what`, for every OSError or faiss write error in the block."""
    try:
        yield
    except OSError as error:
        raise StoreUnwritable(
            f"cannot write {what}: {error.strerror or error}; free some room or grant permission, then run it again"
        ) from error
    except RuntimeError as error:  # how faiss reports a short write
        raise StoreUnwritable(
            f"cannot write {what}: {faiss_message(error)}; free some room or grant permission, then run it again"
        ) from error


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder exclusively across processes, waiting for it; process exit frees it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
