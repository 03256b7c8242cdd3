"""Margins against a loop, and what their separation says of answers that are all right."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from invariclip.calibrate.projection.candidates import margins, separation


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(2, 6))
def test_margins_are_those_of_a_loop(seed, count, classes):
    rng = np.random.default_rng(seed)
    scores, places = rng.normal(size=(count, classes)), rng.integers(0, classes, count)
    before = scores.copy()
    expected = [row[place] - max(np.delete(row, place)) for row, place in zip(scores, places, strict=True)]
    found = margins(scores, places)
    assert found == pytest.approx(expected)
    assert np.array_equal(scores, before)
    assert np.array_equal(found > 0, np.argmax(scores, axis=1) == places)


def test_it_tells_the_rate_of_errors_to_come():
    """Of normal margins with mean m and deviation 1, however few of a sample's are below zero: Φ(-m)."""
    rng = np.random.default_rng(0)
    for mean in (1.0, 2.0, 3.0, 4.0):
        found = 0.3 * (mean + rng.normal(size=1000))
        assert separation(found) == pytest.approx(mean, rel=0.08)
        assert (found < 0).mean() == pytest.approx(norm.cdf(-mean), abs=0.03)


@given(st.floats(1e-3, 1e3), st.integers(0, 10**6))
def test_the_unit_of_scores_does_not_matter(factor, seed):
    found = np.random.default_rng(seed).normal(1, 1, 20)
    assert separation(found * factor) == pytest.approx(separation(found))


def test_margins_without_spread_or_none_at_all():
    assert separation(np.empty(0)) == 0
    assert separation(np.zeros(3)) == 0
    assert np.isfinite(separation(np.ones(3)))
    assert separation(np.ones(3)) > 1e5 > -1e5 > separation(-np.ones(3))
