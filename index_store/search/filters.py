"""Search parameters of a call, and the row filter that they become in one memory."""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from index_store.errors import QueryRefused
from index_store.search.hits import Hits, SideIndex
from index_store.types import Id

MAX_BROADCAST_IDS = 32  # ids compared with every hit in one broadcast; longer lists go through np.isin
WHOLE_NUMBER = re.compile(r"-?[0-9]{1,19}")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SearchParams:
    """Search parameters of one call with B queries; they travel with the call, no index keeps them.

    max_similarity: float for all queries, or (B,) float; a pair scoring above it is passed over,
    inf = no limit.
    exclude: B collections of ids to pass over, one per query; None = none for any query.
    probes: inverted lists visited per query, None = as many as the manifest says. An index without
    lists ignores it.
    """

    max_similarity: float | np.ndarray = math.inf
    exclude: Sequence[Collection[Id]] | None = None
    probes: int | None = None

    @classmethod
    def stack(cls, singles: Sequence["SearchParams"]) -> "SearchParams":
        """The parameters of a batch of B queries, from those of each query alone (B = 1).

        Raises ValueError where the queries differ in `probes`, which one search has only once.
        """
        probes = {single.probes for single in singles}
        if len(probes) > 1:
            raise ValueError(f"one search cannot visit {sorted(probes, key=str)} lists: search once for each")
        return cls(
            max_similarity=np.array([np.reshape(single.max_similarity, ()) for single in singles], np.float32),  # (B,)
            exclude=[() if single.exclude is None else single.exclude[0] for single in singles],
            probes=next(iter(probes), None),
        )


DEFAULT_PARAMS = SearchParams()


@dataclass(frozen=True, slots=True, eq=False)
class RowFilter:
    """The row filter of B queries in one memory: which of the rows found each query may return.

    ceiling: (B, 1) float32 highest score, None = no limit.  exclude: B arrays (E,) of ids as the
    memory stores them, each with its own E, or None.
    """

    ceiling: np.ndarray | None = None
    exclude: Sequence[np.ndarray] | None = None

    @classmethod
    def from_params(cls, params: SearchParams, queries: int, id_kind: str) -> "RowFilter":
        """The filter that `params` describe for that many queries.

        id_kind: "i" or "S", the dtype kind of the memory's ids.
        Raises QueryRefused where the shape or a value of the parameters does not fit the queries.
        """
        ceiling, exclude = np.asarray(params.max_similarity, np.float32), params.exclude
        if ceiling.shape not in ((), (queries,)) or np.isnan(ceiling).any():
            raise QueryRefused(
                f"max_similarity must be one number, or one for each of {queries} queries, "
                f"not {params.max_similarity!r}"
            )
        if exclude is not None and len(exclude) != queries:
            raise QueryRefused(
                f"exclude must hold one collection of ids for each of {queries} queries, not {len(exclude)}"
            )
        lists = {} if exclude is None else {id(ids): ids for ids in exclude}  # the items of a request share one
        converted = {key: convert_ids(ids, id_kind) for key, ids in lists.items()}
        return cls(
            np.broadcast_to(ceiling.reshape(-1, 1), (queries, 1)) if (ceiling < np.inf).any() else None,
            None if exclude is None else [converted[id(ids)] for ids in exclude],
        )

    @property
    def allows_all(self) -> bool:
        """True where no row is filtered out."""
        return self.ceiling is None and not self.max_excluded

    @property
    def max_excluded(self) -> int:
        """The most rows that exclusion by id can remove from the hits of one query."""
        return max((len(ids) for ids in self.exclude), default=0) if self.exclude is not None else 0

    def select(self, chosen: np.ndarray) -> "RowFilter":
        """The filter of some of the queries.  chosen: (b,) int64."""
        return RowFilter(
            None if self.ceiling is None else self.ceiling[chosen],
            None if self.exclude is None else [self.exclude[i] for i in chosen],
        )

    def allowed_mask(self, hits: Hits, index: SideIndex) -> np.ndarray:
        """(B, K) bool, True where a row is present, live and passes the filter."""
        allowed = hits.mask
        if index.pairs < index.rows:
            allowed &= index.is_live(np.maximum(hits.rows, 0))
        if self.ceiling is not None:
            allowed &= hits.scores <= self.ceiling
        if self.exclude is not None and self.max_excluded:
            ids = index.take(np.maximum(hits.rows, 0).ravel(), lambda segment: segment.ids).reshape(hits.rows.shape)
            allowed &= ~_listed_mask(ids, self.exclude)
        return allowed


def _listed_mask(ids: np.ndarray, lists: Sequence[np.ndarray]) -> np.ndarray:
    """(B, K) bool, True where a query's list has the id.  ids: (B, K).  lists: B arrays (E,)."""
    found = np.zeros(ids.shape, bool)
    short = [query for query, names in enumerate(lists) if 0 < len(names) <= MAX_BROADCAST_IDS]
    if short:
        owner = np.repeat(short, [len(lists[query]) for query in short])  # (sum of E,)
        row, column = np.nonzero(ids[owner] == np.concatenate([lists[query] for query in short])[:, None])
        found[owner[row], column] = True
    for query, names in enumerate(lists):
        if len(names) > MAX_BROADCAST_IDS:
            found[query] = np.isin(ids[query], names)
    return found


def convert_ids(ids: Collection[Id], kind: str) -> np.ndarray:
    """Ids converted to the memory's dtype: (E,) int64 or bytes; ids that cannot occur are left out.

    Forms and query strings only carry text. A memory has one type of id, so 12 and "12" are equal.
    """
    names = [str(name) for name in ids]
    if kind == "S":
        return np.array([name.encode("utf-8", "replace") for name in names if "\0" not in name], np.bytes_)
    numbers = [int(name) for name in names if WHOLE_NUMBER.fullmatch(name)]
    return np.array([number for number in numbers if -(2**63) <= number < 2**63], np.int64)
