"""Moments are sums: order, splitting and weights do not matter beyond rounding."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.calibrate.moments import Moments, empty, of_pairs, of_points, read_moments, write_moments
from invariclip.errors import InputError

settings.register_profile("calibrate", max_examples=40, deadline=None)
settings.load_profile("calibrate")

ARRAYS = ("point_sum", "point_outer", "pair_outer")


def same(a: Moments, b: Moments):
    assert (a.points, a.pairs) == (b.points, b.pairs)
    assert a.point_weight == pytest.approx(b.point_weight)
    assert a.pair_weight == pytest.approx(b.pair_weight)
    for name in ARRAYS:
        assert np.allclose(getattr(a, name), getattr(b, name), rtol=1e-12, atol=1e-12)


def sample(seed, count, width):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)), rng.normal(size=(count, width)), rng.uniform(0, 3, count)


def whole(first, second, weights):
    return of_points(first, weights) + of_pairs(first, second, weights)


seeds, counts, widths = st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 7)


@given(seeds, counts, widths, st.lists(st.integers(0, 40), max_size=6))
def test_any_split_adds_up(seed, count, width, cuts):
    data = sample(seed, count, width)
    edges = [0, *sorted(min(cut, count) for cut in cuts), count]
    total = empty(width)
    for start, end in itertools.pairwise(edges):
        total = total + whole(*(part[start:end] for part in data))
    same(total, whole(*data))


@given(seeds, counts, widths)
def test_order_does_not_matter(seed, count, width):
    data = sample(seed, count, width)
    order = np.random.default_rng(seed + 1).permutation(count)
    same(whole(*data), whole(*(part[order] for part in data)))


@given(seeds, widths)
def test_merging_is_associative_and_commutative(seed, width):
    a, b, c = (whole(*sample(seed + i, 5 + i, width)) for i in range(3))
    same((a + b) + c, a + (b + c))
    same(a + b, b + a)
    same(a + empty(width), a)


@given(seeds, counts, widths, st.integers(1, 5))
def test_a_weight_is_a_repetition(seed, count, width, times):
    first, second, _ = sample(seed, count, width)
    weighted = whole(first, second, np.full(count, float(times)))
    repeated = whole(np.repeat(first, times, 0), np.repeat(second, times, 0), np.ones(count * times))
    assert np.allclose(weighted.sigma, repeated.sigma)
    assert np.allclose(weighted.pair_outer, repeated.pair_outer)


@given(seeds, counts, widths, st.floats(0.1, 10))
def test_scaling_keeps_the_means_and_the_counts(seed, count, width, factor):
    moments = whole(*sample(seed, count, width))
    scaled = moments.scaled(factor)
    assert np.allclose(scaled.sigma, moments.sigma)
    assert np.allclose(scaled.sigma_delta, moments.sigma_delta)
    assert (scaled.points, scaled.pairs) == (moments.points, moments.pairs)


@given(seeds, counts, widths)
def test_swapping_the_members_of_pairs_changes_nothing(seed, count, width):
    first, second, weights = sample(seed, count, width)
    same(of_pairs(first, second, weights), of_pairs(second, first, weights))


def test_means_are_means():
    first, second, _ = sample(0, 30, 4)
    moments = whole(first, second, np.ones(30))
    assert np.allclose(moments.sigma, np.mean([np.outer(z, z) for z in first], axis=0))
    delta = first - second
    assert np.allclose(moments.sigma_delta, np.mean([np.outer(d, d) for d in delta], axis=0))


def test_float32_is_accumulated_in_float64():
    rows = np.full((20000, 1), 1 + 2**-20, dtype=np.float32)
    assert of_points(rows).point_outer[0, 0] == pytest.approx(20000 * (1 + 2**-20) ** 2, rel=1e-13)


def test_on_disk_bit_for_bit(tmp_path):
    moments = whole(*sample(3, 10, 5))
    write_moments(tmp_path / "m.safetensors", moments)
    again = read_moments(tmp_path / "m.safetensors")
    for name in ARRAYS:
        assert np.array_equal(getattr(again, name), getattr(moments, name))
    assert (again.points, again.pair_weight) == (moments.points, moments.pair_weight)


def test_refusals(tmp_path):
    rows = np.ones((3, 2))
    with pytest.raises(InputError, match="not finite"):
        of_points(np.array([[1.0, np.nan]]))
    with pytest.raises(InputError, match="not finite"):
        of_pairs(rows, rows * np.inf)
    with pytest.raises(InputError, match="weights"):
        of_points(rows, np.array([1.0, -1.0, 1.0]))
    with pytest.raises(InputError, match="shapes"):
        of_pairs(rows, np.ones((2, 2)))
    with pytest.raises(InputError, match="width 2 and 3"):
        empty(2) + empty(3)
    with pytest.raises(InputError, match="no pair"):
        _ = of_points(rows).sigma_delta
    with pytest.raises(InputError, match="no picture"):
        _ = empty(2).sigma
    with pytest.raises(InputError, match="weight"):
        empty(2).scaled(-1)
    with pytest.raises(InputError, match="no such"):
        read_moments(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="not moments"):
        read_moments(tmp_path / "bad")
