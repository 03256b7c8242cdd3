"""The gap as a share of distances; leakage and side effects on data whose answer is known."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.calibrate.evaluation.invariance import (
    domain_leakage,
    group_distances,
    invariance_gap,
    pair_distances,
    reader_hits,
    side_effects,
)
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
    total, count = group_distances(rows, np.asarray(groups))
    assert count == len(pairs)
    assert total == pytest.approx(sum(1 - rows[a] @ rows[b] for a, b in pairs), abs=1e-10)
    first, second = (rows[[pair[side] for pair in pairs]] for side in (0, 1))
    assert pair_distances(first, second) == pytest.approx([1 - rows[a] @ rows[b] for a, b in pairs], abs=1e-12)


def world(*, shift, count=240, width=8, seed=0, shares=(0.5, 0.5, 0.5)):
    """Two classes in three environments, of different shares, each environment shifted along an axis of its own."""
    rng = np.random.default_rng(seed)
    environments = np.arange(count) % 3
    labels = (rng.random(count) < np.asarray(shares)[environments]).astype(np.int64)
    rows = 0.5 * rng.normal(size=(count, width))
    rows[:, 0] += np.where(labels == 1, 2.0, -2.0)
    rows[np.arange(count), 1 + environments] += shift
    return unit(rows), labels, environments


def test_a_shift_leaks_and_noise_does_not():
    clear, none = domain_leakage(*world(shift=2.0)), domain_leakage(*world(shift=0.0))
    assert clear.accuracy > 85
    assert abs(none.accuracy - none.chance) < 12
    assert clear.chance == pytest.approx(100 / 3)


def test_the_class_does_not_give_the_environment_away():
    """Environments hold the classes in very different shares, and nothing else tells them apart."""
    vectors, labels, environments = world(shift=0.0, shares=(0.05, 0.5, 0.95), count=600)
    assert abs(domain_leakage(vectors, labels, environments).accuracy - 100 / 3) < 10
    # were the class not taken away, it would: from the class alone more than half are right
    guess = np.asarray([0, 2])[labels]
    assert np.mean([(guess == environments)[environments == code].mean() for code in range(3)]) > 0.6


def test_it_is_the_same_for_equal_seeds_and_scales():
    vectors, labels, environments = world(shift=0.6)
    first = domain_leakage(vectors, labels, environments, seed=1)
    assert first == domain_leakage(vectors, labels, environments, seed=1)
    assert first.accuracy == pytest.approx(domain_leakage(7 * vectors, labels, environments, seed=1).accuracy, abs=0.5)


def test_a_class_of_one_environment_does_not_count():
    vectors, labels, environments = world(shift=0.0)
    alone = labels == 1
    labels = np.where(alone, 10 + environments, labels)
    only = ~alone
    assert domain_leakage(vectors, labels, environments) == domain_leakage(
        vectors[only], labels[only], environments[only]
    )
    with pytest.raises(InputError, match="class with images in two environments"):
        domain_leakage(vectors, environments, environments)


def test_readers_see_what_they_are_said_to():
    """The centroid a shift of the mean, the linear ones also a faint one; none of them what it was not shown."""
    rng = np.random.default_rng(0)
    environments = np.arange(600) % 3
    noise = rng.normal(size=(600, 8))
    test = rng.random(600) < 0.3
    shifted = noise.copy()
    shifted[np.arange(600), environments] += 4
    faint = shifted / np.asarray([100] * 3 + [1] * 5)  # the same, 100 times shorter than the noise beside it
    for reader in ("centroid", "linear", "probe"):
        found = reader_hits(shifted, environments, test, reader)
        assert not found[~test].any()
        assert found[test].mean() > 0.85
        assert abs(reader_hits(noise, environments, test, reader)[test].mean() - 1 / 3) < 0.1
        for every in (np.zeros_like(test), np.ones_like(test)):
            assert not reader_hits(shifted, environments, every, reader).any()
    assert (
        reader_hits(faint, environments, test, "linear")[test].mean()
        > reader_hits(faint, environments, test, "centroid")[test].mean()
    )


@pytest.mark.parametrize("reader", ["centroid", "linear", "probe"])
def test_a_class_of_one_image_in_each_environment_does_not_tell(reader):
    """The mean of the class is that of the images that are not tested: with all of them, noise would tell."""
    rng = np.random.default_rng(1)
    labels, environments = np.repeat(np.arange(60), 3), np.tile(np.arange(3), 60)
    rates = []
    for _ in range(20):
        test = np.zeros(180, dtype=np.bool_)
        test[np.arange(60) * 3 + rng.integers(0, 3, 60)] = True
        vectors = rng.normal(size=(180, 4)) + 5 * rng.normal(size=(60, 4))[labels]
        rates.append(reader_hits(vectors, environments, test, reader, labels=labels)[test].mean())
    assert np.mean(rates) < 0.45


WIDTH = 10


def world_of_side_effects(seed=0, count=300):
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
    rows, attributes = world_of_side_effects()
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
    rows, attributes = world_of_side_effects()
    before, after = unit(rows), without(rows, [4])
    plain = side_effects(before, after, {"colour": attributes["colour"]})[0]
    lenient = side_effects(before, after, {"colour": attributes["colour"]}, tolerance=60)[0]
    assert (plain.worse, lenient.worse) == (True, False)
    assert plain.difference == lenient.difference


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), turn=st.integers(0, 10_000))
def test_a_rotation_harms_nothing(seed, turn):
    rows, attributes = world_of_side_effects(seed, 120)
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
    rows, attributes = world_of_side_effects()
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
    rows, attributes = world_of_side_effects()
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
