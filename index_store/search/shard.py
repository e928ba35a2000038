"""One shard of a version: memory-mapped columns and one faiss index per side."""

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from index_store.errors import DamagedVersion
from index_store.float16 import to_float32
from index_store.search.gpu import ClonedIndex, DeviceThread
from index_store.storage.manifest import Manifest, index_file
from index_store.types import SIDES, KeyKind, Side

BLOCK_ROWS = 65_536  # rows converted to float32 at a time: 128 MiB at D = 512


def keys_file(side: Side, kind: KeyKind) -> str:
    """Name of the file with a side's search keys: the vectors themselves, or keys of their own."""
    return f"{side}.npy" if kind == "vector" else f"{side}_key.npy"


class Shard:
    """A shard, opened completely and consistent with its manifest, or not at all.

    pairs: N.  ids: (N,) int64 or UTF-8 bytes.  values, keys: per side (N, D) and (N, Dk) float16,
    memory-mapped.  indexes: per side a faiss index, on the device of `device_thread` if given.
    Raises DamagedVersion for a file that cannot be read or contradicts the manifest.
    """

    def __init__(
        self,
        root: Path,
        folder: str,
        pairs: int,
        manifest: Manifest,
        *,
        device_thread: DeviceThread | None = None,
    ) -> None:
        self._root, self._folder, self._manifest = root, folder, manifest
        self._maps: dict[str, mmap.mmap] = {}
        self.pairs = pairs
        self.ids = self._map_rows("ids.npy", (pairs,))
        self._order = self._map_rows("order.npy", (pairs,))
        self.values = {side: self._map_rows(f"{side}.npy", (pairs, manifest.dim), random_access=True) for side in SIDES}
        self.keys = {
            side: self._map_rows(keys_file(side, manifest.key_kind(side)), (pairs, manifest.key_dim(side)))
            for side in SIDES
        }
        self._offsets = self._map_rows("records.npy", (pairs + 1,))
        self._records = self._map("records.jsonl", lambda path: np.memmap(path, np.uint8, mode="r"))
        self.indexes: dict[Side, Any] = {side: self._open_index(side) for side in SIDES}
        if device_thread is not None:
            self.indexes = {side: ClonedIndex(index, device_thread) for side, index in self.indexes.items()}
        self._check_offsets()
        self._sizes = {name: mapped.size() for name, mapped in self._maps.items()}

    def check_sizes(self) -> None:
        """Raise DamagedVersion where a mapped file has another size than at the opening.

        Reading a mapping behind the end of its file would end the process with SIGBUS. One fstat
        per file, 10 microseconds for a shard; what is cut between this check and the reading is
        not noticed.
        """
        for name, size in self._sizes.items():
            found = self._maps[name].size()
            if found != size:
                raise self._damaged(name, f"had {size} bytes when it was opened and has {found} now")

    def resident_bytes(self) -> int:
        """Bytes of flat indexes in process memory; all other data is mapped or on a device."""
        return sum(4 * index.ntotal * index.d for index in self.indexes.values() if isinstance(index, faiss.IndexFlat))

    def record(self, row: int) -> dict[str, Any]:
        """The caption and metadata of one row, read from disk. Raises DamagedVersion."""
        self.check_sizes()
        record: dict[str, Any] = json.loads(bytes(self._records[self._offsets[row] : self._offsets[row + 1]]))
        return record

    def find_rows(self, ids: np.ndarray) -> np.ndarray:
        """(n,) int64 rows of these ids, -1 = none, by bisection of the mapped id file.

        ids: (n,) int64 or bytes, as stored.
        """
        truncated = ids.astype(self.ids.dtype)  # an id longer than any here is cut, and differs below
        places = np.searchsorted(self.ids, truncated, sorter=self._order)
        rows = self._order[np.minimum(places, self.pairs - 1)]
        found: np.ndarray = np.where(self.ids[rows] == ids, rows, -1)
        return found

    def _map_rows(self, name: str, shape: tuple[int, ...], *, random_access: bool = False) -> np.ndarray:
        """Map one array and check its shape and dtype against the manifest.

        random_access: tell the kernel not to read 128 KiB around each row that a search takes.
        Scans, which profit from reading ahead, go through `keys`, another map of the same file.
        """
        rows = self._map(name, lambda path: _map_array(path, random_access))
        if rows.shape != shape:
            raise self._damaged(name, f"holds {rows.shape}, the manifest says {shape}")
        kinds = {"ids.npy": ("i8", "S"), "order.npy": ("i8",), "records.npy": ("i8",)}.get(name, ("f2",))
        if rows.dtype.str[1:] not in kinds and rows.dtype.kind not in kinds:
            raise self._damaged(name, f"holds {rows.dtype}, not {' or '.join(kinds)}")
        return rows

    def _open_index(self, side: Side) -> faiss.Index:
        """The faiss index of a side, mapped from its file or built flat in memory from the keys."""
        name, width = index_file(side), self._manifest.key_dim(side)
        if f"{self._folder}/{name}" not in self._manifest.files:
            return build_flat_index(self.keys[side])
        index: faiss.Index = self._read(name, lambda path: faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC))
        self._map(name, lambda path: np.memmap(path, np.uint8, mode="r"))  # faiss does not tell its mapping's size
        if (index.ntotal, index.d) != (self.pairs, width):
            raise self._damaged(
                name, f"holds {index.ntotal} rows of width {index.d}, the manifest says {self.pairs} of {width}"
            )
        return index

    def _check_offsets(self) -> None:
        """Raise DamagedVersion where records.npy and records.jsonl contradict each other."""
        if self._offsets[0] != 0 or self._offsets[-1] != len(self._records) or np.any(np.diff(self._offsets) <= 0):
            raise self._damaged(
                "records.npy", f"does not cut the {len(self._records)} bytes of records.jsonl into {self.pairs} lines"
            )

    def _map(self, name: str, open_map: Callable[[Path], np.memmap]) -> np.ndarray:
        """A mapped file as an array; `check_sizes` watches its size from now on."""
        rows: np.memmap = self._read(name, open_map)
        self._maps[name] = _mapping(rows)
        return np.asarray(rows)

    def _read(self, name: str, read: Callable[[Path], Any]) -> Any:
        try:
            return read(self._root / self._folder / name)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._damaged(name, f"cannot be read ({type(error).__name__})") from error

    def _damaged(self, name: str, what: str) -> DamagedVersion:
        return DamagedVersion(f"{self._manifest.ref}: {self._folder}/{name} {what}: restore or rebuild the version")


def _map_array(path: Path, random_access: bool) -> np.memmap:
    rows: np.memmap = np.load(path, mmap_mode="r", allow_pickle=False)
    if random_access and hasattr(mmap, "MADV_RANDOM"):
        _mapping(rows).madvise(mmap.MADV_RANDOM)
    return rows


def _mapping(rows: np.memmap) -> mmap.mmap:
    found: mmap.mmap = vars(rows)["_mmap"]
    return found


def build_flat_index(keys: np.ndarray) -> faiss.Index:
    """An exact inner-product index over (N, Dk) float16 keys, converted block by block."""
    index = faiss.IndexFlatIP(keys.shape[1])
    for start in range(0, len(keys), BLOCK_ROWS):
        index.add(to_float32(keys[start : start + BLOCK_ROWS]))  # (BLOCK_ROWS, Dk)
    return index
