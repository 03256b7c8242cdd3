"""Moments are sums: order, splitting and weights do not matter beyond rounding."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.calibrate.data.moments import (
    Moments,
    combined,
    empty,
    of_pairs,
    of_points,
)
from invariclip.errors import InputError

settings.register_profile("calibrate", max_examples=40, deadline=None)
settings.load_profile("calibrate")

ARRAYS = ("point_sum", "point_outer", "pair_outer")
SCALARS = ("point_weight", "point_weight_squares", "point_fourth", "pair_weight", "pair_weight_squares", "pair_fourth")


def same(a: Moments, b: Moments, scale: Moments | None = None):
    """Equal to 1e-12 of the largest value, of `scale` where rounding is relative to something larger."""
    assert (a.points, a.pairs) == (b.points, b.pairs)
    for name in (*SCALARS, *ARRAYS):
        one, other, whole = (getattr(each, name) for each in (a, b, scale or a))
        assert np.abs(np.subtract(one, other)).max() <= 1e-12 * max(np.abs(whole).max(), 1e-300), name


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


@given(seeds, counts, widths)
def test_a_repeated_pair_is_one_of_weight_two(seed, count, width):
    """To the matrices, that is; a repetition claims to be another observation, which a weight does not."""
    first, second, weights = sample(seed, count, width)
    twice = whole(*(np.concatenate([part, part[:1]]) for part in (first, second, weights)))
    weights[0] *= 2
    heavier = whole(first, second, weights)
    assert np.allclose(twice.sigma, heavier.sigma, rtol=1e-12, atol=1e-12)
    assert np.allclose(twice.sigma_delta, heavier.sigma_delta, rtol=1e-12, atol=1e-12)
    assert (twice.points, twice.pairs) == (count + 1, count + 1)
    assert twice.effective_pairs >= heavier.effective_pairs


@given(seeds, st.integers(1, 40), st.integers(1, 40), widths)
def test_what_was_added_can_be_subtracted(seed, count, other, width):
    """Leaving one environment out equals never having seen it."""
    rest, left_out = whole(*sample(seed, count, width)), whole(*sample(seed + 1, other, width))
    same((rest + left_out) - left_out, rest, scale=rest + left_out)


@given(seeds, counts, widths)
def test_nothing_is_left_of_moments_less_themselves(seed, count, width):
    """Not even what rounding leaves when the parts were added in another order."""
    a, b, c = (whole(*sample(seed + i, count, width)) for i in range(3))
    same((a + b + c) - (c + a + b), empty(width))


@given(seeds, counts, widths, st.floats(0.1, 10), st.floats(0.1, 10))
def test_sources_count_by_their_weights_alone(seed, count, width, a, b):
    """However many pairs a source has, and whatever they weighed before."""
    points = of_points(sample(seed, count, width)[0])
    few, many = (of_pairs(*sample(seed + extra, count * extra, width)) for extra in (1, 5))
    total = combined([points, few, many.scaled(7)], [1, a, b])
    assert total.pair_weight == pytest.approx(a + b)
    assert np.allclose(total.sigma_delta, (a * few.sigma_delta + b * many.sigma_delta) / (a + b))
    assert np.array_equal(total.point_outer, points.point_outer)
    assert (total.points, total.pairs) == (count, 6 * count)


@given(seeds, counts, widths)
def test_scalars_are_their_sums(seed, count, width):
    first, second, weights = sample(seed, count, width)
    moments = whole(first, second, weights)
    assert moments.point_fourth == pytest.approx(sum(w**2 * (z @ z) ** 2 for w, z in zip(weights, first, strict=True)))
    delta = first - second
    assert moments.pair_fourth == pytest.approx(sum(w**2 * (d @ d) ** 2 for w, d in zip(weights, delta, strict=True)))
    assert moments.effective_pairs == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert moments.effective_points == pytest.approx(moments.effective_pairs)
    assert moments.effective_points <= count * (1 + 1e-9)


@given(seeds, counts, widths, st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0.1, 10))
def test_no_sum_has_more_independent_pairs_than_its_parts_have(seed, count, width, independent, weight):
    """However parts are weighed, added, and combined: sources of shared members do not gain any by it."""
    parts = [of_pairs(*sample(seed + place, count, width), independent=each) for place, each in enumerate(independent)]
    shared = [min(part.effective_pairs, each) for part, each in zip(parts, independent, strict=True)]
    assert [part.effective_pairs for part in parts] == pytest.approx(shared)
    crowded = [part.crowded(part.crowding) for part in parts]
    assert [part.effective_pairs for part in crowded] == pytest.approx(shared)
    assert [part.crowding for part in crowded] == pytest.approx([1] * len(parts))
    total = combined(parts, [weight, *[1.0] * (len(parts) - 1)])
    weights = np.asarray([weight, *[1.0] * (len(parts) - 1)])
    # Kish, of parts whose own variance goes as one over their counts
    assert total.effective_pairs == pytest.approx(weights.sum() ** 2 / (weights**2 / shared).sum())
    assert total.effective_pairs <= sum(independent) * (1 + 1e-9)


@given(seeds, counts, widths, st.floats(0.1, 10))
def test_scaling_keeps_the_means_and_the_counts(seed, count, width, factor):
    moments = whole(*sample(seed, count, width))
    scaled = moments.scaled(factor)
    assert np.allclose(scaled.sigma, moments.sigma)
    assert np.allclose(scaled.sigma_delta, moments.sigma_delta)
    assert (scaled.points, scaled.pairs) == (moments.points, moments.pairs)
    assert scaled.effective_pairs == pytest.approx(moments.effective_pairs)


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


def test_more_rows_than_are_multiplied_at_a_time():
    first, second, weights = sample(5, 9000, 3)
    moments = whole(first, second, weights)
    assert np.allclose(moments.point_outer, (first * weights[:, None]).T @ first, rtol=1e-12)
    assert np.allclose(moments.pair_outer, ((first - second) * weights[:, None]).T @ (first - second), rtol=1e-12)
    assert np.allclose(of_points(first.astype(np.float32)).point_sum, first.astype(np.float32).sum(0, dtype=np.float64))


def test_refusals():
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
    with pytest.raises(InputError, match="no image"):
        _ = empty(2).sigma
    with pytest.raises(InputError, match="weight"):
        empty(2).scaled(-1)
    with pytest.raises(InputError, match="width 2 and 3"):
        empty(2) - empty(3)
    with pytest.raises(InputError, match="not a part of these: points would be negative"):
        of_points(rows) - of_points(np.ones((4, 2)))
    with pytest.raises(InputError, match="not a part of these: pair weight would be negative"):
        of_pairs(rows, rows * 2) - of_pairs(rows, rows * 2).scaled(2)
    with pytest.raises(InputError, match="not a part of these: point outer would be negative"):
        of_points(rows) - of_points(rows[:2] * [[1.3, 0.1]])
    with pytest.raises(InputError, match="2 moments and 1 weights"):
        combined([empty(2), empty(2)], [1.0])
    with pytest.raises(InputError, match="0 moments"):
        combined([], [])
    for part in (of_pairs(rows, rows * 2), empty(2)):
        with pytest.raises(InputError, match="zero or more, not -"):
            combined([part], [-3.0])
