"""Search over all shards of a version, and the filtered search that widens until k rows pass."""

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

SCAN_ROWS = 8_192  # rows scored at a time by a scan: 16 MiB of scores for 512 queries
REFINE_FACTOR = 16  # candidates per neighbour that RFlat or Refine(…) recipes compare again, exactly
MAX_INDEX_K = 2_048  # a scan is cheaper than an index search for more rows, and a GPU returns no more
WIDENING_FACTOR = 8  # a search whose rows were filtered out is repeated with this many times the rows


class ShardedIndex:
    """All shards of a version as one index of one side; rows are numbered through the shards.

    shards: in row order.  starts: (shards + 1,) int64 first row of each shard, then the row count.
    rows, pairs: N, since a version itself has no tombstones.  width: Dk.
    """

    def __init__(self, shards: Sequence[Shard], side: Side) -> None:
        self.shards, self.side = shards, side
        self.starts = np.array([0, *accumulate(shard.pairs for shard in shards)], np.int64)
        self.rows = self.pairs = int(self.starts[-1])
        self.width = shards[0].keys[side].shape[1]
        self._index = _join_indexes([shard.indexes[side] for shard in shards])
        first = shards[0].indexes[side]  # a short last shard may be flat, which ignores search parameters
        self._cloned = isinstance(first, ClonedIndex)
        self._wrapper_types = first.wrapper_types if self._cloned else wrapper_types(first)

    def search(self, queries: np.ndarray, k: int, probes: int) -> Hits:
        """The k best rows by the faiss indexes.

        queries: (B, Dk) float32.  probes: lists visited per query, 0 where the recipe has none.
        """
        if self._cloned and k > MAX_INDEX_K:
            return self.scan(queries, k)
        scores, rows = self._index.search(queries, k, params=self._search_parameters(probes))  # (B, k), (B, k)
        return Hits(rows, scores)

    def _search_parameters(self, probes: int) -> faiss.SearchParameters | None:
        """New faiss parameters for one call; nothing is set on an index that others search."""
        inner: faiss.SearchParameters | None = None
        if probes:
            inner = faiss.SearchParametersIVF()
            inner.nprobe = probes
        for wrapper in reversed(self._wrapper_types):  # passed by keyword, faiss keeps a reference to the inner one
            if wrapper is faiss.IndexRefine:
                inner = faiss.IndexRefineSearchParameters(k_factor=REFINE_FACTOR, base_index_params=inner)  # type: ignore[call-arg]
            elif inner is not None:
                inner = faiss.SearchParametersPreTransform(index_params=inner)  # type: ignore[call-arg]
        return inner

    def scan(self, queries: np.ndarray, k: int, ceiling: np.ndarray | None = None) -> Hits:
        """The exact k best rows with scores at or below a ceiling, by comparing every row.

        queries: (B, Dk) float32.  ceiling: (B, 1) float32 or None. Any k is allowed.
        """
        return scan_blocks(self.key_blocks(), queries, k, ceiling)

    def take(self, rows: np.ndarray, column: Callable[[Segment], np.ndarray]) -> np.ndarray:
        """(R, …) a column at `rows`, from whichever shards hold them.  rows: (R,) int64, >= 0."""
        if len(self.shards) == 1:
            return np.take(column(self.shards[0]), rows, axis=0)
        return take_rows(self.shards, self.starts, rows, column)

    def locate(self, row: int) -> tuple[Segment, int]:
        """The shard that holds a row, and the row's number within the shard."""
        owner = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.shards[owner], row - int(self.starts[owner])

    def is_live(self, rows: np.ndarray) -> np.ndarray:
        """Bool of the same shape, all True: only edits on top of a version have tombstones."""
        return np.ones(rows.shape, bool)

    def key_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, (≤ SCAN_ROWS, Dk) float32 keys) of consecutive blocks."""
        for first, shard in zip(self.starts.tolist(), self.shards, strict=False):
            yield from split_keys(shard.keys[self.side], first)


def split_keys(keys: np.ndarray, first: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, (≤ SCAN_ROWS, Dk) float32 keys) of the blocks of one segment.

    keys: (N, Dk) float16.  first: the row number of keys[0].
    """
    for start in range(0, len(keys), SCAN_ROWS):
        yield first + start, to_float32(keys[start : start + SCAN_ROWS])


def scan_blocks(
    blocks: Iterable[tuple[int, np.ndarray]],
    queries: np.ndarray,
    k: int,
    ceiling: np.ndarray | None = None,
    is_live: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Hits:
    """The exact k best live rows with scores at or below a ceiling, comparing block by block.

    blocks: (first row, (R, Dk) float32 keys).  queries: (B, Dk) float32.  ceiling: (B, 1) or None.
    """
    found = Hits(np.full((len(queries), 0), -1, np.int64), np.zeros((len(queries), 0), np.float32))
    for start, keys in blocks:
        scores, rows = queries @ keys.T, np.arange(start, start + len(keys))  # (B, R), (R,)
        if ceiling is not None:
            scores[scores > ceiling] = ABSENT_SCORE
        if is_live is not None:
            scores[:, ~is_live(rows)] = ABSENT_SCORE
        rows = np.broadcast_to(rows, scores.shape)  # (B, R)
        found = top_k(np.hstack([found.rows, rows]), np.hstack([found.scores, scores]), k)
    return Hits(np.where(found.scores > ABSENT_SCORE, found.rows, -1), found.scores)


def take_rows(
    segments: Sequence[Segment], starts: np.ndarray, rows: np.ndarray, column: Callable[[Segment], np.ndarray]
) -> np.ndarray:
    """(R, …) one column at `rows` of several segments.

    starts: (segments + 1,) int64 first row of each.  rows: (R,) int64, >= 0.
    """
    owner = np.searchsorted(starts, rows, side="right") - 1  # (R,)
    columns = [column(segment) for segment in segments]
    found = np.empty((len(rows), *columns[0].shape[1:]), np.result_type(*columns))
    for i in np.unique(owner):
        mine = owner == i
        found[mine] = columns[i][rows[mine] - starts[i]]
    return found


def find_nearest(index: SideIndex, queries: np.ndarray, k: int, probes: int, row_filter: RowFilter) -> Hits:
    """The k best rows of each query that pass the filter.

    Queries with too few such rows search the index again for more rows, and at last scan all rows.
    A flat index is exact under any filter, an index with lists once it scans.
    queries: (B, Dk) float32.
    """
    if row_filter.allows_all and k <= index.pairs == index.rows:
        hits = index.search(queries, k, probes)
        if hits.mask.all():
            return hits
    hits = Hits(np.full((len(queries), k), -1, np.int64), np.zeros((len(queries), k), np.float32))
    pending = np.arange(len(queries))  # queries that a wider search may still give more rows
    for width in _search_widths(k, row_filter, index):
        found = index.search(queries[pending], width, probes)
        pending = pending[~_keep_allowed(hits, pending, found, row_filter.select(pending), index)]
        if not len(pending):
            return hits
    rest = row_filter.select(pending)
    found = index.scan(queries[pending], min(k + rest.max_excluded, index.rows), rest.ceiling)
    _keep_allowed(hits, pending, found, rest, index)
    return hits


def _search_widths(k: int, row_filter: RowFilter, index: SideIndex) -> Iterator[int]:
    """How many rows to search for, in turn, while an index search is cheaper than a scan.

    The first width covers every exclusion by id. How many rows lie above a ceiling or have a
    tombstone near a query is unknown, so in these cases wider searches follow.
    """
    tombstones = index.rows - index.pairs
    width = k + row_filter.max_excluded + (k if row_filter.ceiling is not None else min(k, tombstones))
    yield min(width, index.rows)
    unknown = row_filter.ceiling is not None or tombstones > 0
    while unknown and width < index.rows and width * WIDENING_FACTOR <= MAX_INDEX_K:
        width *= WIDENING_FACTOR
        yield min(width, index.rows)


def _keep_allowed(hits: Hits, chosen: np.ndarray, found: Hits, row_filter: RowFilter, index: SideIndex) -> np.ndarray:
    """Write the rows of `found` that pass the filter into the rows `chosen` of `hits`.

    chosen: (b,) int64 query numbers.  found: (b, width).
    Returns (b,) bool, True where no wider search can add a row.
    """
    k = hits.rows.shape[1]
    allowed = row_filter.allowed_mask(found, index)  # (b, width)
    order = np.argsort(~allowed, axis=1, kind="stable")[:, :k]  # (b, ≤ k), the allowed first, still best first
    kept = np.take_along_axis(allowed, order, axis=1)
    hits.rows[chosen, : order.shape[1]] = np.where(kept, np.take_along_axis(found.rows, order, axis=1), -1)
    hits.scores[chosen, : order.shape[1]] = np.where(kept, np.take_along_axis(found.scores, order, axis=1), 0)
    complete = kept.sum(axis=1) >= min(k, index.pairs)  # (b,)
    exhausted = found.mask.sum(axis=1) >= index.rows  # (b,)
    final: np.ndarray = complete | exhausted
    return final


def _join_indexes(indexes: Sequence[Any]) -> Any:
    """One object with the search method of a faiss index over all shards' indexes.

    Several indexes are searched in parallel and their rows numbered through.
    """
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
