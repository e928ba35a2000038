"""One version of a memory, verified and open: two searches over mapped rows."""

import threading
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from index_store.durable import digest
from index_store.errors import DamagedVersion, IncompatibleSnapshot, QueryRefused, RecallTooLow
from index_store.manifest import Manifest, read_manifest, same_encoder
from index_store.neighbors import Neighbors
from index_store.pairs import SIDES, Id, KeyKind, Pairs, Side, other
from index_store.probes import Probes
from index_store.search import Fan, Hits, limits_of, nearest
from index_store.shard import Shard

BLOCK = 8_192  # pairs handed out at a time: 40 MB at D = 512
VERIFY_THREADS = 4  # sha256 releases the interpreter lock; more threads than this wait for the disk

_living: "weakref.WeakSet[Snapshot]" = weakref.WeakSet()
_living_lock = threading.Lock()


class Snapshot:
    """One verified version of one memory. Never modified after it is opened: share it, drop it, never close it.

    Its files stay mapped until the last holder (a Memory, a batch, a Neighbors) lets go of it.
    """

    def __init__(self, manifest: Manifest, shards: Sequence[Shard], probes: dict[Side, Probes]) -> None:
        self.manifest = manifest
        self._fans = {side: Fan(shards, side) for side in SIDES}
        self._probes = probes
        self._resident = sum(shard.resident_bytes() for shard in shards)
        self._id_kind = shards[0].ids.dtype.kind
        with _living_lock:
            _living.add(self)

    @classmethod
    def open(cls, path: Path, *, encoder: str) -> "Snapshot":
        """The version in the directory `path` (…/name/version), every byte of it checked; or a StoreError.

        encoder: fingerprint of the encoder whose queries it will answer; only the digest must agree.
        """
        manifest = read_manifest(path)
        if not same_encoder(manifest.encoder, encoder):
            raise IncompatibleSnapshot(
                f"{manifest.ref} was built by {manifest.encoder}, this service encodes with {encoder}: rebuild it, or serve its encoder"
            )
        verify(path, manifest)
        shards = [Shard(path, shard["folder"], shard["pairs"], manifest) for shard in manifest.shards]
        return cls(manifest, shards, {side: Probes.read(path, side, manifest) for side in SIDES})

    @staticmethod
    def alive() -> dict[str, int]:
        """How many snapshots of each memory are still held by anyone: more than one after a swap's last batch is a leak."""
        with _living_lock:
            return dict(Counter(snapshot.manifest.name for snapshot in _living))

    def __len__(self) -> int:
        return self.manifest.pairs

    @property
    def ref(self) -> str:
        """name@version."""
        return self.manifest.ref

    @property
    def dim(self) -> int:
        """D, the width of the values."""
        return self.manifest.dim

    @property
    def bytes(self) -> dict[str, int]:
        """{"mapped": bytes of files that the system pages in and out, "resident": bytes held by flat indexes}."""
        return {"mapped": sum(file["bytes"] for file in self.manifest.files.values()), "resident": self._resident}

    def key_kind(self, side: Side) -> KeyKind:
        """What a query on `side` must be: the CLIP vector, or the tower's features before projection."""
        return self.manifest.key_kind(side)

    def retrieve(
        self,
        queries: np.ndarray,
        side: Side,
        k: int,
        *,
        probes: int | None = None,
        max_similarity: float | np.ndarray | None = None,
        exclude: Sequence[Collection[Id]] | None = None,
        min_score: float | None = None,
        values: Literal["other", "same"] = "other",
    ) -> Neighbors:
        """Search `side` for the k nearest pairs of each query and bring the other side's vectors, or those of the `same` side.

        queries: (B, Dk) float32 unit rows.  max_similarity: one, or (B,) with inf for no limit: nearer ones are passed over.
        exclude: ids to pass over, one collection per query.  min_score: farther ones are masked.
        k neighbours still come back where k remain, and no others. probes: index lists to visit, the manifest's where None.
        """
        fan = self._fans[side]
        queries = self._checked(queries, fan, k)
        limits = limits_of(len(queries), self._id_kind, max_similarity=max_similarity, exclude=exclude, min_score=min_score)
        lists = self.manifest.index["probes"]
        hits = nearest(fan, queries, k, (probes or lists) if lists else 0, limits)
        return self._gathered(hits, fan, side if values == "same" else other(side))

    def prove(self) -> dict[Side, float]:
        """Answer the stored probe queries; recall per side, or RecallTooLow where one is below the manifest's floor."""
        floor, depth = self.manifest.recall["floor"], self.manifest.recall["k"]
        proven = {side: self._probes[side].recall(self._fans[side], self.manifest.index["probes"]) for side in SIDES}
        for side, recall in proven.items():
            if recall < floor:
                raise RecallTooLow(
                    f"{self.ref}: {side} recall@{depth} is {recall:.4f}, the floor is {floor}: rebuild it with a finer index"
                )
        return proven

    def blocks(self, rows: int = BLOCK) -> Iterator[Pairs]:
        """Every pair that is there, at most `rows` at a time, as a builder takes them."""
        fan = self._fans["image"]
        own = [side for side in SIDES if self.key_kind(side) != "vector"]
        for start in range(0, fan.pairs, rows):
            numbers = np.arange(start, min(start + rows, fan.pairs))
            keys = {f"{side}_key": fan.take(numbers, lambda shard, side=side: shard.keys[side]) for side in own}  # type: ignore[misc]
            values = {side: fan.take(numbers, lambda shard, side=side: shard.values[side]) for side in SIDES}  # type: ignore[misc]
            ids = _readable(fan.take(numbers, lambda shard: shard.ids))
            yield Pairs(ids=ids, **values, **keys, records=[self._record(row) for row in numbers.tolist()])

    def _checked(self, queries: np.ndarray, fan: Fan, k: int) -> np.ndarray:
        if k < 1:
            raise QueryRefused(f"k is {k}: ask for at least one neighbour")
        if queries.ndim != 2 or queries.shape[1] != fan.width:
            kind = self.key_kind(fan.side)
            raise QueryRefused(f"{self.ref} compares {fan.side} {kind} keys of width {fan.width}, the queries are {queries.shape}")
        if not np.isfinite(queries).all():
            raise QueryRefused("a query holds a value that is not finite: check the encoder's precision")
        return np.ascontiguousarray(queries, np.float32)

    def _gathered(self, hits: Hits, fan: Fan, valued: Side) -> Neighbors:
        """Bring ids and the `valued` side's vectors of the rows found; zeros where none was."""
        mask = hits.mask
        rows = np.maximum(hits.rows, 0).ravel()  # (B * K,)
        ids = _readable(fan.take(rows, lambda shard: shard.ids)).reshape(mask.shape)
        values = fan.take(rows, lambda shard: shard.values[valued]).astype(np.float32).reshape(*mask.shape, self.dim)
        if not mask.all():
            ids[~mask] = ids.dtype.type()
            values[~mask] = 0
        return Neighbors(ids, hits.scores, values, mask, hits.rows, self._record)

    def _record(self, row: int) -> dict[str, Any]:
        shard, place = self._fans["image"].place(row)
        return shard.record(place)


def verify(path: Path, manifest: Manifest) -> None:
    """Compare size and sha256 of every file of a version with its manifest; DamagedVersion names the first that differs."""
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        checks = [pool.submit(_verify_file, path, name, file, manifest.ref) for name, file in manifest.files.items()]
        for check in checks:
            check.result()


def _verify_file(path: Path, name: str, expected: dict[str, Any], ref: str) -> None:
    try:
        found = digest(path / name)
    except OSError as error:
        raise DamagedVersion(f"{ref}: {name} cannot be read ({error.strerror}): restore or rebuild the version") from error
    if found["bytes"] != expected["bytes"]:
        raise DamagedVersion(
            f"{ref}: {name} has {found['bytes']} bytes, the manifest says {expected['bytes']}: restore or rebuild the version"
        )
    if found != expected:
        raise DamagedVersion(f"{ref}: {name} does not have the sha256 of its manifest: restore or rebuild the version")


def _readable(ids: np.ndarray) -> np.ndarray:
    """(R,) ids as the user gave them: int64, or str from UTF-8 bytes."""
    if ids.dtype.kind != "S":
        return ids
    try:
        return ids.astype(np.str_)  # ASCII, in one go
    except UnicodeDecodeError:
        return np.char.decode(ids, "utf-8")
