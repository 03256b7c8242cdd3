"""Attributes that nobody asked about: told apart from those that a map harms, without being fooled by twins."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.calibrate.evaluation.invariance import side_effects
from invariclip.calibrate.projection.classifiers import unit
from invariclip.errors import InputError

WIDTH = 10


def world(seed=0, count=300):
    """Three attributes along axes of their own: `style` 0, `group` 1 to 3, `colour` 4; the rest is noise."""
    rng = np.random.default_rng(seed)
    style, group, colour = (rng.integers(n, size=count) for n in (2, 3, 2))
    rows = 0.4 * rng.normal(size=(count, WIDTH))
    rows[:, 0] += np.where(style, 1, -1)
    rows[np.arange(count), 1 + group] += 1.5
    rows[:, 4] += np.where(colour, 1, -1)
    return rows, {"style": style, "group": group, "colour": colour}


def without(rows, axes):
    kept = rows.copy()
    kept[:, axes] = 0
    return unit(kept)


@pytest.mark.parametrize("reader", ["centroid", "linear", "probe"])
def test_what_a_map_takes_away_is_flagged_and_the_rest_is_not(reader):
    rows, attributes = world()
    found = {e.attribute: e for e in side_effects(unit(rows), without(rows, [0, 4]), attributes, reader=reader)}
    assert list(found) == list(attributes)
    assert [name for name, effect in found.items() if effect.worse] == ["style", "colour"]
    assert found["colour"].before.value > 85
    assert abs(found["colour"].after.value - 50) < 12
    assert found["group"].chance == pytest.approx(100 / 3)
    assert found["group"].difference.value >= 0
    for effect in found.values():
        assert effect.difference.value == pytest.approx(effect.after.value - effect.before.value)
        assert effect.difference.low <= effect.difference.value <= effect.difference.high
        assert effect.worse == (effect.difference.high < 0)
    assert json.loads(json.dumps(found["style"].to_json()))["worse"] is True


def test_a_tolerance_lets_small_losses_pass():
    rows, attributes = world()
    before, after = unit(rows), without(rows, [4])
    plain = side_effects(before, after, {"colour": attributes["colour"]})[0]
    lenient = side_effects(before, after, {"colour": attributes["colour"]}, tolerance=60)[0]
    assert (plain.worse, lenient.worse) == (True, False)
    assert plain.difference == lenient.difference


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), turn=st.integers(0, 10_000))
def test_a_rotation_harms_nothing(seed, turn):
    rows, attributes = world(seed, 120)
    rotation = np.linalg.qr(np.random.default_rng(turn).normal(size=(WIDTH, WIDTH)))[0]
    for effect in side_effects(unit(rows), unit(rows @ rotation), attributes, resamples=50):
        assert effect.difference.value == effect.difference.low == effect.difference.high == 0
        assert not effect.worse


def test_groups_are_left_out_as_a_whole():
    """Twins of an image would give an attribute away that is told by nothing but who the image is."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 5)
    rows = unit(rng.normal(size=(60, 80))[groups] + 0.1 * rng.normal(size=(300, 80)))
    attribute = {"coin": rng.integers(2, size=60)[groups]}
    alone = side_effects(rows, rows, attribute, reader="linear")[0]
    whole = side_effects(rows, rows, attribute, groups=groups, reader="linear")[0]
    assert alone.before.value > 95
    assert abs(whole.before.value - 50) < 25
    # and sixty groups say less than three hundred rows would
    assert whole.before.high - whole.before.low > alone.before.high - alone.before.low


def test_unknown_values_and_values_of_one_group_are_left_out():
    rows, attributes = world()
    after = without(rows, [4])
    colour = attributes["colour"].copy()
    colour[::3] = -1
    part = side_effects(unit(rows), after, {"colour": colour})[0]
    kept = colour >= 0
    assert part == side_effects(unit(rows)[kept], after[kept], {"colour": colour[kept]})[0]
    rare = attributes["colour"].copy()
    rare[7] = 9
    assert side_effects(unit(rows), after, {"colour": rare})[0].chance == 50


def test_refusals():
    rows, attributes = world()
    rows = unit(rows)
    with pytest.raises(InputError, match="no attribute"):
        side_effects(rows, rows, {})
    with pytest.raises(InputError, match="300 embeddings before the map, and 299 rows of `after`"):
        side_effects(rows, rows[1:], attributes)
    with pytest.raises(InputError, match="and 2 rows of style"):
        side_effects(rows, rows, {"style": attributes["style"][:2]})
    with pytest.raises(InputError, match="'style' needs two values that two groups have each, and has 1"):
        side_effects(rows, rows, {"style": np.zeros(300, dtype=np.int64)})
    with pytest.raises(InputError, match="not finite"):
        side_effects(rows, np.where(rows > 0, np.nan, rows), attributes)
    with pytest.raises(InputError, match="tolerance"):
        side_effects(rows, rows, attributes, tolerance=-1)
