"""Estimates are plain accuracies, and intervals cover the truth as often as they should."""

import numpy as np
import pytest

from invariclip.calibrate.projection.bootstrap import Bootstrap
from invariclip.errors import InputError


def grid(concepts, environments):
    return (part.ravel() for part in np.meshgrid(range(concepts), range(environments), indexing="ij"))


def test_estimates_are_the_plain_accuracies():
    concepts, environments = grid(20, 3)
    correct = np.random.default_rng(0).random(60) < 0.4 + 0.2 * environments / 2
    intervals = Bootstrap(concepts, environments).intervals(correct)
    plain = [100 * correct[environments == code].mean() for code in range(3)]
    assert [interval.value for interval in intervals] == pytest.approx([*plain, np.mean(plain)])
    assert all(interval.low <= interval.value <= interval.high for interval in intervals)


def test_same_seed_same_interval_and_nothing_to_score():
    concepts, environments = grid(20, 2)
    correct = np.random.default_rng(0).random(40) < 0.5
    first, again, other = (Bootstrap(concepts, environments, seed=seed).intervals(correct) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    with pytest.raises(InputError, match="no image"):
        Bootstrap(np.empty(0, dtype=int), np.empty(0, dtype=int))


def test_paired_differences_are_tighter_than_apart():
    rng = np.random.default_rng(0)
    concepts, environments = grid(300, 2)
    before = rng.random(600) < 0.5
    after = before | (rng.random(600) < 0.05)
    bootstrap = Bootstrap(concepts, environments)
    difference = bootstrap.intervals(after, before)[-1]
    assert 0 < difference.low < difference.value < difference.high < 6
    assert bootstrap.standard_error(after, before) < bootstrap.standard_error(after) / 2


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        difficulty = rng.beta(2, 2, 80)
        concepts, environments = grid(80, 3)
        correct = rng.random(240) < difficulty[concepts]
        mean = Bootstrap(concepts, environments, resamples=300).intervals(correct)[-1]
        hits += mean.low <= 50 <= mean.high
    assert 176 <= hits <= 199  # 95 % of 200, give or take three standard errors


def test_shares_count_as_parts_of_an_answer():
    concepts, environments = grid(4, 1)
    assert Bootstrap(concepts, environments).intervals(np.array([0.5, 0.5, 1.0, 0.0]))[-1].value == 50
