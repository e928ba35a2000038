"""Zero-shot scoring: the best labels of each vector with their softmax scores, exact, in blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Ranked", "rank"]

BLOCK_SCORES = 2**22  # scores held at a time: 16 MB, or 1 000 000 labels of four rows


@dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """The best labels of B vectors.

    labels: (B, k) int, the best first.  scores: (B, k) float32, softmax over all labels, returned
    or not.
    """

    labels: np.ndarray
    scores: np.ndarray


def rank(vectors: np.ndarray, candidates: np.ndarray, scale: float, top_k: int) -> Ranked:
    """Return the best top_k labels of each row, at the temperature of the model.

    vectors: (B, D) float32 unit.  candidates: (C, D) float32 unit, C >= 1.  scale: the model's
    logit scale.
    """
    rows = max(1, BLOCK_SCORES // len(candidates))
    blocks = [
        _rank_block(vectors[at : at + rows], candidates, scale, min(top_k, len(candidates)))
        for at in range(0, len(vectors), rows)
    ]
    return Ranked(
        np.concatenate([block.labels for block in blocks]), np.concatenate([block.scores for block in blocks])
    )


def _rank_block(vectors: np.ndarray, candidates: np.ndarray, scale: float, k: int) -> Ranked:
    logits = scale * (vectors @ candidates.T)  # (B, C)
    best = np.argpartition(-logits, k - 1, axis=1)[:, :k]  # (B, k), in any order
    best.sort(axis=1)  # equal scores stay in the order of the labels
    chosen = np.take_along_axis(logits, best, axis=1)  # (B, k)
    order = np.argsort(-chosen, axis=1, kind="stable")
    best, chosen = np.take_along_axis(best, order, axis=1), np.take_along_axis(chosen, order, axis=1)
    logits -= chosen[:, :1]
    np.exp(logits, out=logits)
    total = logits.sum(axis=1, keepdims=True, dtype=np.float64)  # (B, 1)
    return Ranked(best, np.asarray(np.exp(chosen - chosen[:, :1]) / total, np.float32))
