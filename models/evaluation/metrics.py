"""Ranking metrics as pure functions of arrays; ties go to the lower column."""

import numpy as np


def ranking(scores: np.ndarray, k: int) -> np.ndarray:
    """(B, min(k, N)) int64: the best columns of each row, best first.

    scores: (B, N) float, greater = nearer.
    >>> ranking(np.array([[.1, .9, .5]]), k=2)
    array([[1, 2]])
    """
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def top_k_hits(scores: np.ndarray, target: np.ndarray, k: int) -> np.ndarray:
    """(B,) bool: whether the target is among the k best. A score of -inf is never a hit.

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


def recall_hits(scores: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """(B,) bool: whether at least one relevant item is among the k best.

    scores, relevant: as in `recall_at_k`.
    """
    return np.asarray(np.take_along_axis(relevant, ranking(scores, k), axis=1).any(axis=1))


def recall_at_k(scores: np.ndarray, relevant: np.ndarray, k: int) -> float:
    """Share of queries with at least one relevant item among the k best, as retrieval papers report
    R@k.

    scores: (B, N) float.  relevant: (B, N) bool; a photo with five captions has five relevant
    columns.
    >>> relevant = np.array([[False, True, True], [False, False, True]])
    >>> recall_at_k(np.array([[.9, .5, .1], [.9, .5, .1]]), relevant, k=2)
    0.5
    """
    return float(recall_hits(scores, relevant, k).mean())


def class_means(vectors: np.ndarray, target: np.ndarray, classes: int) -> np.ndarray:
    """(C, D) float32 unit: the mean direction of each class; zeros for a class without any row.

    vectors: (N, D) unit.  target: (N,) int in 0…C-1.
    """
    sums = np.zeros((classes, vectors.shape[1]), np.float32)
    np.add.at(sums, target, vectors.astype(np.float32))
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return sums / np.where(lengths > 0, lengths, 1)


def harmonic_mean(one: float, another: float) -> float:
    """0 where either is 0.

    >>> harmonic_mean(0.25, 0.75)
    0.375
    """
    return 2 * one * another / (one + another) if one > 0 and another > 0 else 0.0


def share_per_class(right: np.ndarray, target: np.ndarray, classes: int) -> np.ndarray:
    """(C,) float: the share of each class's rows that is right, NaN for a class without any row.

    right: (B,) bool.  target: (B,) int in 0…C-1.
    >>> share_per_class(np.array([True, False, True]), np.array([0, 0, 2]), classes=3)
    array([0.5, nan, 1. ])
    """
    rows = np.bincount(target, minlength=classes)
    hits = np.bincount(target, weights=right, minlength=classes)
    return np.asarray(np.divide(hits, rows, out=np.full(classes, np.nan), where=rows > 0))


def worst_pairs(guessed: np.ndarray, target: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """(true class, guessed class, how often), the most frequent confusions first.

    guessed, target: (B,) int.
    >>> worst_pairs(np.array([1, 1, 0, 2]), np.array([0, 0, 1, 2]), most=5)
    [(0, 1, 2), (1, 0, 1)]
    """
    wrong = guessed != target
    pairs, times = np.unique(np.stack([target[wrong], guessed[wrong]], 1), axis=0, return_counts=True)
    order = np.argsort(-times, kind="stable")[:most]
    return [(int(pairs[i, 0]), int(pairs[i, 1]), int(times[i])) for i in order]


def paired_interval(before: np.ndarray, after: np.ndarray, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of mean(after) - mean(before), resampling queries; both are measured
    on the same queries.

    before, after: (B,) bool or float, one value per query.
    """
    gain = after.astype(np.float64) - before.astype(np.float64)
    values, rows = np.unique(
        gain, return_counts=True
    )  # few distinct gains: a resample of the queries is a draw of their counts
    # (resamples, values)
    draws = np.random.default_rng(seed).multinomial(len(gain), rows / len(gain), size=resamples)
    low, high = np.percentile(draws @ values / len(gain), [2.5, 97.5])
    return float(low), float(high)


def hubness(reference: np.ndarray, nearest: int) -> np.ndarray:
    """(C,) float: mean score of each candidate over its nearest reference queries. NNN subtracts it
    from the scores.

    reference: (R, C) float, scores of reference queries, which are not the evaluated ones.
    >>> hubness(np.array([[.9, .1], [.7, .2], [.1, .3]]), nearest=2)
    array([0.8 , 0.25])
    """
    best = np.sort(reference, axis=0)[::-1][:nearest]  # (nearest, C)
    return np.asarray(best.mean(axis=0))
