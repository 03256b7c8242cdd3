"""The energy of logits as an uncertainty: its value, its order, and where it lies."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from invariclip.uncertainty import energy, energy_uncertainty

SCALE = 100.0
cosines = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.floats(-1, 1))


@given(cosines)
def test_the_value_is_that_of_the_formula(given_):
    logits = SCALE * given_
    for row, got in zip(logits, energy(logits), strict=True):
        # Summed exactly, so that the largest logit need not be taken out
        total = sum(Fraction(math.exp(value)) for value in row.tolist())
        assert got == pytest.approx(-(math.log(total.numerator) - math.log(total.denominator)), abs=1e-9)
    near = (-energy(logits) - math.log(logits.shape[1])) / SCALE
    np.testing.assert_allclose(energy_uncertainty(logits, SCALE), (1 - near) / 2, rtol=0, atol=1e-7)


@given(cosines, st.booleans())
def test_it_is_from_0_to_1_and_float32_logits_give_the_same(given_, sigmoid):
    logits = SCALE * given_
    unsure = energy_uncertainty(logits, SCALE, sigmoid=sigmoid)
    assert unsure.dtype == np.float32
    assert ((unsure >= 0) & (unsure <= 1)).all()
    np.testing.assert_allclose(
        energy_uncertainty(logits.astype(np.float32), SCALE, sigmoid=sigmoid), unsure, rtol=0, atol=1e-4
    )


@given(arrays(np.float64, (2, 5), elements=st.floats(-1, 1)))
def test_images_are_ordered_as_the_energy_orders_them(given_):
    plain = energy(SCALE * given_)
    assume(abs(plain[0] - plain[1]) > 1e-3)
    unsure = energy_uncertainty(SCALE * given_, SCALE)
    assert (unsure[0] < unsure[1]) == (plain[0] < plain[1])


def test_the_ends():
    assert energy_uncertainty(np.full((1, 4), SCALE), SCALE) == 0
    assert energy_uncertainty(np.full((1, 4), -SCALE), SCALE) == 1
    assert energy_uncertainty(np.zeros((1, 1)), SCALE) == 0.5
    # float32 cosines may be beyond 1
    assert energy_uncertainty(np.full((1, 4), SCALE * 1.0000002, np.float32), SCALE) == 0
    assert np.isnan(energy_uncertainty(np.array([[np.nan, 1.0]]), SCALE))


def test_a_softmax_is_sure_of_the_nearest_and_the_energy_is_not():
    near, far = np.array([[30.0, 20.0]]), np.array([[15.0, 5.0]])
    assert energy_uncertainty(far, SCALE) > energy_uncertainty(near, SCALE)


@given(arrays(np.float64, (3, 4), elements=st.floats(-30, 30)))
def test_of_a_sigmoid_it_is_the_chance_of_none(logits):
    chance = np.prod(1 - 1 / (1 + np.exp(-logits)), axis=1)
    np.testing.assert_allclose(energy_uncertainty(logits, SCALE, sigmoid=True), chance, rtol=0, atol=1e-6)


def test_a_sigmoid_does_not_overflow():
    far = np.array([[1e4, -1e4], [-1e4, -1e4]])
    np.testing.assert_array_equal(energy_uncertainty(far, SCALE, sigmoid=True), [0, 1])
