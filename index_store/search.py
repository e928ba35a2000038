"""Several shards searched as one, and the rule that decides which of the rows found a caller may see."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import faiss
import numpy as np

from index_store.clones import Abreast, Clone
from index_store.errors import QueryRefused
from index_store.half import widened
from index_store.pairs import Id, Side
from index_store.shard import Shard

SCAN_ROWS = 8_192  # rows scored at a time by an exact scan: 16 MiB of scores for 512 queries
WIDEST_SEARCH = 2_048  # beyond this many rows per query a scan is cheaper than an index, and on a GPU the only way
ABSENT = np.float32(-np.inf)
WHOLE_NUMBER = re.compile(r"-?[0-9]{1,19}")


@dataclass(frozen=True, slots=True, eq=False)
class Hits:
    """Rows found, best first. rows: (B, K) int64, -1 = none.  scores: (B, K) float32, inner product."""

    rows: np.ndarray
    scores: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """(B, K) bool, True where a row was found."""
        return self.rows >= 0


class Fan:
    """All shards of a memory as one search on one side; rows are numbered through the shards in order."""

    def __init__(self, shards: Sequence[Shard], side: Side) -> None:
        self.shards, self.side = shards, side
        self.starts = np.array([0, *accumulate(shard.pairs for shard in shards)], np.int64)  # (shards + 1,)
        self.pairs = int(self.starts[-1])
        self.width = shards[0].keys[side].shape[1]
        self._index = _joined([shard.indexes[side] for shard in shards])
        self._cloned = isinstance(shards[0].indexes[side], Clone)
        self._wrapped = any(_wraps(shard.indexes[side]) for shard in shards)

    def search(self, queries: np.ndarray, k: int, probes: int) -> Hits:
        """What the indexes find.  queries: (B, Dk) float32.  probes: lists visited per query, 0 where a recipe has none."""
        if self._cloned and k > WIDEST_SEARCH:
            return self.scan(queries, k)
        scores, rows = self._index.search(queries, k, params=self._parameters(probes))  # (B, k), (B, k)
        return Hits(rows, scores)

    def _parameters(self, probes: int) -> faiss.SearchParameters | None:
        """Made anew for each call: nothing is ever set on an index that others are searching."""
        if not probes:
            return None
        lists = faiss.SearchParametersIVF()
        lists.nprobe = probes
        if not self._wrapped:
            return lists
        return faiss.SearchParametersPreTransform(index_params=lists)  # type: ignore[call-arg]  # by keyword it keeps `lists` alive

    def scan(self, queries: np.ndarray, k: int, ceiling: np.ndarray | None = None) -> Hits:
        """The exact k best at or below a ceiling per query, by comparing every row: no index, no limit on k.

        queries: (B, Dk) float32.  ceiling: (B, 1) float32 or None.
        """
        best = Hits(np.full((len(queries), 0), -1, np.int64), np.zeros((len(queries), 0), np.float32))
        for start, keys in self._blocks():
            scores = queries @ keys.T  # (B, rows)
            if ceiling is not None:
                scores[scores > ceiling] = ABSENT
            rows = np.broadcast_to(np.arange(start, start + len(keys)), scores.shape)
            best = _best(np.hstack([best.rows, rows]), np.hstack([best.scores, scores]), k)
        return Hits(np.where(best.scores > ABSENT, best.rows, -1), best.scores)

    def take(self, rows: np.ndarray, column: Callable[[Shard], np.ndarray]) -> np.ndarray:
        """(R, …) the rows of one column, wherever they lie.  rows: (R,) int64, all present."""
        if len(self.shards) == 1:
            return np.take(column(self.shards[0]), rows, axis=0)
        owner = np.searchsorted(self.starts, rows, side="right") - 1  # (R,)
        columns = [column(shard) for shard in self.shards]
        taken = np.empty((len(rows), *columns[0].shape[1:]), np.result_type(*columns))
        for i in np.unique(owner):
            mine = owner == i
            taken[mine] = columns[i][rows[mine] - self.starts[i]]
        return taken

    def place(self, row: int) -> tuple[Shard, int]:
        """The shard that holds a row, and the row's number there."""
        owner = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.shards[owner], row - int(self.starts[owner])

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, (rows, Dk) float32) of every block."""
        for first, shard in zip(self.starts.tolist(), self.shards, strict=False):
            keys = shard.keys[self.side]
            for start in range(0, len(keys), SCAN_ROWS):
                yield first + start, widened(keys[start : start + SCAN_ROWS])


@dataclass(frozen=True, slots=True, eq=False)
class Limits:
    """What callers refuse to see.  ceiling: (B, 1) float32 or None.  floor: least score.  exclude: per query, ids as stored, or None."""

    ceiling: np.ndarray | None = None
    floor: float | None = None
    exclude: Sequence[np.ndarray] | None = None

    @property
    def none(self) -> bool:
        """True where everything found may be seen."""
        return self.ceiling is None and self.floor is None and not self.spare

    @property
    def spare(self) -> int:
        """The most rows that exclusion by id can take from one query."""
        return max((len(ids) for ids in self.exclude), default=0) if self.exclude is not None else 0

    def of(self, chosen: np.ndarray) -> "Limits":
        """The limits of some of the queries.  chosen: (b,) int64."""
        ceiling = None if self.ceiling is None else self.ceiling[chosen]
        return Limits(ceiling, self.floor, None if self.exclude is None else [self.exclude[i] for i in chosen])

    def allowed(self, hits: Hits, fan: Fan) -> np.ndarray:
        """(B, K) bool, True where the row exists and the caller may see it."""
        allowed = hits.mask
        if self.ceiling is not None:
            allowed &= hits.scores <= self.ceiling
        if self.floor is not None:
            allowed &= hits.scores >= self.floor
        if self.exclude is not None and self.spare:
            names = fan.take(np.maximum(hits.rows, 0).ravel(), lambda shard: shard.ids).reshape(hits.rows.shape)
            for query, ids in enumerate(self.exclude):
                if len(ids):
                    allowed[query] &= ~np.isin(names[query], ids)
        return allowed


def limits_of(
    queries: int,
    id_kind: str,
    *,
    max_similarity: float | np.ndarray | None,
    exclude: Sequence[Collection[Id]] | None,
    min_score: float | None,
) -> Limits:
    """Check what the callers ask for and bring it into the memory's own terms."""
    ceiling = None
    if max_similarity is not None:
        ceiling = np.asarray(max_similarity, np.float32)
        if ceiling.shape not in ((), (queries,)) or np.isnan(ceiling).any():
            raise QueryRefused(f"max_similarity must be one number, or one for each of {queries} queries, not {max_similarity!r}")
        ceiling = np.broadcast_to(ceiling.reshape(-1, 1), (queries, 1)) if (ceiling < np.inf).any() else None
    if exclude is not None and len(exclude) != queries:
        raise QueryRefused(f"exclude must hold one collection of ids for each of {queries} queries, not {len(exclude)}")
    stored = None if exclude is None else [_as_stored(ids, id_kind) for ids in exclude]
    return Limits(ceiling, min_score, stored)


def nearest(fan: Fan, queries: np.ndarray, k: int, probes: int, limits: Limits) -> Hits:
    """The k best allowed rows of each query: first from the index, wider where limits left too few, at last by a scan.

    queries: (B, Dk) float32.  A flat memory is answered exactly under any limits.  An index with lists is exact once it scans.
    """
    if limits.none and k <= fan.pairs:
        hits = fan.search(queries, k, probes)
        if hits.mask.all():
            return hits
    hits = Hits(np.full((len(queries), k), -1, np.int64), np.zeros((len(queries), k), np.float32))
    waiting = np.arange(len(queries))
    for width in _widths(k, limits, fan.pairs):
        found = fan.search(queries[waiting], width, probes)
        waiting = waiting[~_settle(hits, waiting, found, limits.of(waiting), fan)]
        if not len(waiting):
            return hits
    mine = limits.of(waiting)
    _settle(hits, waiting, fan.scan(queries[waiting], min(k + mine.spare, fan.pairs), mine.ceiling), mine, fan)
    return hits


def _widths(k: int, limits: Limits, pairs: int) -> Iterator[int]:
    """How many rows to ask the index for: enough for every exclusion, then eight times more, while an index is the cheaper way."""
    width = k + limits.spare + (k if limits.ceiling is not None else 0)
    yield min(width, pairs)
    while limits.ceiling is not None and width < pairs and width * 8 <= WIDEST_SEARCH:
        width *= 8
        yield min(width, pairs)


def _settle(hits: Hits, chosen: np.ndarray, found: Hits, limits: Limits, fan: Fan) -> np.ndarray:
    """Write the allowed rows of `found` into the chosen rows of `hits`; (b,) bool, True where no wider search could add one."""
    k = hits.rows.shape[1]
    allowed = limits.allowed(found, fan)  # (b, width)
    order = np.argsort(~allowed, axis=1, kind="stable")[:, :k]  # (b, ≤ k), the allowed first, still best first
    kept = np.take_along_axis(allowed, order, axis=1)
    hits.rows[chosen, : order.shape[1]] = np.where(kept, np.take_along_axis(found.rows, order, axis=1), -1)
    hits.scores[chosen, : order.shape[1]] = np.where(kept, np.take_along_axis(found.scores, order, axis=1), 0)
    present = found.mask
    settled: np.ndarray = (kept.sum(axis=1) >= min(k, fan.pairs)) | (present.sum(axis=1) >= fan.pairs)  # (b,)
    if limits.floor is not None:
        settled |= (present & (found.scores < limits.floor)).any(axis=1)
    return settled


def _best(rows: np.ndarray, scores: np.ndarray, k: int) -> Hits:
    """The k highest scores of each row, highest first; among equals the lowest row number."""
    if scores.shape[1] > 4 * k:  # partition first: sorting a whole block costs ten times the product itself
        first = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        first.sort(axis=1)
        rows, scores = np.take_along_axis(rows, first, axis=1), np.take_along_axis(scores, first, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return Hits(np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1))


def _wraps(index: faiss.Index | Clone) -> bool:
    """True where search parameters have to reach through a transform."""
    return index.wrapped if isinstance(index, Clone) else isinstance(index, faiss.IndexPreTransform)


def _joined(indexes: Sequence[Any]) -> Any:
    """One index as it is; several side by side, searched in parallel, rows numbered through: anything with the search of a faiss index."""
    if len(indexes) == 1:
        return indexes[0]
    clones = [index for index in indexes if isinstance(index, Clone)]
    if clones:
        return Abreast(clones)
    joined = faiss.IndexShards(indexes[0].d, True)  # threaded; successive_ids is its default
    for index in indexes:
        joined.add_shard(index)
    return joined


def _as_stored(ids: Collection[Id], kind: str) -> np.ndarray:
    """Excluded ids as the memory stores them; (E,) int64 or bytes. One that cannot be an id here excludes nothing.

    A form or a query string can only say "12": a memory has one type of id, so 12 and "12" can mean nothing else.
    """
    names = [str(name) for name in ids]
    if kind == "S":
        return np.array([name.encode("utf-8", "replace") for name in names if "\0" not in name], np.bytes_)
    numbers = [int(name) for name in names if WHOLE_NUMBER.fullmatch(name)]
    return np.array([number for number in numbers if -(2**63) <= number < 2**63], np.int64)
