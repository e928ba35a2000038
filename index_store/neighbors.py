"""Neighbors: the result of a search, one row per query."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Neighbors:
    """The K nearest pairs of B queries, nearest first; absent neighbours come after present ones.

    ids: (B, K) int64 or str, 0 or "" where absent.  scores: (B, K) float32 inner products, 0 where
    absent.  values: (B, K, D) float32, by default the OTHER side's vectors, zeros where absent.
    mask: (B, K) bool, True = present.
    A Neighbors keeps its snapshot open, because `records` reads captions from disk on demand.
    """

    ids: np.ndarray
    scores: np.ndarray
    values: np.ndarray
    mask: np.ndarray
    _rows: np.ndarray = field(repr=False)  # (B, K) int64 row numbers in the snapshot
    _read_record: Callable[[int], dict[str, Any]] = field(repr=False)  # by row number

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, i: int) -> "Neighbors":
        """The neighbours of query i alone: B = 1."""
        one = slice(i, i + 1)
        return Neighbors(
            self.ids[one], self.scores[one], self.values[one], self.mask[one], self._rows[one], self._read_record
        )

    def concatenate(self, others: "Neighbors") -> "Neighbors":
        """(B, K1 + K2): these, then others found by the same queries in the same snapshot."""

        def join(name: str) -> np.ndarray:
            return np.concatenate([getattr(self, name), getattr(others, name)], axis=1)

        return Neighbors(join("ids"), join("scores"), join("values"), join("mask"), join("_rows"), self._read_record)

    def records(self, b: int) -> list[dict[str, Any]]:
        """{"id", "caption", user metadata} of each present neighbour of query b, read from disk."""
        present = self.mask[b]
        found = zip(self.ids[b][present].tolist(), self._rows[b][present].tolist(), strict=True)
        return [{"id": name, **self._read_record(row)} for name, row in found]
