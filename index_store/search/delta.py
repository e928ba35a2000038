"""The rows that edits added, in memory, and one search over a version with its edits on top."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from index_store.search.bounds import BoundProjection, inner_products
from index_store.search.hits import ABSENT_SCORE, Hits, Segment, top_k
from index_store.search.sharded import ShardedIndex, key_blocks, scan_blocks, take_rows
from index_store.types import SIDES, Side

MAX_CANDIDATE_SHARE = 0.1  # share of the rows up to which comparing them one by one beats a matrix product over all


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Delta:
    """What stands on top of a base after some edits, never changed afterwards: later tails share its columns and see more of them.

    edits: changes made so far.  pairs: n rows added, of them and of the base's `base` rows `dead` are gone.
    ids: (n,) int64 or UTF-8 bytes.  values, keys: per side (n, D) and (n, Dk) float16.  wide_keys: the keys as float32.
    sketches: per side what bounds the score of a row and (n, m + 1) of it per row; empty while there are few rows.
    died, base_died: (n,) and (base,) uint32, the change that removed a row, 0 = none; those after `edits` do not count here.
    """

    edits: int
    pairs: int
    base: int
    dead: int
    ids: np.ndarray
    values: dict[Side, np.ndarray]
    keys: dict[Side, np.ndarray]
    wide_keys: dict[Side, np.ndarray]
    sketches: dict[Side, tuple[BoundProjection, np.ndarray]]
    lines: Sequence[bytes]
    died: np.ndarray
    base_died: np.ndarray

    def record(self, row: int) -> dict[str, Any]:
        """The caption and metadata of one row."""
        record: dict[str, Any] = json.loads(self.lines[row])
        return record

    def alive(self, rows: np.ndarray) -> np.ndarray:
        """Bool of the same shape, True where a row of the memory lives.  rows: int64, the base's first, then the tail's."""
        died = np.where(rows < self.base, self.base_died[np.minimum(rows, self.base - 1)], 0)
        if self.pairs:
            died = np.where(rows < self.base, died, self.died[np.maximum(rows - self.base, 0)])
        alive: np.ndarray = (died == 0) | (died > self.edits)
        return alive

    def resident_bytes(self) -> int:
        """Bytes of its columns; a vector that is also its key is held once."""
        sketches = [rows for _, rows in self.sketches.values()]
        own = [self.keys[side] for side in SIDES if self.keys[side] is not self.values[side]]
        return sum(
            column.nbytes for column in [self.ids, *self.values.values(), *own, *self.wide_keys.values(), *sketches]
        )

    def search(self, queries: np.ndarray, side: Side, k: int, least: np.ndarray) -> Hits:
        """Of the rows that score at least so much the exact k best, dead ones included, numbered after the base's.

        queries: (B, Dk) float32.  least: (B,) float32.  The hits are (B, ≤ k), with -1 where a query has fewer.
        """
        keys = self.wide_keys[side]
        if self.sketches:
            sketch, rows = self.sketches[side]
            row, query = _above(inner_products(rows, sketch.of(queries)), least)
            if len(row) <= MAX_CANDIDATE_SHARE * len(queries) * self.pairs:
                return self._hits(query, row, np.einsum("cd,cd->c", keys[row], queries[query]), len(queries), k)
        scores = inner_products(keys, queries)  # (n, B)
        row, query = _above(scores, least)
        return self._hits(query, row, scores[row, query], len(queries), k)

    def _hits(self, query: np.ndarray, row: np.ndarray, score: np.ndarray, queries: int, k: int) -> Hits:
        """The k best candidates of each query.  query, row, score: (c,), row by row."""
        order = np.argsort(query, kind="stable")
        query, row, score = query[order], row[order], score[order]
        counts = np.bincount(query, minlength=queries)  # (B,)
        place = np.arange(len(query)) - (np.cumsum(counts) - counts)[query]  # among those of its query
        rows = np.full((queries, counts.max(initial=0)), -1, np.int64)
        scores = np.full(rows.shape, ABSENT_SCORE, np.float32)
        rows[query, place], scores[query, place] = row + self.base, score
        return top_k(rows, scores, k) if rows.shape[1] > k else Hits(rows, scores)


def _above(scores: np.ndarray, least: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(c,) rows and (c,) queries of the scores that reach the query's least.  scores: (n, B).  least: (B,)."""
    found = np.divmod(
        np.flatnonzero(scores >= least), len(least)
    )  # np.nonzero takes ten times as long in two dimensions
    return found[0], found[1]


class EditedIndex:
    """One side of a memory with its edits: the base's rows numbered as ever, the tail's behind them."""

    def __init__(self, fan: ShardedIndex, tail: Delta) -> None:
        self._fan, self._tail = fan, tail
        self.side, self.width = fan.side, fan.width
        self.rows = fan.rows + tail.pairs
        self.pairs = self.rows - tail.dead
        self._parts: list[Segment] = [*fan.shards, tail]
        self._starts = np.append(fan.starts, self.rows)

    def search(self, queries: np.ndarray, k: int, probes: int) -> Hits:
        """What the base's indexes find and the exact best of the tail, merged; dead rows included."""
        found = self._fan.search(queries, min(k, self._fan.rows), probes)
        if not self._tail.pairs:
            return found
        least = (
            np.where(found.mask[:, -1], found.scores[:, -1], ABSENT_SCORE)
            if k <= self._fan.rows
            else np.full(len(queries), ABSENT_SCORE)
        )
        added = self._tail.search(
            queries, self.side, min(k, self._tail.pairs), least
        )  # only what may be among the k best
        if not added.rows.size:
            return found
        return top_k(np.hstack([found.rows, added.rows]), np.hstack([found.scores, added.scores]), k)

    def scan(self, queries: np.ndarray, k: int, ceiling: np.ndarray | None = None) -> Hits:
        """The exact k best living rows at or below a ceiling per query."""
        return scan_blocks(self._blocks(), queries, k, ceiling, self._tail.alive)

    def alive(self, rows: np.ndarray) -> np.ndarray:
        """Bool of the same shape, True where a row lives.  rows: int64, all present."""
        return self._tail.alive(rows)

    def take(self, rows: np.ndarray, column: Callable[[Segment], np.ndarray]) -> np.ndarray:
        """(R, …) the rows of one column, wherever they lie.  rows: (R,) int64, all present."""
        if rows.max(initial=-1) < self._fan.rows:
            return self._fan.take(rows, column)
        return take_rows(self._parts, self._starts, rows, column)

    def place(self, row: int) -> tuple[Segment, int]:
        """The part that holds a row, and the row's number there."""
        return (self._tail, row - self._fan.rows) if row >= self._fan.rows else self._fan.place(row)

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        yield from self._fan.blocks()
        yield from key_blocks(self._tail.keys[self.side], self._fan.rows)
