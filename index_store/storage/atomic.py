"""Bytes that are certain: digests read back, files and folders synced, one pointer replaced in one step."""

import fcntl
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from index_store.errors import StoreUnwritable, reason

BLOCK_BYTES = (
    1 << 24
)  # a file has one CRC-32 for each 16 MiB: enough to say where it is damaged, and eight digits a block
CHUNK_BYTES = 1 << 20  # read at a time: both sums find it in the processor's cache
CRC_DIGITS = 8
READ_THREADS = 4  # both sums release the interpreter lock; more threads than this wait for the disk


def file_digest(path: Path) -> dict[str, str | int]:
    """{"sha256", "bytes", "crc32": the hexadecimal CRC-32 of each block, joined} of a file, in one pass."""
    whole, blocks, size = hashlib.sha256(), list[int](), 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb") as file:
        while read := file.readinto(buffer):  # whole chunks up to the last, so that none lies in two blocks
            if size % BLOCK_BYTES == 0:
                blocks.append(0)
            blocks[-1] = zlib.crc32(buffer[:read], blocks[-1])
            whole.update(buffer[:read])
            size += read
    return {"sha256": whole.hexdigest(), "bytes": size, "crc32": "".join(f"{block:0{CRC_DIGITS}x}" for block in blocks)}


def file_digests(root: Path, names: Sequence[str]) -> dict[str, dict[str, str | int]]:
    """The digest of each named file under `root`."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: file_digest(root / name), names), strict=True))


def first_difference(one: str, another: str) -> tuple[int, int] | None:
    """(first, last byte) of the first run of blocks whose CRCs differ, None where all agree.  one, another: `crc32` of two digests.

    A block that only one of them has differs.
    """
    cuts = range(0, max(len(one), len(another)), CRC_DIGITS)
    wrong = [at // CRC_DIGITS for at in cuts if one[at : at + CRC_DIGITS] != another[at : at + CRC_DIGITS]]
    if not wrong:
        return None
    run = next((n for n, block in enumerate(wrong) if block != wrong[0] + n), len(wrong))
    return wrong[0] * BLOCK_BYTES, (wrong[0] + run) * BLOCK_BYTES - 1


def fsync_path(path: Path) -> None:
    """Return once a file, or a folder's list of names, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder, and those that it lies in; returns once every new name is on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_path(folder.parent)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file in one step: a reader sees the old text or the new one, also after a power cut."""
    fresh = path.with_name(f".{path.name}.fresh")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    fsync_path(path.parent)


@contextmanager
def translate_write_errors(what: str) -> Iterator[None]:
    """Turn every failure to write into one line that names `what`."""
    try:
        yield
    except OSError as error:
        raise StoreUnwritable(
            f"cannot write {what}: {error.strerror or error}; free some room or grant permission, then run it again"
        ) from error
    except RuntimeError as error:  # faiss reports a short write so
        raise StoreUnwritable(
            f"cannot write {what}: {reason(error)}; free some room or grant permission, then run it again"
        ) from error


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """One writer of a folder's names at a time, across processes; the kernel lets go when its holder dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
