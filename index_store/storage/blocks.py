"""Block files: named arrays in one file, which has its name only once it is whole and on the disk.

What is made block by block goes on after the last block that has its name: a build, and what
training prepares.
"""

import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from index_store.storage.atomic import fsync_path

__all__ = ["DAMAGE", "read_block", "write_block"]

# raised by `read_block` where the file was cut or altered: every array has a CRC
DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


def write_block(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as an uncompressed .npz; it replaces `path` in one step. Raises OSError."""
    fresh = path.with_name(f".{path.name}.fresh")
    with fresh.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    fsync_path(path.parent)


def read_block(path: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a block, or only those of the given names. Raises DAMAGE."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in (file.files if names is None else names)}
