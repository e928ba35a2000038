"""What a search found, and what anything searchable can be asked: the words that search, limits and tail share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from index_store.types import Side

ABSENT_SCORE = np.float32(-np.inf)


@dataclass(frozen=True, slots=True, eq=False)
class Hits:
    """Rows found, best first. rows: (B, K) int64, -1 = none.  scores: (B, K) float32, inner product."""

    rows: np.ndarray
    scores: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """(B, K) bool, True where a row was found."""
        return self.rows >= 0


class Segment(Protocol):
    """Consecutive rows of a memory: a shard on disk, or the tail of edits in memory."""

    @property
    def pairs(self) -> int:
        """N of this part."""

    @property
    def ids(self) -> np.ndarray:
        """(N,) int64 or UTF-8 bytes."""

    @property
    def values(self) -> dict[Side, np.ndarray]:
        """Per side (N, D) float16."""

    @property
    def keys(self) -> dict[Side, np.ndarray]:
        """Per side (N, Dk) float16."""

    def record(self, row: int) -> dict[str, Any]:
        """The caption and metadata of one row."""


class SideIndex(Protocol):
    """One side of a memory as one search, with or without edits on top.

    rows: how many are numbered; pairs: how many of them are there, the others being dead (replaced or deleted).
    """

    @property
    def side(self) -> Side:
        """What it compares."""

    @property
    def width(self) -> int:
        """Dk."""

    @property
    def rows(self) -> int:
        """Numbered rows, the dead among them."""

    @property
    def pairs(self) -> int:
        """Rows that are alive."""

    def alive(self, rows: np.ndarray) -> np.ndarray:
        """Bool of the same shape, True where a row lives.  rows: int64, all present."""

    def search(self, queries: np.ndarray, k: int, probes: int) -> Hits:
        """What the indexes find, dead rows included."""

    def scan(self, queries: np.ndarray, k: int, ceiling: np.ndarray | None = None) -> Hits:
        """The exact k best living rows at or below a ceiling per query."""

    def take(self, rows: np.ndarray, column: Callable[[Segment], np.ndarray]) -> np.ndarray:
        """(R, …) the rows of one column, wherever they lie."""

    def place(self, row: int) -> tuple[Segment, int]:
        """The part that holds a row, and the row's number there."""


def top_k(rows: np.ndarray, scores: np.ndarray, k: int) -> Hits:
    """The k highest scores of each row, highest first; among equals the lowest row number."""
    if scores.shape[1] > 4 * k:  # partition first: sorting a whole block costs ten times the product itself
        first = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        first.sort(axis=1)
        rows, scores = np.take_along_axis(rows, first, axis=1), np.take_along_axis(scores, first, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return Hits(np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1))
