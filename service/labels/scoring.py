"""Zero-shot scoring: the best labels of each vector with their scores, exact, in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["Ranked", "ScoreFunction", "rank", "sigmoid"]

BLOCK_SCORES = 2**22  # scores held at a time: 16 MB, or 1 000 000 labels of four rows


@dataclass(frozen=True, slots=True)
class ScoreFunction:
    """How similarities become scores, as in the model's training.

    scale: the model's logit scale.
    bias: the logit bias of a model trained with a sigmoid loss (SigLIP); None for CLIP.
    """

    scale: float
    bias: float | None = None

    @property
    def name(self) -> Literal["softmax", "sigmoid"]:
        """A softmax over all labels, or of each label the sigmoid of scale * similarity + bias."""
        return "softmax" if self.bias is None else "sigmoid"


@dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """The best labels of B vectors.

    labels: (B, k) int, the best first.
    scores: (B, k) float32. Of a softmax over all labels, returned or not, or a probability of each
    label by itself.
    """

    labels: np.ndarray
    scores: np.ndarray


def rank(vectors: np.ndarray, candidates: np.ndarray, function: ScoreFunction, top_k: int) -> Ranked:
    """Return the best top_k labels of each row with their scores.

    vectors: (B, D) float32 unit.  candidates: (C, D) float32 unit, C >= 1.
    """
    rows = max(1, BLOCK_SCORES // len(candidates))
    blocks = [
        _rank_block(vectors[at : at + rows], candidates, function, min(top_k, len(candidates)))
        for at in range(0, len(vectors), rows)
    ]
    return Ranked(
        np.concatenate([block.labels for block in blocks]), np.concatenate([block.scores for block in blocks])
    )


def _rank_block(vectors: np.ndarray, candidates: np.ndarray, function: ScoreFunction, k: int) -> Ranked:
    logits = function.scale * (vectors @ candidates.T)  # (B, C)
    best = np.argpartition(-logits, k - 1, axis=1)[:, :k]  # (B, k), in any order
    best.sort(axis=1)  # equal scores stay in the order of the labels
    chosen = np.take_along_axis(logits, best, axis=1)  # (B, k)
    order = np.argsort(-chosen, axis=1, kind="stable")
    best, chosen = np.take_along_axis(best, order, axis=1), np.take_along_axis(chosen, order, axis=1)
    if function.bias is not None:
        return Ranked(best, sigmoid(chosen + function.bias))
    logits -= chosen[:, :1]
    np.exp(logits, out=logits)
    total = logits.sum(axis=1, keepdims=True, dtype=np.float64)  # (B, 1)
    return Ranked(best, np.asarray(np.exp(chosen - chosen[:, :1]) / total, np.float32))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logits)) as float32, without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0, -logits)), np.float32)
