"""Bytes that are certain: digests read back, files and folders synced, one pointer replaced in one step."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from index_store.errors import StoreUnwritable


def digest(path: Path) -> dict[str, str | int]:
    """{"sha256", "bytes"} of a file, streamed."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": os.fstat(file.fileno()).st_size}


def sync(path: Path) -> None:
    """Return once a file, or a folder's list of names, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file in one step: a reader sees the old text or the new one, also after a power cut."""
    fresh = path.with_name(f".{path.name}.fresh")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    sync(path.parent)


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn every failure to write into one line that names `what`."""
    try:
        yield
    except OSError as error:
        raise StoreUnwritable(
            f"cannot write {what}: {error.strerror or error}; free some room or grant permission, then run it again"
        ) from error
    except RuntimeError as error:  # faiss reports a short write so
        reason = str(error).rpartition("Error: ")[2].splitlines()[0]
        raise StoreUnwritable(f"cannot write {what}: {reason}; free some room or grant permission, then run it again") from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One writer of a folder's names at a time, across processes; the kernel lets go when its holder dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
