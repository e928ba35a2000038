"""The rows that edits added, in memory, and one search over a version with its edits on top."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from index_store.hits import ABSENT, Hits, Part, best
from index_store.pairs import SIDES, Side
from index_store.search import Fan, blocks_of, scanned, taken

FEW_QUERIES = 4  # up to here reading half the bytes beats a matrix product: 0.41 against 0.69 ms for 10 000 rows at D = 512


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Tail:
    """What stands on top of a base after some edits, never changed afterwards: later tails share its columns and see more of them.

    edits: changes made so far.  pairs: n rows added, of them and of the base's `base` rows `dead` are gone.
    ids: (n,) int64 or UTF-8 bytes.  values, keys: per side (n, D) and (n, Dk) float16.  wide_keys: the keys as float32.
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
        own = [self.keys[side] for side in SIDES if self.keys[side] is not self.values[side]]
        return sum(column.nbytes for column in [self.ids, *self.values.values(), *own, *self.wide_keys.values()])

    def search(self, queries: np.ndarray, side: Side, k: int) -> Hits:
        """The exact k best rows, dead ones included, numbered after the base's.  queries: (B, Dk) float32.  k: at most n."""
        if len(queries) <= FEW_QUERIES:
            found = _scan_codes(queries, self.keys[side], k)
        else:
            scores = queries @ self.wide_keys[side].T  # (B, n)
            found = best(np.broadcast_to(np.arange(self.pairs), scores.shape), scores, k)
        return Hits(found.rows + self.base, found.scores)


def _scan_codes(queries: np.ndarray, keys: np.ndarray, k: int) -> Hits:
    """The exact k best of (n, Dk) float16 keys, read as they lie: faiss converts them in registers."""
    scores = np.full((len(queries), k), ABSENT, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    codes = keys.view(np.uint8)
    quantizer = faiss.ScalarQuantizer(keys.shape[1], faiss.ScalarQuantizer.QT_fp16)
    select = quantizer.select_InvertedListScanner  # type: ignore[attr-defined]  # missing from its stubs
    scanner = select(faiss.METRIC_INNER_PRODUCT, None, True, None, False)  # no selection, no residuals, and of "list and row" …
    scanner.set_list(0, 0.0)  # … the list is 0, so that what remains is the row
    for i in range(len(queries)):
        scanner.set_query(faiss.swig_ptr(queries[i]))
        scanner.scan_codes(len(keys), faiss.swig_ptr(codes), None, faiss.swig_ptr(scores[i]), faiss.swig_ptr(rows[i]), k)
    order = np.argsort(-scores, axis=1, kind="stable")
    return Hits(np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1))


class Edited:
    """One side of a memory with its edits: the base's rows numbered as ever, the tail's behind them."""

    def __init__(self, fan: Fan, tail: Tail) -> None:
        self._fan, self._tail = fan, tail
        self.side, self.width = fan.side, fan.width
        self.rows = fan.rows + tail.pairs
        self.pairs = self.rows - tail.dead
        self._parts: list[Part] = [*fan.shards, tail]
        self._starts = np.append(fan.starts, self.rows)

    def search(self, queries: np.ndarray, k: int, probes: int) -> Hits:
        """What the base's indexes find and the exact best of the tail, merged; dead rows included."""
        found = self._fan.search(queries, min(k, self._fan.rows), probes)
        if not self._tail.pairs:
            return found
        added = self._tail.search(queries, self.side, min(k, self._tail.pairs))
        return best(np.hstack([found.rows, added.rows]), np.hstack([found.scores, added.scores]), k)

    def scan(self, queries: np.ndarray, k: int, ceiling: np.ndarray | None = None) -> Hits:
        """The exact k best living rows at or below a ceiling per query."""
        return scanned(self._blocks(), queries, k, ceiling, self._tail.alive)

    def alive(self, rows: np.ndarray) -> np.ndarray:
        """Bool of the same shape, True where a row lives.  rows: int64, all present."""
        return self._tail.alive(rows)

    def take(self, rows: np.ndarray, column: Callable[[Part], np.ndarray]) -> np.ndarray:
        """(R, …) the rows of one column, wherever they lie.  rows: (R,) int64, all present."""
        return taken(self._parts, self._starts, rows, column)

    def place(self, row: int) -> tuple[Part, int]:
        """The part that holds a row, and the row's number there."""
        return (self._tail, row - self._fan.rows) if row >= self._fan.rows else self._fan.place(row)

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        yield from self._fan.blocks()
        yield from blocks_of(self._tail.keys[self.side], self._fan.rows)
