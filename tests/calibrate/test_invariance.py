"""Leakage sees the environment and not the class; the gap is a share of the distance between pictures."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invariclip.calibrate.evaluate import unit
from invariclip.calibrate.invariance import domain_leakage, invariance_gap
from invariclip.errors import InputError


def world(*, shift, count=240, width=8, seed=0, shares=(0.5, 0.5, 0.5)):
    """Two classes in three environments, of different shares, each environment shifted along an axis of its own."""
    rng = np.random.default_rng(seed)
    environments = np.arange(count) % 3
    labels = (rng.random(count) < np.asarray(shares)[environments]).astype(np.int64)
    rows = 0.5 * rng.normal(size=(count, width))
    rows[:, 0] += np.where(labels == 1, 2.0, -2.0)
    rows[np.arange(count), 1 + environments] += shift
    return unit(rows), labels, environments


def test_a_shift_leaks_and_noise_does_not():
    clear, none = domain_leakage(*world(shift=2.0)), domain_leakage(*world(shift=0.0))
    assert clear.accuracy > 85
    assert abs(none.accuracy - none.chance) < 12
    assert clear.chance == pytest.approx(100 / 3)


def test_the_class_does_not_give_the_environment_away():
    """Environments hold the classes in very different shares, and nothing else tells them apart."""
    vectors, labels, environments = world(shift=0.0, shares=(0.05, 0.5, 0.95), count=600)
    assert abs(domain_leakage(vectors, labels, environments).accuracy - 100 / 3) < 10
    # were the class not taken away, it would: from the class alone more than half are right
    guess = np.asarray([0, 2])[labels]
    assert np.mean([(guess == environments)[environments == code].mean() for code in range(3)]) > 0.6


def test_it_is_the_same_for_equal_seeds_and_scales():
    vectors, labels, environments = world(shift=0.6)
    first = domain_leakage(vectors, labels, environments, seed=1)
    assert first == domain_leakage(vectors, labels, environments, seed=1)
    assert first.accuracy == pytest.approx(domain_leakage(7 * vectors, labels, environments, seed=1).accuracy, abs=0.5)


def test_a_class_of_one_environment_does_not_count():
    vectors, labels, environments = world(shift=0.0)
    alone = labels == 1
    labels = np.where(alone, 10 + environments, labels)
    only = ~alone
    assert domain_leakage(vectors, labels, environments) == domain_leakage(
        vectors[only], labels[only], environments[only]
    )
    with pytest.raises(InputError, match="class with pictures in two environments"):
        domain_leakage(vectors, environments, environments)


@given(st.integers(0, 10**6), st.floats(0, 3))
def test_the_gap_is_the_ratio_of_two_means_over_pairs(seed, noise):
    rng = np.random.default_rng(seed)
    first = unit(rng.normal(size=(7, 4)))
    second = unit(first + noise * rng.normal(size=(7, 4)))
    apart = np.mean([1 - first[i] @ first[j] for i in range(7) for j in range(7) if i != j])
    assert invariance_gap(first, second) == pytest.approx(np.mean(1 - (first * second).sum(axis=1)) / apart)


def test_the_gap_does_not_shrink_because_everything_does():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 400, 6))
    far = np.asarray([10.0, 0, 0, 0, 0, 0])
    spread = invariance_gap(unit(first), unit(second))
    together = invariance_gap(unit(first + far), unit(second + far))
    assert spread == pytest.approx(1, abs=0.1)
    assert together == pytest.approx(1, abs=0.1)


def test_what_has_no_gap_is_said():
    same = np.tile([1.0, 0.0], (3, 1))
    with pytest.raises(InputError, match="two pairs or more"):
        invariance_gap(same[:1], same[:1])
    with pytest.raises(InputError, match="no distance"):
        invariance_gap(same, same)
