"""The figures themselves: what they say of answers that are known, and which bound each of them breaks."""

from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invariclip.artifact.fidelity import LEVELS
from invariclip.export.verification.answers import TIE, Comparison, agreement, invariance_gap, measure, order_gap
from invariclip.export.verification.figures import EXACT, THRESHOLDS, Thresholds, TowerFigures, failures

GOOD = TowerFigures(
    items=9, max_abs_diff=0, cosine_min=1, cosine_mean=1, top1_agreement=1, top1_ties=0, top1_of=9, non_finite=0,
    batch_diff=0, rerun_diff=0, top5_agreement=1, top5_ties=0, probability_diff=0, gap_reference=0.1, gap=0.1,
    gap_increase=0, gap_items=9, pixel_levels=0, front_levels=0, front_cosine=1,
)  # fmt: skip
BAD = {
    "max_abs_diff": 0.5, "cosine_min": 0.5, "top1_agreement": 0.5, "top5_agreement": 0.5, "batch_diff": 0.5,
    "rerun_diff": 0.5, "batch_1": 0.5, "batch_2": 0.5, "batch_5": 0.5, "batch_17": 0.5, "probability_diff": 0.5,
    "order_gap": 0.5, "gap_increase": 0.5, "pixel_levels": 2.0, "front_levels": 3.0, "front_cosine": 0.5,
    "non_finite": 3,
}  # fmt: skip


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_good_figures_break_nothing():
    for bounds in THRESHOLDS.values():
        assert failures("image", GOOD, bounds) == {}


@pytest.mark.parametrize("figure", BAD)
@pytest.mark.parametrize("level", THRESHOLDS)
def test_each_figure_breaks_its_own_bound_alone(figure, level):
    found = failures("text", replace(GOOD, **{figure: BAD[figure]}), THRESHOLDS[level])
    assert list(found) == [figure]
    assert found[figure].startswith("text ")
    assert figure == "non_finite" or ", by " in found[figure]


@pytest.mark.parametrize("figure", [name for name in BAD if name != "non_finite"])
def test_nan_breaks_every_bound_and_stays_valid_json(figure):
    figures = replace(GOOD, **{figure: float("nan")})
    assert list(failures("image", figures, EXACT)) == [figure]
    assert figures.to_json()[figure] is None


def test_a_failure_says_value_bound_and_excess():
    found = failures("image", replace(GOOD, max_abs_diff=3e-5, cosine_min=0.9), EXACT)
    assert found["max_abs_diff"] == "image max |Δ| 3e-05 is above 1e-05, by 2e-05"
    assert found["cosine_min"] == "image cosine, min 0.9 is below 0.999999, by 0.1"


def test_farther_levels_are_looser_and_never_in_what_is_exact():
    order = [THRESHOLDS[name] for name in LEVELS]
    for tighter, looser in pairwise(order):
        for field in fields(Thresholds):
            one, other = getattr(tighter, field.name), getattr(looser, field.name)
            # `near` bounds how far vectors are, `fast` how often the best match is another: neither implies the other
            if field.name != "min_top1":
                assert one <= other if field.name.startswith("max") else one >= other
    assert order[0].min_top1 == 1
    assert {(bounds.max_rerun_diff, bounds.max_pixel_levels, bounds.max_front_levels) for bounds in order} == {
        (0, 0, 2)
    }


def test_near_ties_are_told_from_disagreement():
    bank = np.array([[1, 0], [np.cos(1e-4), np.sin(1e-4)], [0, 1.0]])
    seen = Comparison(np.array([[1, 0.0], [0, 1.0]]), [np.array([bank[1], [0, 1]], dtype=np.float32)])
    result = measure(seen, bank)
    assert (result.top1_agreement, result.top1_ties) == (1.0, 1)
    assert (result.top5_agreement, result.top5_ties) == (None, None)
    far = Comparison(np.array([[1, 0.0]]), [np.array([[0, 1]], dtype=np.float32)])
    assert measure(far, bank).top1_agreement == 0


SCORES = st.integers(6, 12).flatmap(
    lambda width: st.lists(st.lists(st.integers(-50, 50), min_size=width, max_size=width), min_size=1, max_size=5)
)


@given(SCORES, st.integers(0, 2**31), st.sampled_from([1, 5]))
def test_noise_below_a_tie_changes_nothing(scores, seed, count):
    wanted = np.array(scores, dtype=np.float64) / 50  # with many exact ties
    noise = np.random.default_rng(seed).uniform(-TIE / 2, TIE / 2, wanted.shape) * 0.99
    assert agreement(wanted, wanted + noise, count)[0] == 1


@given(SCORES, SCORES, st.sampled_from([1, 5]))
def test_agreement_is_what_its_definition_says(scores, others, count):
    wanted = np.array(scores, dtype=np.float64) / 50
    got = np.resize(np.array(others, dtype=np.float64) / 50, wanted.shape)
    share, ties = agreement(wanted, got, count)
    good = 0
    for row, mine in zip(wanted, got, strict=True):
        chosen = np.argsort(-mine, kind="stable")[:count]
        last = np.sort(row)[-count]
        # a fair choice has the same scores as the best, in whatever order
        good += (
            np.allclose(np.sort(row[chosen]), np.sort(row)[-count:], rtol=0, atol=TIE)
            and min(row[chosen]) >= last - TIE
        )
    assert share == pytest.approx(good / len(wanted))
    assert 0 <= ties <= round(share * len(wanted))


def test_a_clearly_better_one_left_out_is_no_tie():
    wanted = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.1]])
    assert agreement(wanted, np.array([[9, 8, 7, 6, 0, 5, 0.0]]), 5) == (1.0, 1)
    assert agreement(wanted, np.array([[9, 8, 7, 0, 5, 6, 0.0]]), 5) == (0.0, 0)
    assert agreement(wanted, np.array([[9, 8, 7, 6, np.nan, 5, 0.0]]), 5) == (0.0, 0)


@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
def test_the_order_gap_is_the_worst_pair_in_the_wrong_order(seed, classes):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-3, 3, (4, classes)).astype(np.float32)
    cosines = rng.normal(size=(4, classes))
    wanted = 0.0
    for row, own in zip(logits, cosines, strict=True):
        order = sorted(range(classes), key=lambda place: (-row[place], place))
        for first, better in enumerate(order):
            wanted = max([wanted, *(own[worse] - own[better] for worse in order[first + 1 :])])
    assert order_gap(logits, cosines) == pytest.approx(wanted)
    assert order_gap(cosines, cosines) == 0


def test_weak_classes_that_collapse_show_in_the_order_alone():
    """SigLIP's weak classes: probabilities of 0 in float32 differ from the right ones by nothing."""
    cosines = np.array([[0.1, -0.02, 0.05, 0.01]])
    logits = 100.0 * cosines - 112
    collapsed = np.maximum(logits, -103.0)
    said = [1 / (1 + np.exp(-one)) for one in (logits, collapsed)]
    assert np.abs(said[0] - said[1]).max() < EXACT.max_probability_diff
    assert order_gap(collapsed, cosines) == pytest.approx(0.07)
    assert order_gap(logits, cosines) == 0
    assert np.isnan(order_gap(np.array([[np.nan, 1.0]]), np.zeros((1, 2))))


@given(st.integers(0, 2**31), st.integers(1, 8))
def test_the_gap_is_a_mean_of_cosines(seed, rows):
    rng = np.random.default_rng(seed)
    plain, changed = rng.normal(size=(rows, 6)), rng.normal(size=(rows, 6))
    gap = invariance_gap(plain, changed)
    assert 0 <= gap <= 2
    assert gap == pytest.approx(np.mean(1 - (unit(plain) * unit(changed)).sum(axis=1)))
    assert gap == pytest.approx(invariance_gap(3 * plain, changed))
    assert invariance_gap(plain, plain) == pytest.approx(0, abs=1e-12)
