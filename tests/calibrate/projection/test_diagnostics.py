"""The facts of a fit against their definitions, and how far refits stray on data whose spread is known."""

import json

import numpy as np
import pytest
from scipy.linalg import subspace_angles

from invariclip.artifact.projection import identity
from invariclip.calibrate.data.moments import empty, of_pairs, of_points
from invariclip.calibrate.data.pairs import GROUPS, Sources, fitted_moments, group_of, grouped_moments
from invariclip.calibrate.projection.diagnostics import confidence, default_resamples, diagnose, energies, few
from invariclip.calibrate.projection.estimators import fit
from invariclip.errors import InputError


def sample(count, width=6):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(count, width)) * np.linspace(0.5, 2, width)
    return of_points(rows) + of_pairs(rows, rows + rng.normal(size=(count, width)))


def test_facts_are_what_they_say():
    moments = sample(100)
    projection = fit(moments, "icm", 3, 2.0)
    facts = json.loads(json.dumps(diagnose(projection, moments)))
    assert facts["sigma"]["condition"] == pytest.approx(np.linalg.cond(moments.sigma), rel=1e-3)
    assert facts["sigma_delta"]["condition"] == pytest.approx(np.linalg.cond(moments.sigma_delta), rel=1e-3)
    assert facts["sigma_delta"] | {"condition": 0} == {"effective": 100.0, "condition": 0, "rank": 6, "identity": 0.0}
    assert facts["spectrum"][0] == pytest.approx(projection.eigenvalues[0], rel=1e-5)
    assert facts["spectrum"][-1] == pytest.approx(projection.eigenvalues[-1], rel=1e-5)
    kept = projection.A_inv
    share = np.trace(kept.T @ moments.sigma @ kept) / np.trace(moments.sigma)
    assert facts["kept_variation"] == pytest.approx(share, abs=1e-4)
    assert not few(facts, 6)


def test_little_data_and_singular_moments():
    moments = sample(4)
    facts = diagnose(fit(moments, "generalised", 2), moments)
    assert (facts["sigma"]["condition"], facts["sigma"]["rank"]) == (None, 4)
    assert 0 < facts["sigma"]["identity"] < 1
    assert facts["mixed"] == min(facts["sigma_delta"]["identity"], 0.999) > 0
    assert diagnose(fit(moments, "shrinkage", None, 1.0), moments)["mixed"] == 0
    assert few(facts, 6)


def test_without_projection_all_is_kept():
    facts = diagnose(identity(6), sample(50))
    assert (facts["kept_variation"], facts["kept_movement"], facts["spectrum"]) == (1.0, 1.0, None)


def test_no_movement_is_no_division_by_zero():
    rows = np.eye(4)
    moments = of_points(rows) + of_pairs(rows, rows)
    assert energies(identity(4), moments) == {"kept_variation": 1.0, "kept_movement": 0.0}
    facts = diagnose(identity(4), moments)
    assert (facts["sigma_delta"]["rank"], facts["sigma_delta"]["condition"]) == (0, None)


WIDTH, KEPT = 12, 4
HOW = [("icm", KEPT, 3.0), ("generalised", KEPT, None), ("shrinkage", None, 3.0)]


def drawn(seed, count):
    """Movement along all but the first four axes, with noise on those."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, WIDTH))
    scale = np.concatenate([np.full(KEPT, 0.4), np.geomspace(1, 6, WIDTH - KEPT)])
    return rows, rows + rng.normal(size=(count, WIDTH)) * scale


def groups(seed, count):
    return [of_points(a) + of_pairs(a, b) for a, b in (drawn([seed, group], count) for group in range(20))]


@pytest.mark.parametrize(("estimator", "rank", "strength"), HOW)
def test_more_pairs_are_surer(estimator, rank, strength):
    few, many = (confidence(groups(0, count), estimator, rank, strength, seed=1) for count in (6, 200))
    for name in ("largest", "mean", "deviation"):
        less, more = getattr(few, name), getattr(many, name)
        assert 0 < more.median < less.median
        assert more.median <= more.high
        if name != "deviation":
            assert less.high <= 90
    assert few.largest.median > few.mean.median


@pytest.mark.parametrize(("estimator", "rank", "strength"), HOW[:2])
def test_it_is_about_what_fresh_data_would_give(estimator, rank, strength):
    """The bootstrap's angle between fits is near the angle between fits of independent sets of the same size."""
    sets = [sum(groups(seed, 30), empty(WIDTH)) for seed in range(30)]
    truth = sum(sets, empty(WIDTH))
    far = [
        np.degrees(
            subspace_angles(fit(truth, estimator, rank, strength).A_inv, fit(one, estimator, rank, strength).A_inv)
        )
        for one in sets
    ]
    told = confidence(groups(0, 30), estimator, rank, strength, resamples=200)
    assert told.mean.median == pytest.approx(np.median(np.mean(far, axis=1)), rel=0.4)
    assert told.largest.median == pytest.approx(np.median(np.max(far, axis=1)), rel=0.4)


def test_reproducible_and_by_seed():
    parts = groups(0, 20)
    assert confidence(parts, "icm", KEPT, 3.0, seed=3) == confidence(parts, "icm", KEPT, 3.0, seed=3)
    assert confidence(parts, "icm", KEPT, 3.0, seed=3) != confidence(parts, "icm", KEPT, 3.0, seed=4)
    assert json.loads(json.dumps(confidence(parts, "icm", KEPT, 3.0).to_json()))["groups"] == 20


def test_parts_without_movement_are_not_drawn():
    parts = groups(0, 20)
    rows = drawn(9, 5)[0]
    still = of_points(rows) + of_pairs(rows, rows)
    found = confidence([*parts, still, of_points(rows)], "generalised", KEPT)
    assert found.groups == 20
    # Images apart from the pairs leave every resample with a Σ.
    split = [of_pairs(*drawn([0, group], 20)) for group in range(5)]
    assert confidence([*split, of_points(rows)], "shrinkage", None, 1.0).groups == 5
    assert confidence([split[0] + of_points(rows), *split[1:]], "icm", KEPT, 1.0).groups == 5


def test_nothing_to_be_unsure_of():
    parts = groups(0, 20)
    assert confidence(parts, "identity") is None
    assert confidence(parts, "icm", None, 1.0) is None
    assert confidence(parts, "icm", WIDTH, 1.0) is None
    assert confidence(parts[:1], "icm", KEPT, 1.0) is None
    with pytest.raises(InputError, match="there are none"):
        confidence([], "icm", KEPT, 1.0)


def test_equal_groups_leave_no_doubt():
    found = confidence(groups(0, 20)[:1] * 6, "shrinkage", None, 2.0)
    assert found.deviation.high == pytest.approx(0, abs=1e-9)
    # arccos near one turns 1e-16 into 1e-6 degrees
    assert found.largest.high < 1e-4


def test_groups_are_by_content():
    assert [group_of(f"c{i}", 0) for i in range(5)] == [group_of(f"c{i}", 0) for i in range(5)]
    filled = {group_of(f"c{i}", 1) for i in range(400)}
    assert filled == set(range(GROUPS))


@pytest.mark.parametrize("sources", [Sources(), Sources(interventions=False)])
def test_groups_of_a_table_add_up(world, sources):
    table = world.random_table(concepts=40, kinds=2)
    captions = np.random.default_rng(0).normal(size=(40, 6))
    parts = grouped_moments(table, sources, captions=captions, seed=2)
    whole = fitted_moments(table, sources, captions=captions, seed=2)
    total = sum(parts, empty(6))
    assert (total.points, total.pairs) == (whole.points, whole.pairs)
    assert np.allclose(total.point_outer, whole.point_outer, rtol=1e-12)
    assert np.allclose(total.pair_outer, whole.pair_outer, rtol=1e-12)
    assert len(parts) > 10


def test_fewer_resamples_for_wide_embeddings():
    counts = [default_resamples(width) for width in (16, 512, 768, 4096)]
    assert counts == [100, 20, 12, 12]
