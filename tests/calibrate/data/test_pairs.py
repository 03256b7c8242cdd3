"""Pairs: who is paired with whom, and what each weighs."""

from itertools import combinations

import numpy as np
import pytest

from invariclip.calibrate.data.pairs import Sources, fitted_moments, interventional_pairs, natural_pairs


def test_all_environment_pairs_of_every_concept(world):
    table = world.random_table(concepts=4, environments=3, kinds=2)
    pairs = natural_pairs(table)
    assert len(pairs) == 4 * 3
    assert (table.concepts[pairs.first] == table.concepts[pairs.second]).all()
    assert (table.environments[pairs.first] != table.environments[pairs.second]).all()
    assert table.unchanged[pairs.first].all()
    assert table.unchanged[pairs.second].all()
    seen = {frozenset((int(a), int(b))) for a, b in zip(pairs.first, pairs.second, strict=True)}
    assert len(seen) == len(pairs)


def test_a_concept_weighs_its_degrees_of_freedom(world):
    table = world.random_table(concepts=3, environments=4)
    # concept 1 stands in two environments only, concept 2 in one
    mask = (table.concepts == 0) | ((table.concepts == 1) & (table.environments < 2)) | (table.environments == 0)
    part = table.where(mask)
    pairs = natural_pairs(part)
    weight = np.bincount(part.concepts[pairs.first], weights=pairs.weights, minlength=3)
    assert weight == pytest.approx([3, 1, 0])


def test_natural_pairs_give_the_pooled_within_concept_covariance(world):
    table = world.random_table(concepts=5, environments=4)
    moments = fitted_moments(table)
    within = sum(np.cov(table.vectors[table.concepts == code].T) for code in range(5)) / 5
    assert np.allclose(moments.sigma_delta, 2 * within)


def test_many_images_of_a_class_are_sampled_with_the_same_weight(world):
    table = world.random_table(concepts=1, environments=2)
    big = table.where(np.ones(2, dtype=bool))
    big = type(big)(
        **{
            **big.__dict__,
            "vectors": np.repeat(big.vectors, 50, axis=0),
            "concepts": np.zeros(100, dtype=int),
            "labels": np.zeros(100, dtype=int),
            "environments": np.repeat([0, 1], 50),
            "kinds": np.full(100, -1),
            "origins": np.arange(100),
        }
    )
    pairs = natural_pairs(big, seed=1)
    assert len(pairs) == 64
    assert pairs.weights.sum() == pytest.approx(1)
    again = natural_pairs(big, seed=1)
    assert np.array_equal(pairs.first, again.first)
    assert len({*zip(pairs.first, pairs.second, strict=True)}) == 64


def test_changed_versions_share_their_images_weight(world):
    table = world.random_table(concepts=3, environments=2, kinds=3)
    pairs = interventional_pairs(table)
    assert len(pairs) == 18
    assert (table.origins[pairs.second] == pairs.first).all()
    assert np.bincount(pairs.first, weights=pairs.weights) == pytest.approx(np.ones(6))
    assert len(interventional_pairs(table, kinds=[1])) == 6


def test_sources_count_the_same(world):
    table = world.random_table(concepts=6, environments=3, kinds=1)
    natural, changed = natural_pairs(table), interventional_pairs(table)
    captions = np.random.default_rng(0).normal(size=(6, 6))
    asked = [(Sources(True, False), None), (Sources(False, True), None), (Sources(False, False), captions)]
    alone = [fitted_moments(table, sources, captions=texts).sigma_delta for sources, texts in asked]
    both = fitted_moments(table)
    assert np.allclose(both.sigma_delta, sum(alone[:2]) / 2)
    everything = fitted_moments(table, captions=captions)
    assert np.allclose(everything.sigma_delta, sum(alone) / 3)
    deltas = table.vectors[table.unchanged] - captions[table.labels[table.unchanged]]
    assert np.allclose(alone[2], deltas.T @ deltas / len(deltas))
    assert both.pairs == len(natural) + len(changed)


def test_rows_go_with_their_image(world):
    table = world.random_table(concepts=4, environments=2, kinds=2)
    part = table.where(table.environments == 1)
    assert (part.environments == 1).all()
    assert np.allclose(part.vectors[part.origins][part.unchanged], part.vectors[part.unchanged])
    assert (part.concepts[part.origins] == part.concepts).all()
    lone = table.where(~table.unchanged)  # images gone: their versions go too
    assert len(lone.vectors) == 0


def test_nothing_to_pair(world):
    table = world.random_table(concepts=4, environments=1)
    assert len(natural_pairs(table)) == 0
    assert len(list(combinations(range(1), 2))) == 0
    assert fitted_moments(table).pairs == 0
