"""How good a ranking is: pure functions of arrays, ties going to the lower column."""

import numpy as np


def ranking(scores: np.ndarray, k: int) -> np.ndarray:
    """(B, min(k, N)) int64: the best columns of each row, best first.

    scores: (B, N) float, greater = nearer.
    >>> ranking(np.array([[.1, .9, .5]]), k=2)
    array([[1, 2]])
    """
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def top_k_hits(scores: np.ndarray, target: np.ndarray, k: int) -> np.ndarray:
    """(B,) bool: whether the target is among the k best; a score of -inf, for "never seen", is no hit.

    scores: (B, N) float.  target: (B,) int, the right column of each row.
    """
    seen = np.take_along_axis(scores, target[:, None], axis=1)[:, 0] > -np.inf
    return np.asarray((ranking(scores, k) == target[:, None]).any(axis=1) & seen)


def top_k_accuracy(scores: np.ndarray, target: np.ndarray, k: int) -> float:
    """Share of rows whose target is among the k best.

    >>> top_k_accuracy(np.array([[.9, .1], [.8, .2]]), np.array([0, 1]), k=1)
    0.5
    """
    return float(top_k_hits(scores, target, k).mean())


def recall_at_k(scores: np.ndarray, relevant: np.ndarray, k: int) -> float:
    """Share of queries with at least one relevant item among the k best, as retrieval papers report R@k.

    scores: (B, N) float.  relevant: (B, N) bool; a photo with five captions has five relevant columns.
    >>> recall_at_k(np.array([[.9, .5, .1], [.9, .5, .1]]), np.array([[False, True, True], [False, False, True]]), k=2)
    0.5
    """
    best = ranking(scores, k)  # (B, k)
    return float(np.take_along_axis(relevant, best, axis=1).any(axis=1).mean())


def class_means(vectors: np.ndarray, target: np.ndarray, classes: int) -> np.ndarray:
    """(C, D) float32 unit: the mean direction of each class; zeros for a class without any row.

    vectors: (N, D) unit.  target: (N,) int in 0…C-1.
    """
    sums = np.zeros((classes, vectors.shape[1]), np.float32)
    np.add.at(sums, target, vectors.astype(np.float32))
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return sums / np.where(lengths > 0, lengths, 1)
