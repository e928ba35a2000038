"""One version of a memory, verified and open: two searches over mapped rows."""

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

BLOCK = 8_192  # pairs handed out at a time: 40 MB at D = 512

_living: "weakref.WeakSet[Snapshot]" = weakref.WeakSet()
_living_lock = threading.Lock()


class Snapshot:
    """One verified version of one memory. Never modified after it is opened: share it, drop it, never close it.

    Its files stay mapped until the last holder (a Memory, a batch, a Neighbors) lets go of it.
    """

    def __init__(
        self,
        manifest: Manifest,
        shards: Sequence[Shard],
        probes: dict[Side, ProbeQueries],
        unread: frozenset[str] = frozenset(),
    ) -> None:
        self.manifest = manifest
        self.unread_files = unread  # files taken on the word of an earlier reading: read them again at leisure
        self._fans = {side: ShardedIndex(shards, side) for side in SIDES}
        self._searched: Mapping[Side, SideIndex] = self._fans
        self._tail: Delta | None = None
        self._probes = probes
        self._resident = sum(shard.resident_bytes() for shard in shards)
        self.id_kind = shards[0].ids.dtype.kind  # "i" or "S"
        with _living_lock:
            _living.add(self)

    @classmethod
    def open(cls, path: Path, *, encoder: str, devices: Sequence[int] = ()) -> "Snapshot":
        """The version in the directory `path` (…/name/version), checked; or a StoreError.

        encoder: fingerprint of the encoder whose queries it will answer; only the digest must agree.
        devices: GPUs to clone the shards' indexes to, in turn; none keeps them mapped.
        Large files untouched since they were last read whole are not read again: `verify` does that at leisure, after the start.
        """
        manifest = read_manifest(path)
        if not same_encoder(manifest.encoder, encoder):
            raise IncompatibleSnapshot(
                f"{manifest.ref} was built by {manifest.encoder}, this service encodes with {encoder}: rebuild it, or serve its encoder"
            )
        unread = verify(path, manifest, trust=True)
        owners = cycle([DeviceThread.of(device) for device in devices] or [None])
        shards = [
            Shard(path, shard["folder"], shard["pairs"], manifest, owner=next(owners)) for shard in manifest.shards
        ]
        return cls(manifest, shards, {side: ProbeQueries.read(path, side, manifest) for side in SIDES}, unread)

    def with_delta(self, tail: Delta) -> "Snapshot":
        """The same version with these edits on top: a snapshot of its own that shares every file and index with this one."""
        edited = copy.copy(self)
        edited._tail = tail
        edited._searched = {side: EditedIndex(fan, tail) for side, fan in self._fans.items()}
        with _living_lock:
            _living.add(edited)
        return edited

    @staticmethod
    def count_open() -> dict[str, int]:
        """How many openings of each memory are still held by anyone: more than one after a swap's last batch is a leak.

        Snapshots that edits made of one opening share its files, and count once.
        """
        with _living_lock:
            opened = {id(snapshot._fans): snapshot.manifest.name for snapshot in _living}
        return dict(Counter(opened.values()))

    def __len__(self) -> int:
        return self._searched["image"].pairs

    @property
    def edits(self) -> int:
        """How many changes stand on top of the version."""
        return self._tail.edits if self._tail else 0

    @property
    def edited_rows(self) -> int:
        """How many rows edits have added or removed: what a compaction folds away."""
        return self._tail.pairs + self._tail.dead if self._tail else 0

    @property
    def ref(self) -> str:
        """name@version, and +N where N edits stand on top of it."""
        return f"{self.manifest.ref}+{self.edits}" if self.edits else self.manifest.ref

    @property
    def dim(self) -> int:
        """D, the width of the values."""
        return self.manifest.dim

    @property
    def bytes(self) -> dict[str, int]:
        """{"mapped": bytes of files that the system pages in and out, "resident": bytes held by flat indexes and edits}."""
        tail = self._tail.resident_bytes() if self._tail else 0
        return {
            "mapped": sum(file["bytes"] for file in self.manifest.files.values()),
            "resident": self._resident + tail,
        }

    def key_kind(self, side: Side) -> KeyKind:
        """What a query on `side` must be: the CLIP vector, or the tower's features before projection."""
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
        Raises QueryRefused where queries, k or params do not fit this memory.
        """
        hits = self.search(queries, side, k, params)
        return self._gathered(hits, self._searched[side], side if values == "same" else other(side))

    def search(self, queries: np.ndarray, side: Side, k: int, params: SearchParams = DEFAULT_PARAMS) -> Hits:
        """The first half of `retrieve`, for who gathers later: the rows, which mean something to this very snapshot alone."""
        fan = self._searched[side]
        queries = self._checked(queries, fan, k)
        lists = self.manifest.index["probes"]
        row_filter = RowFilter.of(params, len(queries), self.id_kind)
        return find_nearest(fan, queries, k, (params.probes or lists) if lists else 0, row_filter)

    def vectors(self, rows: np.ndarray, side: Side) -> np.ndarray:
        """(R, D) float16 as stored.  rows: (R,) int64 that a search of this snapshot found, none absent."""
        return self._searched[side].take(rows, lambda part: part.values[side])

    def check_recall(self) -> dict[Side, float]:
        """Answer the stored probe queries; recall per side, or RecallTooLow where one is below the manifest's floor."""
        floor, depth = self.manifest.recall["floor"], self.manifest.recall["k"]
        proven = {side: self._probes[side].recall(self._fans[side], self.manifest.index["probes"]) for side in SIDES}
        for side, recall in proven.items():
            if recall < floor:
                raise RecallTooLow(
                    f"{self.ref}: {side} recall@{depth} is {recall:.4f}, the floor is {floor}: rebuild it with a finer index"
                )
        return proven

    def find_rows(self, ids: np.ndarray) -> np.ndarray:
        """(n,) int64 rows of the version itself that have these ids, -1 = none; edits are not looked at.  ids: (n,) as stored."""
        fan = self._fans["image"]
        rows = np.full(len(ids), -1, np.int64)
        for start, shard in zip(fan.starts.tolist(), fan.shards, strict=False):
            found = shard.find(ids)
            rows[found >= 0] = start + found[found >= 0]
        return rows

    def blocks(self, rows: int = BLOCK) -> Iterator[Pairs]:
        """Every pair that is there, at most `rows` at a time, as a builder takes them."""
        fan = self._searched["image"]
        for start in range(0, fan.rows, rows):
            numbers = np.arange(start, min(start + rows, fan.rows))
            numbers = numbers[fan.alive(numbers)]
            if len(numbers):
                yield self._pairs(fan, numbers)

    def _pairs(self, fan: SideIndex, rows: np.ndarray) -> Pairs:
        """Some rows as they were given.  rows: (R,) int64, all present."""

        def values(side: Side) -> np.ndarray:
            return fan.take(rows, lambda part: part.values[side])

        def own_keys(side: Side) -> np.ndarray | None:
            return None if self.key_kind(side) == "vector" else fan.take(rows, lambda part: part.keys[side])

        ids, records = decode_ids(fan.take(rows, lambda part: part.ids)), [self._record(row) for row in rows.tolist()]
        return Pairs(ids, values("image"), values("text"), records, own_keys("image"), own_keys("text"))

    def measure_recall(self, queries: np.ndarray, side: Side) -> float:
        """Share of the exact 10 best of `queries` that the index finds: reads every row, so ask it away from requests.

        queries: (B, Dk) float32 unit rows.  Edits do not count: they are searched exactly.
        """
        fan = self._fans[side]
        exact = fan.scan(self._checked(queries, fan, RECALL_K), min(RECALL_K, fan.pairs)).scores  # (B, k)
        return ProbeQueries(queries, exact).recall(fan, self.manifest.index["probes"])

    def _checked(self, queries: np.ndarray, fan: SideIndex, k: int) -> np.ndarray:
        if k < 1:
            raise QueryRefused(f"k is {k}: ask for at least one neighbour")
        if queries.ndim != 2 or queries.shape[1] != fan.width:
            kind = self.key_kind(fan.side)
            raise QueryRefused(
                f"{self.ref} compares {fan.side} {kind} keys of width {fan.width}, the queries are {queries.shape}"
            )
        if not np.isfinite(queries).all():
            raise QueryRefused("a query holds a value that is not finite: check the encoder's precision")
        return np.ascontiguousarray(queries, np.float32)

    def _gathered(self, hits: Hits, fan: SideIndex, valued: Side) -> Neighbors:
        """Bring ids and the `valued` side's vectors of the rows found; zeros where none was."""
        mask = hits.mask
        rows = np.maximum(hits.rows, 0).ravel()  # (B * K,)
        ids = decode_ids(fan.take(rows, lambda part: part.ids)).reshape(mask.shape)
        values = to_float32(fan.take(rows, lambda part: part.values[valued])).reshape(*mask.shape, self.dim)
        if not mask.all():
            ids[~mask] = ids.dtype.type()
            values[~mask] = 0
        return Neighbors(ids, hits.scores, values, mask, hits.rows, self._record)

    def _record(self, row: int) -> dict[str, Any]:
        part, place = self._searched["image"].place(row)
        return part.record(place)
