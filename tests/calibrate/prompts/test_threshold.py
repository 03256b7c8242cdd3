"""A threshold keeps its risk on simulated images whose risk is known."""

import numpy as np
import pytest

from invariclip.calibrate.prompts.threshold import choose_threshold, upper_bound
from invariclip.errors import InputError


@pytest.mark.parametrize(("wrong", "count"), [(0, 10), (3, 50), (17, 40), (40, 40)])
def test_the_bound_is_scipys(wrong, count):
    from scipy.stats import binomtest

    reference = binomtest(wrong, count).proportion_ci(confidence_level=0.9, method="exact").high  # two-sided
    assert upper_bound(wrong, count, 0.05) == pytest.approx(reference)


def _simulated(rng, count, shape):
    uncertainty = rng.uniform(size=count)
    return uncertainty, rng.uniform(size=count) < shape(uncertainty)


@pytest.mark.parametrize(
    "shape",
    [
        lambda u: 0.3 * u,  # the more uncertain, the more wrong
        lambda u: np.where(u < 0.3, 0.02, 0.6),
        lambda u: np.full_like(u, 0.11),  # says nothing, and nothing is good enough
        lambda u: 0.25 * (1 - u),  # says the contrary
    ],
    ids=["linear", "step", "useless", "reversed"],
)
def test_the_target_is_kept_as_often_as_promised(shape):
    target, confidence, draws, broken, found = 0.1, 0.8, 300, 0, 0
    fine = np.linspace(0, 1, 20_001)[1:]
    risk = np.cumsum(shape(fine)) / np.arange(1, len(fine) + 1)
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        grid = rng.uniform(size=200)
        answer = choose_threshold(*_simulated(rng, 600, shape), grid, target=target, confidence=confidence)
        if answer.value is not None:
            found += 1
            broken += np.interp(answer.value, fine, risk) > target
    # 1 - 0.8 of the draws may break it; four standard errors above that would be no chance
    assert broken / draws <= 0.2 + 4 * np.sqrt(0.2 * 0.8 / draws)
    if shape(np.asarray([0.1]))[0] < 0.05:
        assert found > 0.7 * draws  # a threshold that is there is found


def test_more_images_find_a_more_lenient_threshold():
    values = []
    for count in (150, 20_000):
        rng = np.random.default_rng(0)
        uncertainty, wrong = _simulated(rng, count, lambda u: 0.2 * u)
        values.append(choose_threshold(uncertainty, wrong, rng.uniform(size=500), target=0.06, confidence=0.95).value)
    assert values[0] is None or values[0] < values[1]
    assert values[1] == pytest.approx(0.6, abs=0.08)  # the risk at u is u / 10


def test_where_nothing_can_be_proved_that_is_said():
    answer = choose_threshold(
        np.linspace(0, 1, 20), np.zeros(20, bool), np.linspace(0, 1, 20), target=0.05, confidence=0.95
    )
    assert answer.value is None
    assert "no threshold was proved" in answer.sentence()
    good = choose_threshold(
        np.linspace(0, 1, 500), np.zeros(500, bool), np.linspace(0, 1, 50), target=0.05, confidence=0.95
    )
    assert (good.value, good.accepted, good.wrong) == (1.0, 500, 0)
    assert good.bound < 0.05
    assert "abstain above 1" in good.sentence()


def test_nothing_held_back_is_refused():
    with pytest.raises(InputError, match="held back"):
        choose_threshold(np.empty(0), np.empty(0, bool), np.ones(3), target=0.1, confidence=0.9)
