"""The mathematics of turns: what percentiles, ratios and intervals must be, whatever was timed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invariclip.errors import InputError
from invariclip.measure.statistics import (
    FEWEST_ROUNDS,
    WIDEST,
    MeasuredInterval,
    interval,
    mean_load,
    median_of_rounds,
    percentiles,
    ratio,
    round_medians,
    spread,
)

seconds = st.floats(1e-5, 1e3)
turn = st.lists(seconds, min_size=1, max_size=6)
turns = st.lists(turn, min_size=1, max_size=8)


@given(turns, st.integers(0, 5))
def test_the_interval_holds_the_figure_and_stays_among_the_rounds(times, seed):
    medians = round_medians(times)
    found = median_of_rounds(medians, seed)
    assert medians.min() <= found.low <= found.value <= found.high <= medians.max()
    assert found.value == np.median(medians)
    assert found == median_of_rounds(medians, seed)


@given(turns)
def test_a_candidate_is_exactly_as_fast_as_itself(times):
    same = ratio(times, times)
    assert (same.value, same.low, same.high, same.rounds) == (1, 1, 1, len(times))


@given(turns, st.floats(0.05, 20))
def test_a_candidate_that_takes_k_times_as_long_is_k_times_as_slow_and_drift_does_not_matter(times, factor):
    drifting = [[second * (1 + place) for second in one] for place, one in enumerate(times)]
    slower = [[second * factor for second in one] for one in drifting]
    found = ratio(drifting, slower)
    assert np.allclose([found.value, found.low, found.high], 1 / factor)


@given(turns, turns)
def test_ratios_turn_round(first, other):
    both = min(len(first), len(other)) // 2 * 2 - 1 if min(len(first), len(other)) > 1 else 1  # an odd count
    there, back = ratio(first[:both], other[:both]), ratio(other[:both], first[:both])
    assert there.value * back.value == pytest.approx(1)


@given(turns)
def test_percentiles_are_ordered_and_inside(times):
    flat = [second for one in times for second in one]
    found = percentiles(times)
    assert min(flat) <= found["p50"] <= found["p95"] <= found["p99"] <= max(flat)
    assert found["p50"] == pytest.approx(np.median(flat))


@given(turns, st.floats(0.1, 10))
def test_spread_is_free_of_units_and_never_negative(times, factor):
    assert spread(times) >= 0
    assert spread([[second * factor for second in one] for one in times]) == pytest.approx(spread(times))
    assert spread([times[0]] * 4) == 0


def test_a_conclusion_needs_rounds_that_agree():
    assert MeasuredInterval(2, 1.9, 2.1, FEWEST_ROUNDS).decides
    assert not MeasuredInterval(2, 1.9, 2.1, FEWEST_ROUNDS - 1).decides
    assert not MeasuredInterval(2, 1.7, 1.7 + 2 * WIDEST + 0.01, 30).decides
    assert MeasuredInterval(2, 1.9, 2.1, 9).to_json() == {
        "value": 2,
        "low": 1.9,
        "high": 2.1,
        "rounds": 9,
        "decides": True,
    }


def test_the_interval_narrows_with_rounds():
    rng = np.random.default_rng(0)
    widths = [np.mean([median_of_rounds(rng.uniform(1, 2, n)).width for _ in range(20)]) for n in (5, 20, 80)]
    assert widths[0] > 1.5 * widths[1] > 2 * widths[2]


def test_the_interval_reaches_to_both_sides_and_holds_the_truth_nineteen_times_in_twenty():
    rng = np.random.default_rng(1)
    found = [median_of_rounds(rng.lognormal(0, 0.2, 15), seed) for seed in range(200)]
    assert all(one.low < one.value < one.high for one in found)
    # the median of a lognormal is 1; a bootstrap of fifteen is a little too sure of itself
    assert 0.88 <= np.mean([one.low <= 1 <= one.high for one in found]) <= 0.99


@pytest.mark.parametrize("values", [[], [1, 0], [1, float("nan")], [1, -1], [[1, 2]], [float("inf")]])
def test_what_is_no_list_of_figures_is_refused(values):
    with pytest.raises(InputError, match="no list of figures above zero"):
        median_of_rounds(values)


def test_rounds_that_do_not_belong_together_are_refused():
    with pytest.raises(InputError, match="2 rounds cannot be compared with 1"):
        ratio([[1.0], [1.0]], [[1.0]])
    with pytest.raises(InputError, match="without a single time"):
        ratio([[1.0]], [[]])
    with pytest.raises(InputError, match="no percentile"):
        percentiles([[], []])


FIRST = [
    [0.0156, 0.01405, 0.0174],
    [0.023],
    [0.019, 0.0183, 0.0214, 0.0176],
    [0.0151, 0.0149],
    [0.0161, 0.0253, 0.0158],
]
OTHER = [[0.0121, 0.0137], [0.0098, 0.0103, 0.0221], [0.0153], [0.0162, 0.0119, 0.0118, 0.0125], [0.0099, 0.0101]]


def test_figures_stay_the_same_to_the_last_bit():
    """Records hold them with every digit."""
    ends = 1.2093023255813953, 2.233009708737864
    assert ratio(FIRST, OTHER) == ratio(FIRST, OTHER, seed=3) == MeasuredInterval(1.2295081967213113, *ends, 5)
    assert percentiles(FIRST) == {"p50": 0.0174, "p95": 0.023919999999999997, "p99": 0.025023999999999998}
    assert (spread(FIRST), spread(OTHER)) == (0.5333333333333334, 0.5299999999999998)
    assert round_medians(OTHER).tolist() == [0.0129, 0.0103, 0.0153, 0.0122, 0.01]
    assert interval(round_medians(OTHER)) == (0.01, 0.0153)
    assert interval(round_medians(FIRST) / round_medians(OTHER), seed=4) == ends
    assert mean_load([0.1, None, 0.3, 0.05]) == 0.15
