"""What a search found, one row per caller."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Neighbors:
    """The K nearest pairs of B queries, nearest first, the present ones before the absent ones.

    ids: (B, K) int64 or str, 0 or "" where absent.  scores: (B, K) float32 inner products, 0 where absent.
    values: (B, K, D) float32, the OTHER side's vectors, zeros where absent.  mask: (B, K) bool, True = present.
    It keeps its snapshot alive, because captions are read from disk only when asked for.
    """

    ids: np.ndarray
    scores: np.ndarray
    values: np.ndarray
    mask: np.ndarray
    _rows: np.ndarray = field(repr=False)  # (B, K) int64, where the records lie; nobody else's business
    _record: Callable[[int], dict[str, Any]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, i: int) -> "Neighbors":
        """The same for one caller: B = 1."""
        one = slice(i, i + 1)
        return Neighbors(
            self.ids[one], self.scores[one], self.values[one], self.mask[one], self._rows[one], self._record
        )

    def concatenate(self, others: "Neighbors") -> "Neighbors":
        """These, then others found by the same queries in the same snapshot."""

        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(self, name), getattr(others, name)], axis=1)

        return Neighbors(
            joined("ids"), joined("scores"), joined("values"), joined("mask"), joined("_rows"), self._record
        )

    def records(self, b: int) -> list[dict[str, Any]]:
        """{"id", "caption", and the user's metadata} of each present neighbour of caller b, read from disk now."""
        present = self.mask[b]
        found = zip(self.ids[b][present].tolist(), self._rows[b][present].tolist(), strict=True)
        return [{"id": name, **self._record(row)} for name, row in found]
