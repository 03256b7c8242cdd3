"""Zero-shot and prototypes against a plain loop; the linear probe against another solver."""

import sys

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp

from invariclip.calibrate.projection.classifiers import (
    PUBLISHED_C,
    choose_penalty,
    fit_probe,
    prototypes,
    unit,
    zero_shot,
)
from invariclip.errors import InputError, MissingExtraError


def test_zero_shot_is_the_nearest_class():
    rng = np.random.default_rng(0)
    images, bank, labels = unit(rng.normal(size=(50, 5))), unit(rng.normal(size=(7, 5))), rng.integers(0, 7, 50)
    expected = [
        max(range(7), key=lambda k: float(image @ bank[k])) == label
        for image, label in zip(images, labels, strict=True)
    ]
    assert zero_shot(images, labels, bank).tolist() == expected


def test_prototypes_are_class_means():
    support = unit(np.array([[1.0, 0.1], [1.0, -0.1], [0.1, 1.0], [-0.1, 1.0]]))
    queries = unit(np.array([[1.0, 0.2], [0.2, 1.0], [1.0, 0.0]]))
    answers = prototypes(support, np.array([4, 4, 9, 9]), queries, np.array([4, 9, 9]))
    assert answers.tolist() == [True, True, False]


def test_a_class_without_support_is_wrong_not_an_error():
    support = unit(np.array([[1.0, 0.0], [0.0, 1.0]]))
    assert prototypes(support, np.array([0, 1]), support, np.array([0, 5])).tolist() == [True, False]


def test_cancelling_support_never_wins():
    support = np.array([[1.0, 0.0], [-1.0, 0.0], [0.6, 0.8]])
    answers = prototypes(support, np.array([0, 0, 1]), np.array([[1.0, 0.0]]), np.array([1]))
    assert answers.tolist() == [True]


def test_no_support():
    with pytest.raises(InputError, match="support"):
        prototypes(np.empty((0, 2)), np.empty(0, dtype=int), np.ones((1, 2)), np.zeros(1, dtype=int))


def clusters(*, classes=3, count=90, width=6, noise=0.6, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    return unit(rng.normal(size=(classes, width))[labels] + noise * rng.normal(size=(count, width))), labels


def reference(vectors, labels, C):
    """Minimises C · Σ cross-entropy + ½ ‖W‖² by another solver."""
    classes, width = labels.max() + 1, vectors.shape[1]

    def loss(flat):
        weights, bias = flat[: classes * width].reshape(classes, width), flat[classes * width :]
        scores = vectors @ weights.T + bias
        entropy = logsumexp(scores, axis=1) - scores[np.arange(len(labels)), labels]
        return C * entropy.sum() + 0.5 * (weights**2).sum()

    return minimize(loss, np.zeros(classes * (width + 1)), method="BFGS", options={"gtol": 1e-7}).x


def test_it_minimises_the_stated_loss():
    vectors, labels = clusters()
    probe = fit_probe(vectors, labels)
    expected = reference(vectors, labels, PUBLISHED_C)
    assert probe.C == PUBLISHED_C == 0.316
    np.testing.assert_allclose(probe.weights.ravel(), expected[: probe.weights.size], atol=2e-3)


def test_two_classes_have_a_row_each():
    vectors, labels = clusters(classes=2)
    probe = fit_probe(vectors, labels + 5, C=10.0)
    assert probe.weights.shape == (2, 6)
    assert probe.classes.tolist() == [5, 6]
    assert probe.correct(vectors, labels + 5).mean() > 0.8


def test_an_unknown_class_counts_as_wrong_and_equal_runs_are_equal():
    vectors, labels = clusters()
    first, second = fit_probe(vectors, labels), fit_probe(vectors.copy(), labels.copy())
    assert np.array_equal(first.weights, second.weights)
    assert not first.correct(vectors[:5], np.full(5, -1)).any()


def test_turning_the_axes_changes_no_answer():
    """Why selection may score in an estimator's axes."""
    vectors, labels = clusters(seed=3)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    queries = clusters(seed=3, noise=1.0)[0]
    same = fit_probe(vectors, labels).predict(queries) == fit_probe(vectors @ turn, labels).predict(queries @ turn)
    assert same.mean() > 0.98


def test_the_penalty_is_chosen_on_the_environment_left_out():
    """A weak signal in many directions of noise: a weak penalty learns the noise, and only a left-out image tells."""
    rng = np.random.default_rng(0)
    labels, environments = np.arange(150) % 2, np.repeat(np.arange(3), 50)
    vectors = rng.normal(size=(150, 60))
    vectors[:, 0] += 2.0 * labels - 1
    grid = (100.0, 1.0, 0.003)
    by_hand = []
    for C in grid:
        scores = [
            fit_probe(vectors[environments != e], labels[environments != e], C)
            .correct(vectors[environments == e], labels[environments == e])
            .mean()
            for e in range(3)
        ]
        by_hand.append(np.mean(scores))
    assert len(set(by_hand)) > 1
    assert choose_penalty(vectors, labels, environments, grid) == grid[int(np.argmax(by_hand))]


def test_of_equally_good_ones_the_smallest_is_taken():
    vectors, labels = clusters(noise=0.01)
    assert choose_penalty(vectors, labels, np.arange(90) // 30, (10.0, 1.0, 3.0)) == 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v, y: (v, np.zeros_like(y), 1.0), "two classes or more"),
        (lambda v, y: (v, y, 0.0), "C must be"),
        (lambda v, y: (v, y, float("nan")), "C must be"),
        (lambda v, y: (np.where(v == v.max(), np.nan, v), y, 1.0), "not finite"),
    ],
)
def test_what_cannot_be_fitted_is_said(change, said):
    with pytest.raises(InputError, match=said):
        fit_probe(*change(*clusters()))


def test_one_environment_cannot_choose():
    vectors, labels = clusters()
    with pytest.raises(InputError, match="only one; give C"):
        choose_penalty(vectors, labels, np.zeros(90))


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingExtraError, match=r'pip install "invariclip\[calibrate\]"'):
        fit_probe(*clusters())
