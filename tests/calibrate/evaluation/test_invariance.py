"""The gap is a share of the distance between images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invariclip.calibrate.evaluation.invariance import apart, invariance_gap, moved
from invariclip.calibrate.projection.classifiers import unit
from invariclip.errors import InputError


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


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 10**6))
def test_sums_are_those_of_a_loop_over_pairs(groups, seed):
    rows = unit(np.random.default_rng(seed).normal(size=(len(groups), 3)))
    pairs = [(a, b) for a in range(len(groups)) for b in range(len(groups)) if groups[a] != groups[b]]
    total, count = apart(rows, np.asarray(groups))
    assert count == len(pairs)
    assert total == pytest.approx(sum(1 - rows[a] @ rows[b] for a, b in pairs), abs=1e-10)
    first, second = (rows[[pair[side] for pair in pairs]] for side in (0, 1))
    assert moved(first, second) == pytest.approx([1 - rows[a] @ rows[b] for a, b in pairs], abs=1e-12)
