"""Figures of an uncertainty against scikit-learn and slow definitions."""

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import entropy
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score

from invariclip.calibrate.prompts import scores as evaluate
from invariclip.errors import InputError


@pytest.fixture
def answers():
    rng = np.random.default_rng(0)
    confidence = np.round(rng.uniform(0.01, 1, 400), 2)  # with ties
    return confidence, rng.uniform(size=400) < confidence**2


def test_the_calibration_error_is_that_of_sklearns_bins(answers):
    confidence, right = answers
    found = evaluate.reliability(confidence - 1e-9, right, bins=10)  # no value on a bin's edge
    accuracy, sure = calibration_curve(right, confidence - 1e-9, n_bins=10)
    counts = np.histogram(confidence - 1e-9, np.linspace(0, 1, 11))[0]
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_allclose(found.accuracy[counts > 0], accuracy)
    np.testing.assert_allclose(found.confidence[counts > 0], sure)
    assert found.error == pytest.approx(np.sum(counts[counts > 0] * np.abs(accuracy - sure)) / 400)


def test_edges_have_a_bin_and_empty_ones_count_nothing():
    found = evaluate.reliability(np.asarray([0.0, 1.0, 1.0]), np.asarray([False, True, True]))
    assert found.error == 0
    assert (found.counts[0], found.counts[-1], found.counts.sum()) == (1, 2, 3)


def test_auroc_is_sklearns_with_ties(answers):
    confidence, right = answers
    assert evaluate.auroc(1 - confidence, ~right) == pytest.approx(roc_auc_score(~right, 1 - confidence))
    assert np.isnan(evaluate.auroc(confidence, np.ones(400, bool)))


def test_risk_coverage_is_the_mean_over_orders_of_ties(answers):
    confidence, right = answers
    curve = evaluate.risk_coverage(1 - confidence, right)
    orders = []
    for seed in range(400):
        shuffled = np.random.default_rng(seed).permutation(400)
        order = shuffled[np.argsort(1 - confidence[shuffled], kind="stable")]
        orders.append(np.cumsum(~right[order]) / np.arange(1, 401))
    np.testing.assert_allclose(curve[20:], np.mean(orders, axis=0)[20:], atol=0.02)
    assert curve[-1] == pytest.approx(1 - right.mean())


def test_plain_uncertainties_are_their_definitions():
    logits = np.random.default_rng(1).normal(0, 30, (20, 7))
    found = evaluate.uncertainties(logits)
    probability = np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
    np.testing.assert_allclose(found["max-softmax"], 1 - probability.max(axis=1), atol=1e-12)
    np.testing.assert_allclose(found["entropy"], entropy(probability, axis=1), atol=1e-12)
    np.testing.assert_allclose(found["energy"], -logsumexp(logits, axis=1))


def test_harmonic_mean():
    assert evaluate.harmonic_mean(60.0, 30.0) == pytest.approx(40.0)
    assert evaluate.harmonic_mean(0.0, 0.0) == 0.0


def test_nothing_to_score_is_refused():
    for score in (evaluate.reliability, evaluate.risk_coverage):
        with pytest.raises(InputError, match="no image"):
            score(np.empty(0), np.empty(0, bool))
