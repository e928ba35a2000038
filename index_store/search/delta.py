"""Delta of online edits: rows added in memory, tombstones, and search over version plus delta."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from index_store.search.hits import ABSENT_SCORE, Hits, Segment, top_k
from index_store.search.projection_bounds import BoundProjection, inner_products
from index_store.search.sharded import ShardedIndex, scan_blocks, split_keys, take_rows
from index_store.types import SIDES, Side

MAX_CANDIDATE_SHARE = 0.1  # of all rows; with more candidates one matrix product over all rows is faster


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Delta:
    """The rows and tombstones that edits put on top of a base version.

    A Delta never changes. Later deltas share its columns and see more rows of them.

    edits: number of edits so far.  pairs: n, rows added.  base: rows of the base version.
    tombstones: how many of these n + base rows are replaced or deleted.
    ids: (n,) int64 or UTF-8 bytes.  values, keys: per side (n, D) and (n, Dk) float16.
    keys_float32: the keys again, as float32.  lines: n records as JSON.
    bounds: per side the projection that bounds scores and the (n, m + 1) projected keys; empty
    while there are few rows.
    removed_by, base_removed_by: (n,) and (base,) uint32, the number of the edit that removed a row,
    0 = none. Numbers above `edits` belong to later deltas and do not count here.
    """

    edits: int
    pairs: int
    base: int
    tombstones: int
    ids: np.ndarray
    values: dict[Side, np.ndarray]
    keys: dict[Side, np.ndarray]
    keys_float32: dict[Side, np.ndarray]
    bounds: dict[Side, tuple[BoundProjection, np.ndarray]]
    lines: Sequence[bytes]
    removed_by: np.ndarray
    base_removed_by: np.ndarray

    def record(self, row: int) -> dict[str, Any]:
        """The caption and metadata of one added row."""
        record: dict[str, Any] = json.loads(self.lines[row])
        return record

    def is_live(self, rows: np.ndarray) -> np.ndarray:
        """Bool of the same shape, True where a row has no tombstone.

        rows: int64 row numbers of the memory; the added rows follow those of the base.
        """
        removed_by = np.where(rows < self.base, self.base_removed_by[np.minimum(rows, self.base - 1)], 0)
        if self.pairs:
            removed_by = np.where(rows < self.base, removed_by, self.removed_by[np.maximum(rows - self.base, 0)])
        live: np.ndarray = (removed_by == 0) | (removed_by > self.edits)
        return live

    def resident_bytes(self) -> int:
        """Bytes of the columns in memory; vectors that are also the keys are counted once."""
        projected = [rows for _, rows in self.bounds.values()]
        own_keys = [self.keys[side] for side in SIDES if self.keys[side] is not self.values[side]]
        columns = [self.ids, *self.values.values(), *own_keys, *self.keys_float32.values(), *projected]
        return sum(column.nbytes for column in columns)

    def search(self, queries: np.ndarray, side: Side, k: int, least: np.ndarray) -> Hits:
        """The exact k best added rows that score at least `least`, rows with a tombstone included.

        queries: (B, Dk) float32.  least: (B,) float32.
        The hits are (B, ≤ k), -1 where a query has fewer, numbered behind the base's rows.
        """
        keys = self.keys_float32[side]
        if self.bounds:
            projection, projected = self.bounds[side]
            row, query = _at_least(inner_products(projected, projection.project(queries)), least)
            if len(row) <= MAX_CANDIDATE_SHARE * len(queries) * self.pairs:
                scores = np.einsum("cd,cd->c", keys[row], queries[query])
                return self._best_candidates(query, row, scores, len(queries), k)
        scores = inner_products(keys, queries)  # (n, B)
        row, query = _at_least(scores, least)
        return self._best_candidates(query, row, scores[row, query], len(queries), k)

    def _best_candidates(self, query: np.ndarray, row: np.ndarray, score: np.ndarray, queries: int, k: int) -> Hits:
        """The k best candidates of each query.  query, row, score: (c,), sorted by row."""
        order = np.argsort(query, kind="stable")
        query, row, score = query[order], row[order], score[order]
        counts = np.bincount(query, minlength=queries)  # (B,)
        column = np.arange(len(query)) - (np.cumsum(counts) - counts)[query]  # (c,) place within its query
        rows = np.full((queries, counts.max(initial=0)), -1, np.int64)
        scores = np.full(rows.shape, ABSENT_SCORE, np.float32)
        rows[query, column], scores[query, column] = row + self.base, score
        return top_k(rows, scores, k) if rows.shape[1] > k else Hits(rows, scores)


def _at_least(scores: np.ndarray, least: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(c,) rows and (c,) queries of the scores that reach their query's least.

    scores: (n, B).  least: (B,).
    """
    flat = np.flatnonzero(scores >= least)  # np.nonzero takes ten times as long in two dimensions
    row, query = np.divmod(flat, len(least))
    return row, query


class EditedIndex:
    """One side of a version with its delta: the base's rows first, then the added rows."""

    def __init__(self, base: ShardedIndex, delta: Delta) -> None:
        self._base, self._delta = base, delta
        self.side, self.width = base.side, base.width
        self.rows = base.rows + delta.pairs
        self.pairs = self.rows - delta.tombstones
        self._segments: list[Segment] = [*base.shards, delta]
        self._starts = np.append(base.starts, self.rows)

    def search(self, queries: np.ndarray, k: int, probes: int) -> Hits:
        """The base's hits merged with the exact best added rows, rows with a tombstone included."""
        found = self._base.search(queries, min(k, self._base.rows), probes)
        if not self._delta.pairs:
            return found
        least = np.full(len(queries), ABSENT_SCORE)  # (B,) an added row below it cannot be among the k best
        if k <= self._base.rows:
            least = np.where(found.mask[:, -1], found.scores[:, -1], least)
        added = self._delta.search(queries, self.side, min(k, self._delta.pairs), least)
        if not added.rows.size:
            return found
        return top_k(np.hstack([found.rows, added.rows]), np.hstack([found.scores, added.scores]), k)

    def scan(self, queries: np.ndarray, k: int, ceiling: np.ndarray | None = None) -> Hits:
        """The exact k best live rows with scores at or below `ceiling`, (B, 1) or None."""
        return scan_blocks(self._key_blocks(), queries, k, ceiling, self._delta.is_live)

    def is_live(self, rows: np.ndarray) -> np.ndarray:
        """Bool of the same shape, True where a row has no tombstone.  rows: int64, all >= 0."""
        return self._delta.is_live(rows)

    def take(self, rows: np.ndarray, column: Callable[[Segment], np.ndarray]) -> np.ndarray:
        """(R, …) a column at `rows`, from whichever segments hold them.  rows: (R,) int64, >= 0."""
        if rows.max(initial=-1) < self._base.rows:
            return self._base.take(rows, column)
        return take_rows(self._segments, self._starts, rows, column)

    def locate(self, row: int) -> tuple[Segment, int]:
        """The segment that holds a row, and the row's number within the segment."""
        return (self._delta, row - self._base.rows) if row >= self._base.rows else self._base.locate(row)

    def _key_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        yield from self._base.key_blocks()
        yield from split_keys(self._delta.keys[self.side], self._base.rows)
