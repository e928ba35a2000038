"""Snapshot: a verified, open version of a memory, searchable by image and by text."""

import copy
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np

from index_store.errors import IncompatibleSnapshot, QueryRefused, RecallTooLow
from index_store.float16 import to_float32
from index_store.neighbors import Neighbors
from index_store.search.delta import Delta, EditedIndex
from index_store.search.filters import DEFAULT_PARAMS, RowFilter, SearchParams
from index_store.search.gpu import DeviceThread
from index_store.search.hits import Hits, SideIndex
from index_store.search.probes import RECALL_K, ProbeQueries
from index_store.search.shard import Shard
from index_store.search.sharded import ShardedIndex, find_nearest
from index_store.storage.checksums import verify
from index_store.storage.manifest import Manifest, read_manifest, same_encoder
from index_store.types import SIDES, KeyKind, Pairs, Side, decode_ids, other

BLOCK_PAIRS = 8_192  # pairs per block of `blocks`: 40 MB at D = 512

_open_snapshots: "weakref.WeakSet[Snapshot]" = weakref.WeakSet()
_open_snapshots_lock = threading.Lock()


class Snapshot:
    """One version of a memory with the edits made on it so far; immutable, so threads share it.

    `Snapshot.open` verifies a version and opens it; `with_delta` puts edits on top. A snapshot is
    never closed: its files stay mapped until the last reference (a Memory, a batch, a Neighbors)
    is dropped.

    manifest: of the version.  id_kind: "i" or "S", the dtype kind of the stored ids.
    unread_files: large files whose recorded stat was trusted at opening; `Store.verify` reads them.
    """

    def __init__(
        self,
        manifest: Manifest,
        shards: Sequence[Shard],
        probe_queries: Mapping[Side, ProbeQueries],
        unread_files: frozenset[str] = frozenset(),
    ) -> None:
        self.manifest = manifest
        self.unread_files = unread_files
        self.id_kind = shards[0].ids.dtype.kind
        self._base_indexes = {side: ShardedIndex(shards, side) for side in SIDES}
        self._indexes: Mapping[Side, SideIndex] = self._base_indexes  # with the delta, once there is one
        self._delta: Delta | None = None
        self._probe_queries = probe_queries
        self._resident_bytes = sum(shard.resident_bytes() for shard in shards)
        with _open_snapshots_lock:
            _open_snapshots.add(self)

    @classmethod
    def open(cls, path: Path, *, encoder: str, devices: Sequence[int] = ()) -> "Snapshot":
        """Verify and open the version in the directory `path` (…/name/version), without its edits.

        encoder: fingerprint of the encoder of the queries; its digest must equal the manifest's.
        devices: GPUs to clone the indexes to, shard by shard in turn; with none they stay mapped.
        A large file whose stat has not changed since it was last read in full is not read again.
        Raises UnknownVersion, DamagedVersion, IncompatibleSnapshot, DeviceRefused.
        """
        manifest = read_manifest(path)
        if not same_encoder(manifest.encoder, encoder):
            raise IncompatibleSnapshot(
                f"{manifest.ref} was built by {manifest.encoder}, this service encodes with {encoder}: "
                "rebuild it, or serve its encoder"
            )
        unread_files = verify(path, manifest, trust=True)
        device_threads = cycle([DeviceThread.get(device) for device in devices] or [None])
        shards = [
            Shard(path, shard["folder"], shard["pairs"], manifest, device_thread=next(device_threads))
            for shard in manifest.shards
        ]
        probe_queries = {side: ProbeQueries.read(path, side, manifest) for side in SIDES}
        return cls(manifest, shards, probe_queries, unread_files)

    def with_delta(self, delta: Delta) -> "Snapshot":
        """A new snapshot of the same version with these edits; it shares all files and indexes."""
        edited = copy.copy(self)
        edited._delta = delta
        edited._indexes = {side: EditedIndex(base, delta) for side, base in self._base_indexes.items()}
        with _open_snapshots_lock:
            _open_snapshots.add(edited)
        return edited

    @staticmethod
    def count_open() -> dict[str, int]:
        """{memory name: opened versions that are still referenced}.

        More than one after the last batch of a swap is a leak. Snapshots that edits made of one
        opened version share its files and count once.
        """
        with _open_snapshots_lock:
            opened = {id(snapshot._base_indexes): snapshot.manifest.name for snapshot in _open_snapshots}
        return dict(Counter(opened.values()))

    def __len__(self) -> int:
        """The number of live pairs."""
        return self._indexes["image"].pairs

    @property
    def edits(self) -> int:
        """Number of edits on top of the version."""
        return self._delta.edits if self._delta else 0

    @property
    def edited_rows(self) -> int:
        """Number of rows that edits added or removed, which a compaction folds into a version."""
        return self._delta.pairs + self._delta.tombstones if self._delta else 0

    @property
    def ref(self) -> str:
        """name@version, or name@version+N with N edits on top."""
        return f"{self.manifest.ref}+{self.edits}" if self.edits else self.manifest.ref

    @property
    def dim(self) -> int:
        """D, the width of the values."""
        return self.manifest.dim

    @property
    def bytes(self) -> dict[str, int]:
        """{"mapped": bytes of files, "resident": bytes of flat indexes and edits in memory}."""
        delta_bytes = self._delta.resident_bytes() if self._delta else 0
        return {
            "mapped": sum(file["bytes"] for file in self.manifest.files.values()),
            "resident": self._resident_bytes + delta_bytes,
        }

    def key_kind(self, side: Side) -> KeyKind:
        """What a query on `side` must be.

        "vector" = a CLIP vector, "trunk" = the tower's features before projection.
        """
        return self.manifest.key_kind(side)

    def retrieve(
        self,
        queries: np.ndarray,
        side: Side,
        k: int,
        params: SearchParams = DEFAULT_PARAMS,
        *,
        values: Literal["other", "same"] = "other",
    ) -> Neighbors:
        """Nearest neighbours: search `side` for the k nearest pairs of each query.

        queries: (B, Dk) float32 unit rows.  values: whose vectors to return, those of the other
        side or of the same side as the search. k neighbours come back wherever k pairs pass the
        filters of `params`; where fewer do, the rest is masked.
        Raises QueryRefused where queries, k or params do not fit this memory, DamagedVersion where
        a file was cut since the opening.
        """
        hits = self.search(queries, side, k, params)
        return self._gather(hits, self._indexes[side], side if values == "same" else other(side))

    def search(self, queries: np.ndarray, side: Side, k: int, params: SearchParams = DEFAULT_PARAMS) -> Hits:
        """The search of `retrieve` without ids and vectors: rows, valid in this snapshot only."""
        self._check_sizes()
        index = self._indexes[side]
        queries = self._check_queries(queries, index, k)
        row_filter = RowFilter.from_params(params, len(queries), self.id_kind)
        default_probes = self.manifest.index["probes"]  # 0 where the recipe has no lists
        probes = (params.probes or default_probes) if default_probes else 0
        return find_nearest(index, queries, k, probes, row_filter)

    def vectors(self, rows: np.ndarray, side: Side) -> np.ndarray:
        """(R, D) float16 vectors as stored.  rows: (R,) int64 found by `search`, none absent."""
        self._check_sizes()
        return self._indexes[side].take(rows, lambda segment: segment.values[side])

    def blocks(self, rows: int = BLOCK_PAIRS) -> Iterator[Pairs]:
        """All live pairs in row order, at most `rows` at a time, as a build takes them."""
        index = self._indexes["image"]
        for start in range(0, index.rows, rows):
            numbers = np.arange(start, min(start + rows, index.rows))
            numbers = numbers[index.is_live(numbers)]
            if len(numbers):
                yield self._read_pairs(index, numbers)

    def find_rows(self, ids: np.ndarray) -> np.ndarray:
        """(n,) int64 row of the version with each id, -1 = none; edits are ignored.

        ids: (n,) int64 or bytes, as stored.
        """
        self._check_sizes()
        base = self._base_indexes["image"]
        rows = np.full(len(ids), -1, np.int64)
        for start, shard in zip(base.starts.tolist(), base.shards, strict=False):
            found = shard.find_rows(ids)
            rows[found >= 0] = start + found[found >= 0]
        return rows

    def check_recall(self) -> dict[Side, float]:
        """Recall of the stored probe queries per side.

        Raises RecallTooLow where a side is below the recall floor of the manifest.
        """
        self._check_sizes()
        floor, k, probes = self.manifest.recall["floor"], self.manifest.recall["k"], self.manifest.index["probes"]
        recalls = {side: self._probe_queries[side].recall(self._base_indexes[side], probes) for side in SIDES}
        for side, recall in recalls.items():
            if recall < floor:
                raise RecallTooLow(
                    f"{self.ref}: {side} recall@{k} is {recall:.4f}, the floor is {floor}: "
                    "rebuild it with a finer index"
                )
        return recalls

    def measure_recall(self, queries: np.ndarray, side: Side) -> float:
        """recall@10 of `queries` on the version's index, against a scan of every row.

        queries: (B, Dk) float32 unit rows. Edits are ignored, because they are searched exactly.
        The scan reads all keys: do not call it in a request.
        """
        self._check_sizes()
        index = self._base_indexes[side]
        exact = index.scan(self._check_queries(queries, index, RECALL_K), min(RECALL_K, index.pairs))  # (B, k)
        return ProbeQueries(queries, exact.scores).recall(index, self.manifest.index["probes"])

    def _check_sizes(self) -> None:
        """Raise DamagedVersion where a mapped file was cut: reading it would end the process."""
        for shard in self._base_indexes["image"].shards:
            shard.check_sizes()

    def _check_queries(self, queries: np.ndarray, index: SideIndex, k: int) -> np.ndarray:
        """The queries as contiguous float32. Raises QueryRefused where they or k do not fit."""
        if k < 1:
            raise QueryRefused(f"k is {k}: ask for at least one neighbour")
        if queries.ndim != 2 or queries.shape[1] != index.width:
            kind = self.key_kind(index.side)
            raise QueryRefused(
                f"{self.ref} compares {index.side} {kind} keys of width {index.width}, the queries are {queries.shape}"
            )
        if not np.isfinite(queries).all():
            raise QueryRefused("a query holds a value that is not finite: check the encoder's precision")
        return np.ascontiguousarray(queries, np.float32)

    def _gather(self, hits: Hits, index: SideIndex, value_side: Side) -> Neighbors:
        """The neighbours at the rows of `hits`: their ids and the vectors of one side."""
        mask = hits.mask
        rows = np.maximum(hits.rows, 0).ravel()  # (B * K,)
        ids = decode_ids(index.take(rows, lambda segment: segment.ids)).reshape(mask.shape)
        values = to_float32(index.take(rows, lambda segment: segment.values[value_side])).reshape(*mask.shape, self.dim)
        if not mask.all():
            ids[~mask] = ids.dtype.type()
            values[~mask] = 0
        return Neighbors(ids, hits.scores, values, mask, hits.rows, self._read_record)

    def _read_pairs(self, index: SideIndex, rows: np.ndarray) -> Pairs:
        """The pairs at `rows` as the user gave them.  rows: (R,) int64, all >= 0."""
        self._check_sizes()

        def values(side: Side) -> np.ndarray:
            return index.take(rows, lambda segment: segment.values[side])

        def own_keys(side: Side) -> np.ndarray | None:
            return None if self.key_kind(side) == "vector" else index.take(rows, lambda segment: segment.keys[side])

        ids = decode_ids(index.take(rows, lambda segment: segment.ids))
        records = [self._read_record(row) for row in rows.tolist()]
        return Pairs(ids, values("image"), values("text"), records, own_keys("image"), own_keys("text"))

    def _read_record(self, row: int) -> dict[str, Any]:
        segment, place = self._indexes["image"].locate(row)
        return segment.record(place)
