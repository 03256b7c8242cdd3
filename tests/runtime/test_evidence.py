"""The closed form against the pairwise rule, written out here and not as the library writes it; and its laws."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip import uncertainty as evidence


def fuse(logs):
    """With every class as likely as another before there is evidence."""
    classes = logs.shape[-1]
    return evidence.fuse(logs, np.full((*logs.shape[:-2], classes), 1 / classes, logs.dtype))


def opinions(seed, templates, classes, spread=4.0, shift=0.0):
    return spread * np.random.default_rng(seed).normal(size=(templates, classes)) + shift


def opinion(logs):
    evidence = np.exp(logs)
    strength = evidence.sum() + len(evidence)
    return evidence / strength, len(evidence) / strength


def dempster(one, other):
    """b_k = (b_k b'_k + b_k u' + b'_k u) / (1 - C), u = u u' / (1 - C); C is the mass of pairs that conflict.

    1 - C is the mass of all other pairs: taken from 1 it would lose every digit where templates disagree strongly.
    """
    (b, u), (c, v) = one, other
    agreed, left = b * c + b * v + c * u, u * v
    kept = agreed.sum() + left
    return agreed / kept, left / kept


def pairwise(logs):
    fused = opinion(logs[0])
    for further in logs[1:]:
        fused = dempster(fused, opinion(further))
    return fused


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    templates=st.integers(1, 17),
    classes=st.integers(1, 1000),
    spread=st.floats(0, 4),
    shift=st.floats(-10, 4),
)
def test_the_closed_form_is_the_pairwise_rule(seed, templates, classes, spread, shift):
    logs = opinions(seed, templates, classes, spread, shift)
    belief, uncertainty = pairwise(logs)
    fused = fuse(logs)
    np.testing.assert_allclose(fused.belief, belief, rtol=0, atol=1e-12)
    np.testing.assert_allclose(fused.uncertainty, uncertainty, rtol=0, atol=1e-12)
    np.testing.assert_allclose(fused.belief.sum() + fused.uncertainty, 1, atol=1e-12)
    np.testing.assert_allclose(fused.probabilities.sum(), 1, atol=1e-12)
    assert 0 <= fused.uncertainty <= 1


def test_at_full_size():
    logs = opinions(0, 17, 1000)
    belief, uncertainty = pairwise(logs)
    assert np.abs(fuse(logs).belief - belief).max() <= 1e-12
    assert abs(fuse(logs).uncertainty - uncertainty) <= 1e-12


@given(evidence=st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=1, max_size=6))
def test_the_rule_as_published_in_fractions(evidence):
    """Without rounding, the conflict C summed over pairs of different classes."""
    fused = None
    for row in evidence:
        strength = Fraction(sum(row) + 4)
        b, u = [number / strength for number in row], 4 / strength
        if fused is not None:
            c, v = fused
            conflict = sum(b[i] * c[j] for i in range(4) for j in range(4) if i != j)
            b = [(b[k] * c[k] + b[k] * v + c[k] * u) / (1 - conflict) for k in range(4)]
            u = u * v / (1 - conflict)
        fused = b, u
    with np.errstate(divide="ignore"):
        got = fuse(np.log(np.array(evidence, dtype=np.float64)))
    np.testing.assert_allclose(got.belief, [float(number) for number in fused[0]], rtol=0, atol=1e-12)
    np.testing.assert_allclose(got.uncertainty, float(fused[1]), rtol=0, atol=1e-12)


@given(seed=st.integers(0, 999), templates=st.integers(2, 9), classes=st.integers(1, 30))
def test_the_order_of_templates_is_nothing(seed, templates, classes):
    logs = opinions(seed, templates, classes)
    shuffled = logs[np.random.default_rng(seed).permutation(templates)]
    np.testing.assert_allclose(fuse(shuffled).belief, fuse(logs).belief, atol=1e-13)


@given(seed=st.integers(0, 999), cut=st.integers(1, 5), classes=st.integers(1, 30))
def test_fusing_what_was_fused_is_fusing_all(seed, cut, classes):
    """Associative: a fused opinion is one again, with e_k = K · b_k / u."""
    logs = opinions(seed, 6, classes)
    halves = [fuse(part) for part in (logs[:cut], logs[cut:])]
    with np.errstate(divide="ignore"):
        again = np.stack([np.log(classes * half.belief / half.uncertainty) for half in halves])
    np.testing.assert_allclose(fuse(again).belief, fuse(logs).belief, atol=1e-12)
    np.testing.assert_allclose(fuse(again).uncertainty, fuse(logs).uncertainty, atol=1e-12)


@given(seed=st.integers(0, 999), classes=st.integers(2, 30))
def test_a_template_that_knows_nothing_changes_nothing(seed, classes):
    logs = opinions(seed, 3, classes)
    silent = np.vstack([logs, np.full((1, classes), -np.inf)])
    np.testing.assert_array_equal(fuse(silent).belief, fuse(logs).belief)
    nothing = fuse(silent[3:])
    assert nothing.uncertainty == 1
    np.testing.assert_array_equal(nothing.probabilities, np.full(classes, 1 / classes))


def test_a_second_template_that_agrees_makes_it_surer():
    logs = opinions(1, 1, 5)
    assert fuse(np.vstack([logs, logs])).uncertainty < fuse(logs).uncertainty


@pytest.mark.parametrize("height", [1e4, 1e6, 1e300])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extremes_stay_numbers(height, dtype):
    height = min(height, float(np.finfo(dtype).max) / 100)
    for logs in (np.full((17, 9), height), np.full((17, 9), -height), height * np.sign(opinions(2, 17, 9))):
        fused = fuse(logs.astype(dtype))
        assert np.isfinite(fused.belief).all()
        assert 0 <= fused.uncertainty <= 1
        np.testing.assert_allclose(fused.belief.sum() + fused.uncertainty, 1, atol=1e-5)


@given(seed=st.integers(0, 999), templates=st.integers(1, 17), shift=st.floats(-30, 4))
def test_float32_is_near(seed, templates, shift):
    logs = opinions(seed, templates, 200, 3.0, shift).astype(np.float32)
    exact, single = fuse(logs.astype(np.float64)), fuse(logs)
    assert single.belief.dtype == np.float32
    np.testing.assert_allclose(single.belief, exact.belief, atol=2e-6)
    np.testing.assert_allclose(single.uncertainty, exact.uncertainty, atol=2e-6)


def test_many_images_at_once():
    logs = np.stack([opinions(seed, 4, 7) for seed in range(6)]).reshape(2, 3, 4, 7)
    fused = fuse(logs)
    assert (fused.belief.shape, fused.uncertainty.shape, fused.probabilities.shape) == ((2, 3, 7), (2, 3), (2, 3, 7))
    np.testing.assert_array_equal(fused.belief[1, 2], fuse(logs[1, 2]).belief)


NONE = np.full(1, -1e6)
"""A background that no class sees."""


def test_evidence_by_template():
    cosines = np.random.default_rng(0).uniform(-1, 1, (5, 3, 4))
    scale, bias, background = np.array([0.1, 0.05, 0.01]), np.array([0.0, -3.0, 2.0]), np.array([0.3, -0.9, 0.0])
    got, base_rate = evidence.opinions(cosines, 100.0, scale, bias, background)
    for m in range(3):
        powers = np.exp(100 * scale[m] * cosines[:, m])
        best = powers.max(axis=1, keepdims=True)
        chance, against = powers / powers.sum(axis=1, keepdims=True), powers.sum(axis=1, keepdims=True) - best
        odds = best / (against + np.exp(100 * scale[m] * background[m]))
        np.testing.assert_allclose(np.exp(got[:, m]), 4 * np.exp(bias[m]) * chance * odds, rtol=1e-9)
        if m == 0:
            np.testing.assert_allclose(base_rate, chance, rtol=1e-12)
    single = evidence.opinions(cosines.astype(np.float32), 100.0, scale, bias, background)
    assert [array.dtype for array in single] == [np.float32] * 2


@given(seed=st.integers(0, 99), classes=st.integers(2, 50), scale=st.floats(0.1, 100))
def test_one_template_is_unsure_by_the_chance_that_it_is_wrong(seed, classes, scale):
    cosines = np.random.default_rng(seed).uniform(-1, 1, (6, 1, classes))
    fused = evidence.fuse(*evidence.opinions(cosines, scale, np.ones(1), np.zeros(1), NONE))
    powers = np.exp(scale * (cosines[:, 0] - cosines.max(axis=-1)))
    chance = powers / powers.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(fused.uncertainty, 1 - chance.max(axis=1), atol=1e-12)
    np.testing.assert_allclose(fused.belief, chance * chance.max(axis=1, keepdims=True), atol=1e-12)
    np.testing.assert_allclose(fused.probabilities, chance, atol=1e-12)


@given(seed=st.integers(0, 99), templates=st.integers(1, 17), classes=st.integers(1, 40), shift=st.floats(-9, 9))
def test_probabilities_sum_to_one_and_fall_back_to_the_first_template(seed, templates, classes, shift):
    rng = np.random.default_rng(seed)
    cosines = rng.uniform(-1, 1, (3, templates, classes))
    numbers = np.linspace(1, 2, templates), np.full(templates, shift), rng.uniform(-1, 1, templates)
    logs, base_rate = evidence.opinions(cosines, 20.0, *numbers)
    np.testing.assert_allclose(evidence.fuse(logs, base_rate).probabilities.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(evidence.fuse(logs - 200, base_rate).probabilities, base_rate, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_image_of_none_of_the_classes_is_held_against_the_background(dtype):
    """However few they are: one class alone, or two of which one is a little nearer."""
    for far in ([0.05], [0.05, 0.02]):
        numbers = np.full(2, 0.5), np.zeros(2), np.full(2, 0.2)
        cosines = np.tile(np.array(far, dtype), (2, 1))
        near = cosines + np.array([[0.4] + [0.0] * (len(far) - 1)], dtype)
        unsure, sure = (evidence.fuse(*evidence.opinions(one, 100.0, *numbers)).uncertainty for one in (cosines, near))
        assert unsure > 0.99
        assert sure < 0.01


def test_a_single_class_that_nothing_is_held_against_is_sure():
    fused = evidence.fuse(*evidence.opinions(np.zeros((2, 1, 1)), 100.0, np.ones(1), np.zeros(1), NONE))
    np.testing.assert_array_equal(fused.belief, 1)
    np.testing.assert_array_equal(fused.uncertainty, 0)


def test_classes_that_tie_are_each_others_rivals():
    one, _ = evidence.opinions(np.array([[[0.5, 0.5, -1.0]]]), 100.0, np.ones(1), np.zeros(1), NONE)
    assert fuse(one).uncertainty[0] == pytest.approx(0.5)


def test_u_is_blind_to_certain_templates_that_contradict_each_other():
    """Dempster's rule takes the conflict away: two sure opposites leave no doubt, and no class has the better of it."""
    opposed = fuse(np.array([[20.0, -20.0], [-20.0, 20.0]]))
    assert opposed.uncertainty < 1e-8
    np.testing.assert_allclose(opposed.belief, 0.5, atol=1e-8)
