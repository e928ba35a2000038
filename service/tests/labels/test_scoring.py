from __future__ import annotations

import numpy as np
import pytest

from service.labels import scoring as ranking
from service.labels.scoring import ScoreFunction, rank


def unit(shape: tuple[int, int], seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


@pytest.mark.parametrize(("count", "top_k"), [(1, 5), (7, 7), (3000, 5), (3000, 9000)])
def test_best_labels_and_a_softmax_over_all_of_them(count: int, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # blocks of two rows at 3000 labels, and a last one of one
    monkeypatch.setattr(ranking, "BLOCK_SCORES", 7000)
    vectors, labels = unit((5, 16), 0), unit((count, 16), 1)
    found = rank(vectors, labels, ScoreFunction(30.0), top_k)
    logits = 30.0 * vectors.astype(np.float64) @ labels.T
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = np.argsort(-softmax, axis=1)[:, :top_k]
    np.testing.assert_array_equal(found.labels, expected)
    np.testing.assert_allclose(found.scores, np.take_along_axis(softmax, expected, axis=1), rtol=1e-4)


@pytest.mark.parametrize(("count", "top_k"), [(1, 5), (7, 7), (3000, 5)])
def test_sigmoids_with_a_bias_count_each_label_by_itself(
    count: int, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "BLOCK_SCORES", 7000)
    vectors, labels = unit((5, 16), 0), unit((count, 16), 1)
    found = rank(vectors, labels, ScoreFunction(40.0, -30.0), top_k)
    sigmoids = 1 / (1 + np.exp(30.0 - 40.0 * vectors.astype(np.float64) @ labels.T))
    expected = np.argsort(-sigmoids, axis=1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(found.labels, expected)
    np.testing.assert_allclose(found.scores, np.take_along_axis(sigmoids, expected, axis=1), rtol=1e-3, atol=1e-30)


def test_equal_scores_keep_the_order_of_the_labels() -> None:
    same = np.repeat(unit((1, 8), 0), 6, axis=0)
    found = rank(same[:1], same, ScoreFunction(100.0), 6)
    np.testing.assert_array_equal(found.labels, [range(6)])
    np.testing.assert_allclose(found.scores, 1 / 6, rtol=1e-5)
