import doctest

import numpy as np
import pytest

from models import metrics
from models.metrics import class_means, ranking, recall_at_k, top_k_accuracy, top_k_hits

SCORES = np.array([[0.9, 0.5, 0.1, 0.3], [0.2, 0.2, 0.8, 0.1], [0.0, 0.1, 0.2, 0.3]])


def test_the_examples_in_the_docstrings() -> None:
    assert doctest.testmod(metrics).failed == 0


def test_ranking_by_hand_ties_to_the_lower_column() -> None:
    np.testing.assert_array_equal(ranking(SCORES, 4), [[0, 1, 3, 2], [2, 0, 1, 3], [3, 2, 1, 0]])
    assert ranking(SCORES, 9).shape == (3, 4)


@pytest.mark.parametrize(("k", "hits"), [(1, [1, 0, 0]), (2, [1, 1, 0]), (3, [1, 1, 0]), (4, [1, 1, 1])])
def test_top_k_by_hand(k: int, hits: list[int]) -> None:
    target = np.array([0, 0, 0])
    np.testing.assert_array_equal(top_k_hits(SCORES, target, k), np.array(hits, bool))
    assert top_k_accuracy(SCORES, target, k) == pytest.approx(sum(hits) / 3)


def test_a_label_never_seen_is_no_hit() -> None:
    scores = np.array([[-np.inf, -np.inf, 0.4]])
    assert not top_k_hits(scores, np.array([0]), 3)[0]
    assert top_k_hits(scores, np.array([2]), 1)[0]


@pytest.mark.parametrize(("k", "share"), [(1, 1 / 3), (2, 2 / 3), (3, 1.0)])
def test_recall_by_hand(k: int, share: float) -> None:
    relevant = np.array([[0, 1, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0]], bool)
    assert recall_at_k(SCORES, relevant, k) == pytest.approx(share)


def test_class_means_by_hand() -> None:
    vectors = np.array([[1, 0], [0, 1], [0, 1]], np.float32)
    means = class_means(vectors, np.array([0, 0, 2]), classes=3)
    np.testing.assert_allclose(means, [[0.5**0.5, 0.5**0.5], [0, 0], [0, 1]], atol=1e-7)
