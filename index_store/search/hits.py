"""Hits of a search, and the interfaces Segment (holds rows) and SideIndex (searches rows)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from index_store.types import Side

ABSENT_SCORE = np.float32(-np.inf)


@dataclass(frozen=True, slots=True, eq=False)
class Hits:
    """Rows found by B queries, best first.

    rows: (B, K) int64, -1 = none.  scores: (B, K) float32, inner product.
    """

    rows: np.ndarray
    scores: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """(B, K) bool, True where a row was found."""
        return self.rows >= 0


class Segment(Protocol):
    """Consecutive rows of a memory: a shard on disk, or the delta of online edits in memory."""

    @property
    def pairs(self) -> int:
        """N, the number of rows of this segment."""

    @property
    def ids(self) -> np.ndarray:
        """(N,) int64 or UTF-8 bytes."""

    @property
    def values(self) -> dict[Side, np.ndarray]:
        """Per side (N, D) float16 CLIP vectors."""

    @property
    def keys(self) -> dict[Side, np.ndarray]:
        """Per side (N, Dk) float16 search keys."""

    def record(self, row: int) -> dict[str, Any]:
        """The caption and metadata of one row."""


class SideIndex(Protocol):
    """Search over one side of a memory, with or without online edits.

    Rows are numbered through all segments. Edits replace or delete a row by a tombstone: it keeps
    its number and is passed over. `rows` counts all rows, `pairs` only the live ones.
    """

    @property
    def side(self) -> Side:
        """The side whose keys are compared."""

    @property
    def width(self) -> int:
        """Dk, the width of a key."""

    @property
    def rows(self) -> int:
        """Number of rows, those with a tombstone included."""

    @property
    def pairs(self) -> int:
        """Number of live rows."""

    def is_live(self, rows: np.ndarray) -> np.ndarray:
        """Bool of the same shape, True where a row has no tombstone.  rows: int64, all >= 0."""

    def search(self, queries: np.ndarray, k: int, probes: int) -> Hits:
        """The k best rows by the indexes, rows with a tombstone included."""

    def scan(self, queries: np.ndarray, k: int, ceiling: np.ndarray | None = None) -> Hits:
        """The exact k best live rows with scores at or below `ceiling`, (B, 1) or None."""

    def take(self, rows: np.ndarray, column: Callable[[Segment], np.ndarray]) -> np.ndarray:
        """(R, …) a column at `rows`, from whichever segments hold them.  rows: (R,) int64, >= 0."""

    def locate(self, row: int) -> tuple[Segment, int]:
        """The segment that holds a row, and the row's number within the segment."""


def top_k(rows: np.ndarray, scores: np.ndarray, k: int) -> Hits:
    """The k highest scores of each query, highest first; equal scores in the order of row numbers.

    rows: (B, M) int64.  scores: (B, M) float32.
    """
    if scores.shape[1] > 4 * k:  # a full sort of a wide block costs ten times the inner products
        first = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        first.sort(axis=1)
        rows, scores = np.take_along_axis(rows, first, axis=1), np.take_along_axis(scores, first, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return Hits(np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1))
