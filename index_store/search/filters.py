"""The rule that decides which of the rows found a caller may see."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from index_store.errors import QueryRefused
from index_store.search.hits import Hits, Searched
from index_store.types import Id

FEW = 32  # so many excluded ids of a query are compared with all others' in one go, more are sorted first
WHOLE_NUMBER = re.compile(r"-?[0-9]{1,19}")


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

    def allowed(self, hits: Hits, fan: Searched) -> np.ndarray:
        """(B, K) bool, True where the row is there and the caller may see it. A dead row nobody may see."""
        allowed = hits.mask
        if fan.pairs < fan.rows:
            allowed &= fan.alive(np.maximum(hits.rows, 0))
        if self.ceiling is not None:
            allowed &= hits.scores <= self.ceiling
        if self.floor is not None:
            allowed &= hits.scores >= self.floor
        if self.exclude is not None and self.spare:
            names = fan.take(np.maximum(hits.rows, 0).ravel(), lambda part: part.ids).reshape(hits.rows.shape)
            allowed &= ~_named(names, self.exclude)
        return allowed


def _named(names: np.ndarray, lists: Sequence[np.ndarray]) -> np.ndarray:
    """(B, K) bool, True where a query's list holds the name.  names: (B, K).  lists: B arrays (E,), each E its own."""
    found = np.zeros(names.shape, bool)
    few = [query for query, ids in enumerate(lists) if 0 < len(ids) <= FEW]
    if few:
        owner = np.repeat(few, [len(lists[query]) for query in few])  # (sum of E,)
        row, column = np.nonzero(names[owner] == np.concatenate([lists[query] for query in few])[:, None])
        found[owner[row], column] = True
    for query, ids in enumerate(lists):
        if len(ids) > FEW:
            found[query] = np.isin(names[query], ids)
    return found


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
            raise QueryRefused(
                f"max_similarity must be one number, or one for each of {queries} queries, not {max_similarity!r}"
            )
        ceiling = np.broadcast_to(ceiling.reshape(-1, 1), (queries, 1)) if (ceiling < np.inf).any() else None
    if exclude is not None and len(exclude) != queries:
        raise QueryRefused(f"exclude must hold one collection of ids for each of {queries} queries, not {len(exclude)}")
    stored = None if exclude is None else [as_stored(ids, id_kind) for ids in exclude]
    return Limits(ceiling, min_score, stored)


def as_stored(ids: Collection[Id], kind: str) -> np.ndarray:
    """Ids as the memory stores them; (E,) int64 or bytes. One that cannot be an id here is left out.

    A form or a query string can only say "12": a memory has one type of id, so 12 and "12" can mean nothing else.
    """
    names = [str(name) for name in ids]
    if kind == "S":
        return np.array([name.encode("utf-8", "replace") for name in names if "\0" not in name], np.bytes_)
    numbers = [int(name) for name in names if WHOLE_NUMBER.fullmatch(name)]
    return np.array([number for number in numbers if -(2**63) <= number < 2**63], np.int64)
