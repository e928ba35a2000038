"""A hundred thousand labels and more, searched by FAISS: the nearest by their own scores, the rest of the softmax from a sample.

Alphabet: B batch, C labels, D width, F found, S sampled.
"""

from __future__ import annotations

import math
from typing import Any

import faiss
import numpy as np

from service.labels.scoring import Ranked

__all__ = ["LabelIndex"]

FOUND = 1024  # labels whose own scores enter the softmax: at CLIP's temperature they hold most of it
SAMPLED = 16384  # labels that speak for all the others; 2 ms for one item of 512 numbers
TRAINED = 40  # rows per list that FAISS learns from; it warns below 39
PROBES = 256  # questions that the number of probed lists is settled on
SURE = 0.98  # of the softmax over the ten best that must be found on average; photos are easier, since their noise is none in all directions
LIKENESS = 0.3  # cosine of such a question with its label, as CLIP's photos have with their captions
AT_ONCE = 64  # items scored together


class LabelIndex:
    """The labels in lists, at half precision, and a sample of them. Immutable, and `rank` may run in several threads at once.

    index: a faiss.IndexIVF.  lists: of it, probed for each item.
    """

    def __init__(self, index: Any, lists: int, sampled: np.ndarray, rows: np.ndarray) -> None:
        self._index, self.lists = index, lists
        self._sampled, self._rows = sampled, rows  # (S,) ascending, and (S, D)

    @classmethod
    def build(cls, rows: np.ndarray, scale: float) -> LabelIndex | None:
        """Index the labels, or None where so many lists would have to be probed that scoring them all is as well.

        rows: (C, D) float32 unit.  scale: the model's logit scale, by which a label that is missed counts.
        """
        count, dim = rows.shape
        rng = np.random.default_rng(0)
        lists = 1 << math.isqrt(count).bit_length()
        index: Any = faiss.index_factory(dim, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
        index.train(rows[np.sort(rng.permutation(count)[: TRAINED * lists])])
        index.add(rows)
        sampled = np.sort(rng.permutation(count)[:SAMPLED])
        probed = _settled(index, rows, scale, rng)
        return None if probed is None else cls(index, probed, sampled, rows[sampled])

    @property
    def nbytes(self) -> int:
        """Held in memory, the lists' own bookkeeping left out."""
        return int(self._index.ntotal * (2 * self._index.d + 8)) + self._rows.nbytes

    def rank(self, vectors: np.ndarray, scale: float, top_k: int) -> Ranked:
        """The best top_k labels of each row, their scores a softmax over all labels: found ones count as they are, the rest by the sample.

        vectors: (B, D) float32 unit.  Where more than FOUND labels are asked for, every list is looked through.
        """
        blocks = [
            self._block(vectors[at : at + AT_ONCE], scale, min(top_k, self._index.ntotal))
            for at in range(0, len(vectors), AT_ONCE)
        ]
        return Ranked(
            np.concatenate([block.labels for block in blocks]), np.concatenate([block.scores for block in blocks])
        )

    def _block(self, vectors: np.ndarray, scale: float, k: int) -> Ranked:
        deep = min(max(FOUND, k), self._index.ntotal)
        similarities, found = _searched(
            self._index, vectors, deep, self._index.nlist if k > FOUND else self.lists
        )  # (B, F) each
        logits = scale * np.where(found >= 0, similarities, -np.inf)
        best = logits[:, :1]  # (B, 1)
        whole = np.exp(logits - best).sum(axis=1, dtype=np.float64) + self._rest(vectors, found, scale, best)  # (B,)
        order = np.lexsort((found, -logits), axis=1)[:, :k]  # equal scores stay in the order of the labels
        scores = np.exp(np.take_along_axis(logits, order, axis=1) - best) / whole[:, None]
        return Ranked(np.take_along_axis(found, order, axis=1), np.asarray(scores, np.float32))

    def _rest(self, vectors: np.ndarray, found: np.ndarray, scale: float, best: np.ndarray) -> np.ndarray:
        """(B,) what the labels that were not found add to the softmax's sum: the mean of those in the sample, times how many there are."""
        weights = np.exp(scale * (vectors @ self._rows.T) - best)  # (B, S)
        unseen = np.stack([~np.isin(self._sampled, one, assume_unique=True) for one in found])  # (B, S)
        left = self._index.ntotal - (found >= 0).sum(axis=1)  # (B,)
        counted = unseen.sum(axis=1)
        mean = (weights * unseen).sum(axis=1, dtype=np.float64) / np.maximum(counted, 1)
        return np.asarray(mean * left)


def _searched(index: Any, vectors: np.ndarray, k: int, lists: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, k) similarities and labels, -1 where fewer were found."""
    parameters: Any = faiss.SearchParametersIVF
    scores, labels = index.search(np.ascontiguousarray(vectors), k, params=parameters(nprobe=lists))
    return scores, labels


def _settled(index: Any, rows: np.ndarray, scale: float, rng: np.random.Generator) -> int | None:
    """The fewest lists, doubled from 8 on, whose search holds SURE of what the ten best weigh; None beyond half of all."""
    noise = rng.standard_normal((PROBES, rows.shape[1])).astype(np.float32)
    noise *= math.sqrt(1 / LIKENESS**2 - 1) / np.linalg.norm(noise, axis=1, keepdims=True)
    asked = rows[rng.permutation(len(rows))[:PROBES]]
    questions = asked + noise[: len(asked)]
    questions /= np.linalg.norm(questions, axis=1, keepdims=True)
    exact, _ = _searched(index, questions, 10, index.nlist)  # (PROBES, 10)
    weight = np.exp(scale * (exact - exact[:, :1])).sum(axis=1)
    lists = 8
    while lists <= index.nlist // 2:
        near, _ = _searched(index, questions, 10, lists)
        if float((np.exp(scale * (near - exact[:, :1])).sum(axis=1) / weight).mean()) >= SURE:
            return lists
        lists *= 2
    return None
