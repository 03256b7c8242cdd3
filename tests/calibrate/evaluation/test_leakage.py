"""Leakage sees the environment and not the class."""

import numpy as np
import pytest

from invariclip.calibrate.evaluation.invariance import domain_leakage, told
from invariclip.calibrate.projection.classifiers import unit
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
    with pytest.raises(InputError, match="class with images in two environments"):
        domain_leakage(vectors, environments, environments)


def test_readers_see_what_they_are_said_to():
    """The centroid a shift of the mean, the linear ones also a faint one; none of them what it was not shown."""
    rng = np.random.default_rng(0)
    environments = np.arange(600) % 3
    noise = rng.normal(size=(600, 8))
    test = rng.random(600) < 0.3
    shifted = noise.copy()
    shifted[np.arange(600), environments] += 4
    faint = shifted / np.asarray([100] * 3 + [1] * 5)  # the same, 100 times shorter than the noise beside it
    for reader in ("centroid", "linear", "probe"):
        found = told(shifted, environments, test, reader)
        assert not found[~test].any()
        assert found[test].mean() > 0.85
        assert abs(told(noise, environments, test, reader)[test].mean() - 1 / 3) < 0.1
        for every in (np.zeros_like(test), np.ones_like(test)):
            assert not told(shifted, environments, every, reader).any()
    assert (
        told(faint, environments, test, "linear")[test].mean()
        > told(faint, environments, test, "centroid")[test].mean()
    )


@pytest.mark.parametrize("reader", ["centroid", "linear", "probe"])
def test_a_class_of_one_image_in_each_environment_does_not_tell(reader):
    """The mean of the class is that of the images that are not tested: with all of them, noise would tell."""
    rng = np.random.default_rng(1)
    labels, environments = np.repeat(np.arange(60), 3), np.tile(np.arange(3), 60)
    rates = []
    for _ in range(20):
        test = np.zeros(180, dtype=np.bool_)
        test[np.arange(60) * 3 + rng.integers(0, 3, 60)] = True
        vectors = rng.normal(size=(180, 4)) + 5 * rng.normal(size=(60, 4))[labels]
        rates.append(told(vectors, environments, test, reader, labels=labels)[test].mean())
    assert np.mean(rates) < 0.45
