"""The index of labels against exact scores over all of them."""

from __future__ import annotations

import numpy as np
import pytest

from service.labels.index import MIN_FOUND, LabelIndex
from service.labels.scoring import ScoreFunction, rank

D, SCALE, COUNT = 192, 60.0, 20_000
SOFTMAX, SIGMOID = ScoreFunction(SCALE), ScoreFunction(SCALE, -20.0)
rng = np.random.default_rng(5)


def unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    """(COUNT, D): families of ten that resemble each other, in forty topics, as the names of things
    do.
    """
    topics, families = (
        rng.standard_normal((40, D)).repeat(COUNT // 40, axis=0),
        rng.standard_normal((COUNT // 10, D)).repeat(10, axis=0),
    )
    return unit(topics + 0.7 * families + 0.5 * rng.standard_normal((COUNT, D)))


@pytest.fixture(scope="module")
def index(labels: np.ndarray) -> LabelIndex:
    made = LabelIndex.build(labels, SCALE)
    assert made is not None
    assert made.lists <= 64  # of 256: not everything is looked through
    return made


@pytest.fixture(scope="module")
def questions(labels: np.ndarray) -> np.ndarray:
    """(60, D), each nearer to one label than to the others, at the distance that photos have from
    captions.
    """
    return unit(labels[rng.permutation(len(labels))[:60]] + 2.0 / np.sqrt(D) * rng.standard_normal((60, D)))


def test_the_best_labels_are_the_exact_ones_and_their_scores_are_calibrated(
    index: LabelIndex, labels: np.ndarray, questions: np.ndarray
) -> None:
    found, exact = index.rank(questions, SOFTMAX, 5), rank(questions, labels, SOFTMAX, 5)
    assert found.labels.shape == found.scores.shape == (60, 5)
    assert (found.labels[:, 0] == exact.labels[:, 0]).mean() >= 0.97
    same = found.labels == exact.labels
    assert same.mean() >= 0.95
    assert np.abs(found.scores - exact.scores)[same].max() < 0.02
    np.testing.assert_allclose(np.median(found.scores[same] / exact.scores[same]), 1, atol=0.02)
    assert (np.diff(found.scores, axis=1) <= 0).all()


def test_sigmoids_are_those_of_an_exact_ranking(index: LabelIndex, labels: np.ndarray, questions: np.ndarray) -> None:
    found, exact = index.rank(questions, SIGMOID, 5), rank(questions, labels, SIGMOID, 5)
    same = found.labels == exact.labels
    assert same.mean() >= 0.95
    np.testing.assert_allclose(found.scores[same], exact.scores[same], rtol=0.05)  # vectors at half precision
    assert found.scores[:, 0].max() > 0.5


def test_the_rest_has_its_share_where_nothing_is_near(index: LabelIndex, labels: np.ndarray) -> None:
    """A flat softmax lies mostly outside of what is found: leaving that out would make scores
    tenfold.
    """
    questions = unit(rng.standard_normal((20, D)))
    flat = ScoreFunction(5.0)
    found, exact = index.rank(questions, flat, 3), rank(questions, labels, flat, 3)
    same = found.labels == exact.labels
    assert same.any()
    np.testing.assert_allclose(found.scores[same], exact.scores[same], rtol=0.05)
    assert MIN_FOUND * exact.scores.max() < 1


def test_more_labels_than_are_looked_at_by_default(
    index: LabelIndex, labels: np.ndarray, questions: np.ndarray
) -> None:
    for top_k in (MIN_FOUND + 1, 40_000):
        found, exact = index.rank(questions[:2], SOFTMAX, top_k), rank(questions[:2], labels, SOFTMAX, top_k)
        assert found.labels.shape == exact.labels.shape
        np.testing.assert_allclose(found.scores[:, :50], exact.scores[:, :50], rtol=0.03)
    assert sorted(found.labels[0].tolist()) == list(range(COUNT))
    assert found.scores.sum(axis=1) == pytest.approx(1, abs=1e-3)


def test_labels_without_any_likeness_are_not_indexed() -> None:
    assert LabelIndex.build(unit(rng.standard_normal((12_000, 512))), SCALE) is None
