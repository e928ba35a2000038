"""Several shards searched as one, and how far a search must reach until k rows are left that a caller may see."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import faiss
import numpy as np

from index_store.float16 import to_float32
from index_store.search.filters import RowFilter
from index_store.search.gpu import ClonedIndex, ClonedShards, wrapper_types
from index_store.search.hits import ABSENT_SCORE, Hits, Segment, SideIndex, top_k
from index_store.search.shard import Shard
from index_store.types import Side

SCAN_ROWS = 8_192  # rows scored at a time by an exact scan: 16 MiB of scores for 512 queries
REFINE_FACTOR = (
    16  # candidates for each neighbour that a recipe with RFlat or Refine(…) at its end compares once more, exactly
)
MAX_INDEX_K = 2_048  # beyond this many rows per query a scan is cheaper than an index, and on a GPU the only way


class ShardedIndex:
    """All shards of a memory as one search on one side; rows are numbered through the shards in order."""

    def __init__(self, shards: Sequence[Shard], side: Side) -> None:
        self.shards, self.side = shards, side
        self.starts = np.array([0, *accumulate(shard.pairs for shard in shards)], np.int64)  # (shards + 1,)
        self.rows = self.pairs = int(self.starts[-1])
        self.width = shards[0].keys[side].shape[1]
        self._index = _joined([shard.indexes[side] for shard in shards])
        self._cloned = isinstance(shards[0].indexes[side], ClonedIndex)
        first = shards[0].indexes[side]  # of a short last shard the index may be flat, and heeds no parameters
        self._shells = first.shells if self._cloned else wrapper_types(first)

    def search(self, queries: np.ndarray, k: int, probes: int) -> Hits:
        """What the indexes find.  queries: (B, Dk) float32.  probes: lists visited per query, 0 where a recipe has none."""
        if self._cloned and k > MAX_INDEX_K:
            return self.scan(queries, k)
        scores, rows = self._index.search(queries, k, params=self._parameters(probes))  # (B, k), (B, k)
        return Hits(rows, scores)

    def _parameters(self, probes: int) -> faiss.SearchParameters | None:
        """Made anew for each call: nothing is ever set on an index that others are searching."""
        inner: faiss.SearchParameters | None = None
        if probes:
            inner = faiss.SearchParametersIVF()
            inner.nprobe = probes
        for shell in reversed(self._shells):  # by keyword each keeps the one within alive
            if shell is faiss.IndexRefine:
                inner = faiss.IndexRefineSearchParameters(k_factor=REFINE_FACTOR, base_index_params=inner)  # type: ignore[call-arg]
            elif inner is not None:
                inner = faiss.SearchParametersPreTransform(index_params=inner)  # type: ignore[call-arg]
        return inner

    def scan(self, queries: np.ndarray, k: int, ceiling: np.ndarray | None = None) -> Hits:
        """The exact k best at or below a ceiling per query, by comparing every row: no index, no limit on k.

        queries: (B, Dk) float32.  ceiling: (B, 1) float32 or None.
        """
        return scan_blocks(self.blocks(), queries, k, ceiling)

    def take(self, rows: np.ndarray, column: Callable[[Segment], np.ndarray]) -> np.ndarray:
        """(R, …) the rows of one column, wherever they lie.  rows: (R,) int64, all present."""
        if len(self.shards) == 1:
            return np.take(column(self.shards[0]), rows, axis=0)
        return take_rows(self.shards, self.starts, rows, column)

    def place(self, row: int) -> tuple[Segment, int]:
        """The shard that holds a row, and the row's number there."""
        owner = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.shards[owner], row - int(self.starts[owner])

    def alive(self, rows: np.ndarray) -> np.ndarray:
        """All of them: what a version holds never dies, only edits on top of it can say so."""
        return np.ones(rows.shape, bool)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, (rows, Dk) float32) of every block."""
        for first, shard in zip(self.starts.tolist(), self.shards, strict=False):
            yield from key_blocks(shard.keys[self.side], first)


def key_blocks(keys: np.ndarray, first: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, (rows, Dk) float32) of every block of one part.  keys: (N, Dk) float16, whose first row is number `first`."""
    for start in range(0, len(keys), SCAN_ROWS):
        yield first + start, to_float32(keys[start : start + SCAN_ROWS])


def scan_blocks(
    blocks: Iterable[tuple[int, np.ndarray]],
    queries: np.ndarray,
    k: int,
    ceiling: np.ndarray | None = None,
    alive: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Hits:
    """The exact k best living rows at or below a ceiling per query: every block compared in turn."""
    found = Hits(np.full((len(queries), 0), -1, np.int64), np.zeros((len(queries), 0), np.float32))
    for start, keys in blocks:
        scores, rows = queries @ keys.T, np.arange(start, start + len(keys))  # (B, rows), (rows,)
        if ceiling is not None:
            scores[scores > ceiling] = ABSENT_SCORE
        if alive is not None:
            scores[:, ~alive(rows)] = ABSENT_SCORE
        found = top_k(
            np.hstack([found.rows, np.broadcast_to(rows, scores.shape)]), np.hstack([found.scores, scores]), k
        )
    return Hits(np.where(found.scores > ABSENT_SCORE, found.rows, -1), found.scores)


def take_rows(
    parts: Sequence[Segment], starts: np.ndarray, rows: np.ndarray, column: Callable[[Segment], np.ndarray]
) -> np.ndarray:
    """(R, …) the rows of one column of several parts.  starts: (parts + 1,) int64.  rows: (R,) int64, all present."""
    owner = np.searchsorted(starts, rows, side="right") - 1  # (R,)
    columns = [column(part) for part in parts]
    found = np.empty((len(rows), *columns[0].shape[1:]), np.result_type(*columns))
    for i in np.unique(owner):
        mine = owner == i
        found[mine] = columns[i][rows[mine] - starts[i]]
    return found


def find_nearest(fan: SideIndex, queries: np.ndarray, k: int, probes: int, row_filter: RowFilter) -> Hits:
    """The k best allowed rows of each query: first from the index, wider where the filter left too few, at last by a scan.

    queries: (B, Dk) float32.  A flat memory is answered exactly under any filter.  An index with lists is exact once it scans.
    """
    if row_filter.allows_all and k <= fan.pairs == fan.rows:
        hits = fan.search(queries, k, probes)
        if hits.mask.all():
            return hits
    hits = Hits(np.full((len(queries), k), -1, np.int64), np.zeros((len(queries), k), np.float32))
    waiting = np.arange(len(queries))
    for width in _widths(k, row_filter, fan):
        found = fan.search(queries[waiting], width, probes)
        waiting = waiting[~_settle(hits, waiting, found, row_filter.select(waiting), fan)]
        if not len(waiting):
            return hits
    mine = row_filter.select(waiting)
    _settle(hits, waiting, fan.scan(queries[waiting], min(k + mine.max_excluded, fan.rows), mine.ceiling), mine, fan)
    return hits


def _widths(k: int, row_filter: RowFilter, fan: SideIndex) -> Iterator[int]:
    """How many rows to ask the index for: enough for every exclusion, then eight times more, while an index is the cheaper way."""
    dead = fan.rows - fan.pairs
    crowd = row_filter.ceiling is not None or dead > 0  # nobody knows how many rows of these lie nearest
    width = k + row_filter.max_excluded + (k if row_filter.ceiling is not None else min(k, dead))
    yield min(width, fan.rows)
    while crowd and width < fan.rows and width * 8 <= MAX_INDEX_K:
        width *= 8
        yield min(width, fan.rows)


def _settle(hits: Hits, chosen: np.ndarray, found: Hits, row_filter: RowFilter, fan: SideIndex) -> np.ndarray:
    """Write the allowed rows of `found` into the chosen rows of `hits`; (b,) bool, True where no wider search could add one."""
    k = hits.rows.shape[1]
    allowed = row_filter.allowed(found, fan)  # (b, width)
    order = np.argsort(~allowed, axis=1, kind="stable")[:, :k]  # (b, ≤ k), the allowed first, still best first
    kept = np.take_along_axis(allowed, order, axis=1)
    hits.rows[chosen, : order.shape[1]] = np.where(kept, np.take_along_axis(found.rows, order, axis=1), -1)
    hits.scores[chosen, : order.shape[1]] = np.where(kept, np.take_along_axis(found.scores, order, axis=1), 0)
    present = found.mask
    settled: np.ndarray = (kept.sum(axis=1) >= min(k, fan.pairs)) | (present.sum(axis=1) >= fan.rows)  # (b,)
    return settled


def _joined(indexes: Sequence[Any]) -> Any:
    """One index as it is; several side by side, searched in parallel, rows numbered through: anything with the search of a faiss index."""
    if len(indexes) == 1:
        only: faiss.Index | ClonedIndex = indexes[0]
        return only
    clones = [index for index in indexes if isinstance(index, ClonedIndex)]
    if clones:
        return ClonedShards(clones)
    joined = faiss.IndexShards(indexes[0].d, True)  # threaded; successive_ids is its default
    for index in indexes:
        joined.add_shard(index)
    return joined
