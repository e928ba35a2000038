import doctest

import numpy as np
import pytest

from models.evaluation import metrics
from models.evaluation.metrics import (
    class_means,
    harmonic_mean,
    hubness,
    paired_interval,
    ranking,
    recall_at_k,
    share_per_class,
    top_k_accuracy,
    top_k_hits,
    worst_pairs,
)

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


def test_harmonic_mean_is_zero_where_one_side_fails() -> None:
    assert harmonic_mean(0.2, 0.6) == pytest.approx(0.3)
    assert harmonic_mean(0.0, 0.6) == 0.0


def test_share_per_class_of_a_hand_made_table() -> None:
    shares = share_per_class(np.array([True, False, True, True]), np.array([0, 0, 2, 2]), 3)
    np.testing.assert_array_equal(shares, [0.5, np.nan, 1.0])


def test_the_most_frequent_confusion_comes_first() -> None:
    target, guessed = np.array([0, 1, 1, 1, 2, 2]), np.array([0, 2, 2, 0, 2, 1])
    assert worst_pairs(guessed, target, most=2) == [(1, 2, 2), (1, 0, 1)]
    assert worst_pairs(target, target, most=2) == []


def test_the_interval_of_a_paired_gain() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(1000) < 0.3
    same = paired_interval(before, before)
    assert same == (0.0, 0.0)  # paired: the spread of the queries themselves does not matter
    after = before.copy()
    after[np.flatnonzero(~before)[:50]] = (
        True  # 50 of 1000 won, none lost: a binomial of mean 0.05 and deviation 0.0069
    )
    low, high = paired_interval(before, after)
    assert low == pytest.approx(0.05 - 1.96 * 0.0069, abs=0.002)
    assert high == pytest.approx(0.05 + 1.96 * 0.0069, abs=0.002)


def test_a_hub_loses_its_bias() -> None:
    """Candidate 0 is near everything: it wins every query until its mean nearness to reference
    queries is taken away.
    """
    scores = np.array([[0.8, 0.7, 0.1], [0.8, 0.1, 0.7]])
    reference = np.array([[0.9, 0.5, 0.2], [0.9, 0.3, 0.6], [0.7, 0.1, 0.1]])
    bias = hubness(reference, nearest=2)
    np.testing.assert_allclose(bias, [0.9, 0.4, 0.4])
    assert scores.argmax(1).tolist() == [0, 0]
    assert (scores - bias).argmax(1).tolist() == [1, 2]
