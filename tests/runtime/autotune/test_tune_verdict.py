"""The verdict between timed candidates: chance decides nothing, and a sure gain is taken."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.artifact.fidelity import LEVELS
from invariclip.autotune.candidates import TuneCandidate
from invariclip.autotune.checks import IMAGES, MIN_COSINE, check_images, disagreement
from invariclip.autotune.halving import middle, stages_for
from invariclip.autotune.verdict import MARGIN, MeasuredCandidate, Timed, decide, survivors
from invariclip.export.verification.figures import THRESHOLDS
from invariclip.measure.statistics import interval

SIMPLE = MeasuredCandidate(TuneCandidate("float32", "onnxruntime", 1, "exact", 2), 1)
OTHERS = [
    MeasuredCandidate(TuneCandidate("float32", "onnxruntime", 1, "exact", 2), 4),
    MeasuredCandidate(TuneCandidate("bfloat16", "onnxruntime", 1, "exact", 0), 1),
    MeasuredCandidate(TuneCandidate("float32", "openvino", 1, "exact", 2), 1),
    MeasuredCandidate(TuneCandidate("float32", "onnxruntime", 2, "exact", 2), 1),
    MeasuredCandidate(TuneCandidate("int8", "onnxruntime", 1, "fast", 0), 1),
]
"""Each less preferred than the one before it, and than `SIMPLE`."""


def timed(entry, ratios, stage=3):
    ratios = np.asarray(ratios, dtype=float)
    return Timed(entry, 0.01 / ratios, ratios, stage)


def noise(seed, rounds=11, spread=0.1):
    return np.exp(np.random.default_rng(seed).normal(0, spread, rounds))


def test_preference_is_closer_then_threads_then_engine_then_arithmetic_then_batch():
    keys = [entry.preference for entry in (SIMPLE, *OTHERS)]
    assert all(simpler < other for simpler, other in pairwise(keys))


@pytest.mark.parametrize("other", OTHERS, ids=lambda entry: entry.name)
def test_within_noise_the_preferred_one_is_taken_and_it_is_said(other):
    # Round by round now one, now the other is ahead
    back_and_forth = np.array([1.3, 0.8, 1.25, 0.85, 1.2, 0.9, 1.3, 0.8, 1.25, 0.85, 1.2])
    taken, why = decide([timed(other, back_and_forth), timed(SIMPLE, np.ones(11))])
    assert taken.entry == SIMPLE
    assert "not surely a gain" in why
    assert other.name in why


@pytest.mark.parametrize("other", OTHERS, ids=lambda entry: entry.name)
def test_a_sure_gain_is_taken(other):
    drift = noise(3, spread=0.3)  # of the machine: both feel it, and their ratio does not
    taken, why = decide([timed(SIMPLE, drift), timed(other, 1.2 * drift * noise(4, spread=0.01))])
    assert (taken.entry, why.endswith("the fastest")) == (other, True)


def test_a_sure_but_tiny_gain_is_none():
    steady = noise(5)
    assert decide([timed(OTHERS[-1], steady * 1.015), timed(SIMPLE, steady)])[0].entry == SIMPLE
    assert decide([timed(OTHERS[-1], steady * 1.05), timed(SIMPLE, steady)])[0].entry == OTHERS[-1]


entries = st.lists(st.sampled_from([SIMPLE, *OTHERS]), min_size=1, max_size=6, unique=True)


@settings(max_examples=60, deadline=None)
@given(entries, st.integers(0, 2**31), st.floats(0, 0.5))
def test_whoever_is_taken_is_tied_with_the_fastest_and_no_tied_one_is_preferred(found, seed, spread):
    rng = np.random.default_rng(seed)
    field = [timed(one, rng.uniform(0.5, 3) * np.exp(rng.normal(0, spread, 9))) for one in found]
    taken, _ = decide(field)
    fastest = max(field, key=lambda one: one.ratio)
    tied = [one for one in field if interval(fastest.ratios / one.ratios)[0] <= MARGIN]
    assert taken in tied
    assert all(taken.entry.preference <= one.entry.preference for one in tied)
    # and the order in which they come does not matter
    assert decide(field[::-1])[0].entry == taken.entry


@settings(max_examples=60, deadline=None)
@given(entries, st.integers(0, 2**31), st.integers(1, 5))
def test_survivors_hold_the_fastest_and_no_more_than_allowed(found, seed, most):
    rng = np.random.default_rng(seed)
    field = [timed(one, rng.uniform(0.5, 3) * np.exp(rng.normal(0, 0.1, rng.integers(3, 6)))) for one in found]
    kept = survivors(field, most)
    assert kept[0].ratio == max(one.ratio for one in field)
    assert len({one.entry.candidate for one in kept}) <= most
    assert [one.ratio for one in kept] == sorted((one.ratio for one in kept), reverse=True)


def test_the_slow_half_goes_unless_it_is_simpler_and_may_be_as_fast():
    clear = [timed(one, np.full(3, speed)) for one, speed in zip(OTHERS, (4.0, 3.0, 2.0, 1.0), strict=False)]
    assert [one.ratio for one in survivors(clear, 9)] == [4.0, 3.0]
    noisy = [timed(OTHERS[-1], [2.0, 1.0, 1.5]), timed(OTHERS[0], [1.6, 1.5, 1.4]), timed(SIMPLE, [1.0, 1.9, 1.2])]
    assert SIMPLE in {one.entry for one in survivors(noisy, 9)}


def test_intervals_of_steady_rounds_are_narrow_and_hold_the_median():
    assert interval(np.full(6, 2.0)) == (2.0, 2.0)
    low, high = interval(noise(7, rounds=101))
    assert low < np.median(noise(7, rounds=101)) < high
    assert high / low < 1.2


def test_measurements_are_in_their_units():
    found = Timed(OTHERS[0], np.array([0.010, 0.020, 0.030]), np.array([1.0, 2.0, 3.0]), 2).measurement()
    assert (found.median_ms, found.low_ms, found.high_ms) == pytest.approx((20, 15, 25))
    assert found.images_per_second == pytest.approx(4 / 0.020)
    assert (found.ratio, found.rounds, found.stage, found.candidate.batch) == (2.0, 3, 2, 4)


def test_stages_of_throughput_try_all_batches_after_the_first():
    first, second, third = stages_for("throughput", (1, 4, 16, 64))
    assert (first.batches, second.batches, third.batches) == ((4,), (1, 4, 16, 64), None)
    assert middle((1,)) == 1
    assert all(stage.least <= stage.rounds for stage in (*stages_for("latency", (1,)), first, second, third))
    # Of six rounds the range holds the median more than 95 times in 100
    assert stages_for("latency", (1,))[-1].least >= 6
    assert third.least >= 6


def test_the_levels_bounds_are_those_of_the_contract():
    assert {level: THRESHOLDS[level].min_cosine for level in LEVELS} == MIN_COSINE


def test_check_images_are_the_same_every_time_and_apart():
    images = check_images(24, 36)
    assert (images.shape, images.dtype) == ((IMAGES, 24, 36, 3), np.uint8)
    np.testing.assert_array_equal(images, check_images(24, 36))
    flat = images.reshape(IMAGES, -1).astype(float)
    apart = np.abs(flat[:, None] - flat[None]).mean(axis=2)
    assert apart[~np.eye(IMAGES, dtype=bool)].min() > 10


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(LEVELS), st.floats(0.05, 1.8), st.floats(2.2, 20))
def test_an_angle_within_twice_the_levels_agrees_and_one_beyond_does_not(seed, level, small, large):
    rng = np.random.default_rng(seed)
    wanted = unit(rng.normal(size=(4, 32)))
    side = rng.normal(size=wanted.shape)
    side = unit(side - (side * wanted).sum(axis=1, keepdims=True) * wanted).astype(float)
    angle = np.arccos(MIN_COSINE[level])

    def turned(times):
        reach = min(times * angle, np.pi / 2)
        return (np.cos(reach) * wanted.astype(float) + np.sin(reach) * side).astype(np.float32)

    assert disagreement(turned(small), wanted, level) == ""
    assert "cosine" in disagreement(turned(large), wanted, level)
    # one bad row is enough
    mixed = np.concatenate([turned(small)[:3], turned(large)[3:]])
    assert "cosine" in disagreement(mixed, wanted, level)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_disagrees(value):
    wanted = unit(np.ones((3, 4)))
    got = wanted.copy()
    got[1, 2] = value
    assert disagreement(got, wanted, "fast") == "1 of 3 answers are NaN or infinite"
    assert "answers [3, 2] where" in disagreement(wanted[:, :2], wanted, "fast")
    assert "cosine" in disagreement(np.zeros_like(wanted), wanted, "fast")
