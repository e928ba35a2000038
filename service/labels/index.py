"""A FAISS index over a long list of labels, with an estimate of the softmax over all of them.

The nearest labels count with their own scores; a random sample stands for the rest. The scores of
a sigmoid need no sum over the labels. Shapes: B
batch, C labels, D width, F found, S sampled.
"""

from __future__ import annotations

import math
from typing import Any

import faiss
import numpy as np

from service.labels.scoring import Ranked, ScoreFunction, sigmoid

__all__ = ["LabelIndex"]

MIN_FOUND = 1024  # labels that enter the softmax themselves; at CLIP's temperature, most of its sum
SAMPLE_SIZE = 16384  # labels that stand for all others; 2 ms for one item at D = 512
TRAIN_ROWS_PER_LIST = 40  # FAISS warns below 39
PROBE_QUERIES = 256  # made queries on which the number of probed lists is chosen
MIN_SOFTMAX_MASS = 0.98  # of the ten best labels, to be found on average; real photos are easier
QUERY_COSINE = 0.3  # of a made query with its label, as CLIP's photos have with their captions
BLOCK_ROWS = 64  # items scored together


class LabelIndex:
    """An inverted-file index of the labels at half precision, and a sample of their vectors.

    Immutable; `rank` may run in several threads at once.

    index: a faiss.IndexIVF.  lists: how many of its lists are probed for each item.
    """

    def __init__(self, index: Any, lists: int, sampled: np.ndarray, rows: np.ndarray) -> None:
        self._index, self.lists = index, lists
        self._sampled, self._rows = sampled, rows  # (S,) ascending, and (S, D)

    @classmethod
    def build(cls, rows: np.ndarray, scale: float) -> LabelIndex | None:
        """Index the labels; None where so many lists must be probed that scoring all labels is as
        fast.

        rows: (C, D) float32 unit.  scale: the model's logit scale, which says how much a missed
        label counts.
        """
        count, dim = rows.shape
        rng = np.random.default_rng(0)
        lists = 1 << math.isqrt(count).bit_length()
        index: Any = faiss.index_factory(dim, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
        index.train(rows[np.sort(rng.permutation(count)[: TRAIN_ROWS_PER_LIST * lists])])
        index.add(rows)
        sampled = np.sort(rng.permutation(count)[:SAMPLE_SIZE])
        probed = _choose_lists(index, rows, scale, rng)
        return None if probed is None else cls(index, probed, sampled, rows[sampled])

    @property
    def nbytes(self) -> int:
        """Bytes held in memory, without the bookkeeping of the lists."""
        return int(self._index.ntotal * (2 * self._index.d + 8)) + self._rows.nbytes

    def rank(self, vectors: np.ndarray, function: ScoreFunction, top_k: int) -> Ranked:
        """Return the best top_k labels of each row; a softmax over all labels is estimated.

        vectors: (B, D) float32 unit.  With top_k above MIN_FOUND every list is searched.
        """
        blocks = [
            self._rank_block(vectors[at : at + BLOCK_ROWS], function, min(top_k, self._index.ntotal))
            for at in range(0, len(vectors), BLOCK_ROWS)
        ]
        return Ranked(
            np.concatenate([block.labels for block in blocks]), np.concatenate([block.scores for block in blocks])
        )

    def _rank_block(self, vectors: np.ndarray, function: ScoreFunction, k: int) -> Ranked:
        depth = min(max(MIN_FOUND, k), self._index.ntotal)
        similarities, found = _search(
            self._index, vectors, depth, self._index.nlist if k > MIN_FOUND else self.lists
        )  # (B, F) each
        logits = function.scale * np.where(found >= 0, similarities, -np.inf)
        # equal scores stay in the order of the labels
        order = np.lexsort((found, -logits), axis=1)[:, :k]
        if function.bias is not None:
            chosen = np.take_along_axis(logits, order, axis=1)  # (B, k)
            return Ranked(np.take_along_axis(found, order, axis=1), sigmoid(chosen + function.bias))
        best = logits[:, :1]  # (B, 1)
        total = np.exp(logits - best).sum(axis=1, dtype=np.float64) + self._estimate_rest(
            vectors, found, function.scale, best
        )  # (B,)
        scores = np.exp(np.take_along_axis(logits, order, axis=1) - best) / total[:, None]
        return Ranked(np.take_along_axis(found, order, axis=1), np.asarray(scores, np.float32))

    def _estimate_rest(self, vectors: np.ndarray, found: np.ndarray, scale: float, best: np.ndarray) -> np.ndarray:
        """(B,) the part of the softmax's sum that labels not found contribute.

        It is the mean over those in the sample, times how many labels were not found.
        """
        weights = np.exp(scale * (vectors @ self._rows.T) - best)  # (B, S)
        # (B, S)
        not_found = np.stack([~np.isin(self._sampled, one, assume_unique=True) for one in found])
        left = self._index.ntotal - (found >= 0).sum(axis=1)  # (B,)
        counted = not_found.sum(axis=1)
        mean = (weights * not_found).sum(axis=1, dtype=np.float64) / np.maximum(counted, 1)
        return np.asarray(mean * left)


def _search(index: Any, vectors: np.ndarray, k: int, lists: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, k) similarities and labels, -1 where fewer were found."""
    parameters: Any = faiss.SearchParametersIVF
    scores, labels = index.search(np.ascontiguousarray(vectors), k, params=parameters(nprobe=lists))
    return scores, labels


def _choose_lists(index: Any, rows: np.ndarray, scale: float, rng: np.random.Generator) -> int | None:
    """The fewest lists, doubled from 8, whose search holds MIN_SOFTMAX_MASS of the ten best labels.

    None where more than half of all lists would be needed.
    """
    noise = rng.standard_normal((PROBE_QUERIES, rows.shape[1])).astype(np.float32)
    noise *= math.sqrt(1 / QUERY_COSINE**2 - 1) / np.linalg.norm(noise, axis=1, keepdims=True)
    labels = rows[rng.permutation(len(rows))[:PROBE_QUERIES]]
    queries = labels + noise[: len(labels)]
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    exact, _ = _search(index, queries, 10, index.nlist)  # (PROBE_QUERIES, 10)
    weight = np.exp(scale * (exact - exact[:, :1])).sum(axis=1)
    lists = 8
    while lists <= index.nlist // 2:
        near, _ = _search(index, queries, 10, lists)
        if float((np.exp(scale * (near - exact[:, :1])).sum(axis=1) / weight).mean()) >= MIN_SOFTMAX_MASS:
            return lists
        lists *= 2
    return None
