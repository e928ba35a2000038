"""Edits applied in memory: each makes a new snapshot and leaves earlier ones unchanged."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from index_store.edits.changes import Change, Put, decode_change
from index_store.edits.journal import HEADER, log, read_records, short_path
from index_store.errors import DamagedVersion
from index_store.search.delta import Delta
from index_store.search.projection_bounds import BoundProjection
from index_store.snapshot import Snapshot
from index_store.storage.manifest import Manifest
from index_store.types import SIDES, Id, Side

INITIAL_CAPACITY = 1_024  # rows allocated by the first edit; the capacity doubles when it is used up
MIN_BOUNDED_ROWS = 1_024  # a smaller delta is compared in full as quickly as with score bounds


class Overlay:
    """A base version and the edits applied to it: one writer at a time, any thread may read.

    base: the snapshot without edits.  snapshot: the newest one.
    State: the growing columns of added rows, the edit that removed each row, the row of each added
    id, and the newest delta.
    """

    def __init__(self, base: Snapshot) -> None:
        self.base = self.snapshot = base
        self._columns = _create_columns(base.manifest, base.id_kind)
        self._lines: list[bytes] = []
        self._row_of_id: dict[Id | bytes, int] = {}  # live added rows only
        self._bounds: dict[Side, tuple[BoundProjection, _Column]] = {}
        base_removed_by = np.zeros(base.manifest.pairs, np.uint32)  # the system allocates only pages that are written
        views = {name: column.rows[:0] for name, column in self._columns.items()}
        self._delta = Delta(
            edits=0,
            tombstones=0,
            base=base.manifest.pairs,
            lines=self._lines,
            base_removed_by=base_removed_by,
            bounds={},
            **_column_fields(views),
        )

    def apply(self, change: Change) -> Snapshot:
        """Apply one edit; returns the new snapshot. The cost depends on this edit alone."""
        edits = self._delta.edits + 1
        tombstones = self._delta.tombstones + self._remove(change.ids, edits)
        delta = self._append(change) if isinstance(change, Put) else self._delta
        self._delta = dataclasses.replace(delta, edits=edits, tombstones=tombstones)
        self.snapshot = self.base.with_delta(self._delta)
        return self.snapshot

    def contains(self, ids: np.ndarray) -> np.ndarray:
        """(n,) bool, True where a live pair has this id.  ids: (n,) int64 or bytes, as stored."""
        added = np.array([name in self._row_of_id for name in ids.tolist()], bool)
        contained: np.ndarray = added | (self._find_live_base_rows(ids) >= 0)
        return contained

    def _append(self, put: Put) -> Delta:
        """The delta with the rows of `put` behind its own."""
        start = self._delta.pairs
        rows = {"ids": put.ids, "removed_by": np.zeros(len(put.ids), np.uint32)}
        for side in SIDES:
            rows[side] = put.values[side]
            rows[f"{side}_float32"] = put.own_keys.get(side, put.values[side]).astype(np.float32)
            if side in put.own_keys:
                rows[f"{side}_key"] = put.own_keys[side]
        views = {name: column.append(rows[name]) for name, column in self._columns.items()}
        self._lines.extend(put.lines)
        self._row_of_id.update(zip(put.ids.tolist(), range(start, start + len(put.ids)), strict=True))
        return dataclasses.replace(self._delta, **_column_fields(views), bounds=self._extend_bounds(views))

    def _extend_bounds(self, views: dict[str, np.ndarray]) -> dict[Side, tuple[BoundProjection, np.ndarray]]:
        """Score bounds of all added rows; none while there are too few rows."""
        if len(views["ids"]) < MIN_BOUNDED_ROWS:
            return {}
        bounds: dict[Side, tuple[BoundProjection, np.ndarray]] = {}
        for side in SIDES:
            keys = views[f"{side}_float32"]
            if side not in self._bounds:
                projection = BoundProjection(keys)
                self._bounds[side] = projection, _Column((projection.width,), np.float32)
            projection, column = self._bounds[side]
            bounds[side] = projection, column.append(projection.project(keys[column.filled :]))
        return bounds

    def _remove(self, ids: np.ndarray, edit: int) -> int:
        """Put a tombstone, the edit's number, on the live pairs of these ids; returns how many.

        Earlier deltas share the columns and ignore tombstones with a number above their own.
        """
        rows = self._find_live_base_rows(ids)
        rows = rows[rows >= 0]
        added = [self._row_of_id.pop(name) for name in ids.tolist() if name in self._row_of_id]
        self._delta.base_removed_by[rows] = edit
        self._columns["removed_by"].rows[added] = edit
        return len(rows) + len(added)

    def _find_live_base_rows(self, ids: np.ndarray) -> np.ndarray:
        """(n,) int64 live row of the base with each id, -1 = none."""
        rows = self.base.find_rows(ids)
        removed_by = self._delta.base_removed_by[np.maximum(rows, 0)]
        live: np.ndarray = np.where((rows >= 0) & (removed_by == 0), rows, -1)
        return live


def replay_journal(base: Snapshot, journal: Path) -> tuple[Overlay, int]:
    """Apply every acknowledged edit of a journal; returns the overlay and the last record's end.

    Takes no lock and changes no file. The end is in bytes from the start of the journal.
    """
    overlay, size = Overlay(base), HEADER.size
    for end, payload in read_records(journal, base.manifest.sha256):
        overlay.apply(decode_record(payload, base, overlay.snapshot.edits + 1))
        size = end
    if journal.exists() and (torn := journal.stat().st_size - size) > 0:
        log.warning(
            "%s: the last %d bytes are no whole record, so never acknowledged: ignored, %d edits stand",
            short_path(journal),
            torn,
            overlay.snapshot.edits,
        )
    return overlay, size


def decode_record(payload: bytes, base: Snapshot, number: int) -> Change:
    """The edit in a journal's record. Raises DamagedVersion where it does not fit its base.

    number: of the edit, counted from 1, for the message.
    """
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
    """A growing array in memory. Appended rows never change, so views of them stay valid."""

    def __init__(self, width: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.rows = np.zeros((INITIAL_CAPACITY, *width), dtype)
        self.filled = 0

    def append(self, rows: np.ndarray) -> np.ndarray:
        """Append rows; returns a view of all rows so far."""
        needed = self.filled + len(rows)
        dtype = np.promote_types(self.rows.dtype, rows.dtype)  # a longer id widens the column
        if needed > len(self.rows) or dtype != self.rows.dtype:
            larger = np.zeros((max(len(self.rows), 2 * self.filled, needed), *self.rows.shape[1:]), dtype)
            larger[: self.filled] = self.rows[: self.filled]
            self.rows = larger  # views of the old array stay valid
        self.rows[self.filled : needed] = rows
        self.filled = needed
        return self.rows[:needed]


def _create_columns(manifest: Manifest, id_kind: str) -> dict[str, _Column]:
    """The empty columns of a delta; a side that compares its vectors has no key column."""
    columns = {"ids": _Column((), np.int64 if id_kind == "i" else "S1"), "removed_by": _Column((), np.uint32)}
    for side in SIDES:
        width = manifest.key_dim(side)
        columns[side] = _Column((manifest.dim,), np.float16)
        columns[f"{side}_float32"] = _Column((width,), np.float32)
        if manifest.key_kind(side) != "vector":
            columns[f"{side}_key"] = _Column((width,), np.float16)
    return columns


def _column_fields(views: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fields of a Delta that change when rows are appended."""
    return {
        "pairs": len(views["ids"]),
        "ids": views["ids"],
        "removed_by": views["removed_by"],
        "values": {side: views[side] for side in SIDES},
        "keys": {side: views.get(f"{side}_key", views[side]) for side in SIDES},
        "keys_float32": {side: views[f"{side}_float32"] for side in SIDES},
    }
