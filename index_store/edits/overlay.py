"""Edits applied in memory: each makes the next snapshot of a base and leaves those before it as they are."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from index_store.edits.changes import Change, Put, decode_change
from index_store.edits.journal import HEAD, log, read_records, short_path
from index_store.errors import DamagedVersion
from index_store.search.bounds import BoundProjection
from index_store.search.delta import Delta
from index_store.snapshot import Snapshot
from index_store.storage.manifest import Manifest
from index_store.types import SIDES, Id, Side

INITIAL_CAPACITY = 1_024  # room that the first edit makes; then it doubles
MIN_BOUNDED_ROWS = 1_024  # fewer are as fast compared whole


class Overlay:
    """A base and what was done to it since. One writer at a time; the snapshots it has made go on being read.

    Its state: the columns, which only grow; when each row died; which row of the tail an id has; the newest tail and snapshot.
    """

    def __init__(self, base: Snapshot) -> None:
        self.base = self.snapshot = base
        self._columns = _columns(base.manifest, base.id_kind)
        self._lines: list[bytes] = []
        self._where: dict[Id | bytes, int] = {}
        self._sketches: dict[Side, tuple[BoundProjection, _Column]] = {}
        base_died = np.zeros(base.manifest.pairs, np.uint32)  # pages that no edit touches are never given memory
        views = {name: column.rows[:0] for name, column in self._columns.items()}
        self._tail = Delta(
            edits=0,
            dead=0,
            base=base.manifest.pairs,
            lines=self._lines,
            base_died=base_died,
            sketches={},
            **_fields(views),
        )

    def apply(self, change: Change) -> Snapshot:
        """The next snapshot. It costs what the change holds, however many edits stand already."""
        edits = self._tail.edits + 1
        dead = self._tail.dead + self._bury(change.ids, edits)
        tail = self._grown(change) if isinstance(change, Put) else self._tail
        self._tail = dataclasses.replace(tail, edits=edits, dead=dead)
        self.snapshot = self.base.with_delta(self._tail)
        return self.snapshot

    def known(self, ids: np.ndarray) -> np.ndarray:
        """(n,) bool, True where a pair of this id is there.  ids: (n,) as stored."""
        added = np.array([name in self._where for name in ids.tolist()], bool)
        known: np.ndarray = added | (self._living_base_rows(ids) >= 0)
        return known

    def _grown(self, put: Put) -> Delta:
        """The tail with these rows behind its own."""
        start = self._tail.pairs
        rows = {"ids": put.ids, "died": np.zeros(len(put.ids), np.uint32)}
        for side in SIDES:
            rows[side] = put.values[side]
            rows[f"{side}_wide"] = put.own_keys.get(side, put.values[side]).astype(np.float32)
            if side in put.own_keys:
                rows[f"{side}_key"] = put.own_keys[side]
        views = {name: column.append(rows[name]) for name, column in self._columns.items()}
        self._lines.extend(put.lines)
        self._where.update(zip(put.ids.tolist(), range(start, start + len(put.ids)), strict=True))
        return dataclasses.replace(self._tail, **_fields(views), sketches=self._sketched(views))

    def _sketched(self, views: dict[str, np.ndarray]) -> dict[Side, tuple[BoundProjection, np.ndarray]]:
        """What bounds the scores of the tail's rows, from the first rows that are worth it on."""
        if len(views["ids"]) < MIN_BOUNDED_ROWS:
            return {}
        found: dict[Side, tuple[BoundProjection, np.ndarray]] = {}
        for side in SIDES:
            keys = views[f"{side}_wide"]
            if side not in self._sketches:
                sketch = BoundProjection(keys)
                self._sketches[side] = sketch, _Column((sketch.width,), np.float32)
            sketch, column = self._sketches[side]
            found[side] = sketch, column.append(sketch.of(keys[column.filled :]))
        return found

    def _bury(self, ids: np.ndarray, edits: int) -> int:
        """Note that the pairs of these ids end with change number `edits`; how many they were. Older tails look for smaller numbers."""
        rows = self._living_base_rows(ids)
        rows = rows[rows >= 0]
        mine = [self._where.pop(name) for name in ids.tolist() if name in self._where]
        self._tail.base_died[rows] = edits
        self._columns["died"].rows[mine] = edits
        return len(rows) + len(mine)

    def _living_base_rows(self, ids: np.ndarray) -> np.ndarray:
        """(n,) int64 row of the base, -1 where it has none or not any longer."""
        rows = self.base.find_rows(ids)
        living: np.ndarray = np.where((rows >= 0) & (self._tail.base_died[np.maximum(rows, 0)] == 0), rows, -1)
        return living


def replay_journal(base: Snapshot, journal: Path) -> tuple[Overlay, int]:
    """The base with every acknowledged edit, and where in the journal the last of them ends. Takes no lock and changes nothing."""
    overlay, size = Overlay(base), HEAD.size
    for end, payload in read_records(journal, base.manifest.sha256):
        overlay.apply(decode_record(payload, base, overlay.snapshot.edits + 1))
        size = end
    if journal.exists() and (torn := journal.stat().st_size - size) > 0:
        edits = overlay.snapshot.edits
        log.warning(
            "%s: the last %d bytes are no whole record, so never acknowledged: ignored, %d edits stand",
            short_path(journal),
            torn,
            edits,
        )
    return overlay, size


def decode_record(payload: bytes, base: Snapshot, number: int) -> Change:
    """One change of a journal, or DamagedVersion where it does not fit its base."""
    try:
        change = decode_change(payload)
        if change.ids.dtype.kind != base.id_kind:
            raise ValueError(f"ids of type {change.ids.dtype}")
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedVersion(
            f"edit {number} of {base.manifest.ref} cannot be read ({error}): restore its journal from a copy"
        ) from error
    return change


class _Column:
    """Rows in memory that only grow: what a view of the first n rows shows stays as it is."""

    def __init__(self, width: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.rows = np.zeros((INITIAL_CAPACITY, *width), dtype)
        self.filled = 0

    def append(self, rows: np.ndarray) -> np.ndarray:
        """Add rows behind those there are; a view of all."""
        needed = self.filled + len(rows)
        dtype = np.promote_types(self.rows.dtype, rows.dtype)  # a longer id widens the column
        if needed > len(self.rows) or dtype != self.rows.dtype:
            bigger = np.zeros((max(len(self.rows), 2 * self.filled, needed), *self.rows.shape[1:]), dtype)
            bigger[: self.filled] = self.rows[: self.filled]
            self.rows = bigger  # whoever reads the old one keeps it
        self.rows[self.filled : needed] = rows
        self.filled = needed
        return self.rows[:needed]


def _columns(manifest: Manifest, id_kind: str) -> dict[str, _Column]:
    """What a tail holds per row; a side that compares its vectors has no keys of its own."""
    columns = {"ids": _Column((), np.int64 if id_kind == "i" else "S1"), "died": _Column((), np.uint32)}
    for side in SIDES:
        width = manifest.key_dim(side)
        columns[side] = _Column((manifest.dim,), np.float16)
        columns[f"{side}_wide"] = _Column((width,), np.float32)
        if manifest.key_kind(side) != "vector":
            columns[f"{side}_key"] = _Column((width,), np.float16)
    return columns


def _fields(views: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fields of a tail that change when it grows."""
    return {
        "pairs": len(views["ids"]),
        "ids": views["ids"],
        "died": views["died"],
        "values": {side: views[side] for side in SIDES},
        "keys": {side: views.get(f"{side}_key", views[side]) for side in SIDES},
        "wide_keys": {side: views[f"{side}_wide"] for side in SIDES},
    }
