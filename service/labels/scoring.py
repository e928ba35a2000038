"""Vectors against labels -> the best labels and their probabilities: exact, block by block, so that a million labels need no index."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Ranked", "rank"]

BLOCK = 2**22  # scores held at a time: 16 MB, and 1 000 000 labels for four rows


@dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """labels: (B, k) int, the best first.  scores: (B, k) float32, their share of a softmax over *all* labels, returned or not."""

    labels: np.ndarray
    scores: np.ndarray


def rank(vectors: np.ndarray, candidates: np.ndarray, scale: float, top_k: int) -> Ranked:
    """The best top_k labels of each row, at the model's own temperature.

    vectors: (B, D) float32 unit.  candidates: (C, D) float32 unit, C >= 1.  scale: the model's logit scale.
    """
    rows = max(1, BLOCK // len(candidates))
    blocks = [
        _block(vectors[at : at + rows], candidates, scale, min(top_k, len(candidates)))
        for at in range(0, len(vectors), rows)
    ]
    return Ranked(
        np.concatenate([block.labels for block in blocks]), np.concatenate([block.scores for block in blocks])
    )


def _block(vectors: np.ndarray, candidates: np.ndarray, scale: float, k: int) -> Ranked:
    logits = scale * (vectors @ candidates.T)  # (B, C)
    some = np.argpartition(-logits, k - 1, axis=1)[:, :k]  # (B, k), the best in any order
    some.sort(axis=1)  # equal scores stay in the order of the labels
    chosen = np.take_along_axis(logits, some, axis=1)  # (B, k)
    order = np.argsort(-chosen, axis=1, kind="stable")
    best, chosen = np.take_along_axis(some, order, axis=1), np.take_along_axis(chosen, order, axis=1)
    logits -= chosen[:, :1]
    np.exp(logits, out=logits)
    whole = logits.sum(axis=1, keepdims=True, dtype=np.float64)  # (B, 1)
    return Ranked(best, np.asarray(np.exp(chosen - chosen[:, :1]) / whole, np.float32))
