"""The gap, the leakage and the nearest images, against what scipy, scikit-learn and a loop say."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from invariclip.calibrate.data.pairs import fitted_moments
from invariclip.calibrate.projection.estimators import fit
from invariclip.calibrate.projection.folds import make_folds
from invariclip.calibrate.report.evidence import NATURAL, gaps, held_out_spaces, leakage
from invariclip.calibrate.report.retrieval import retrieve


def shrunk(rows):
    return fit(fitted_moments(rows), "shrinkage", None, 10.0)


def ranks(table):
    return np.random.default_rng(1).permutation(len(table.vectors))


@pytest.fixture
def table(world):
    return world.random_table(concepts=12, environments=3, width=6, kinds=2)


def test_gaps_are_those_of_all_pairs_over_all_pairs_of_classes(table):
    found = gaps(table, held_out_spaces(table, lambda rows: None, 0), 0)
    cosine = cdist(table.vectors, table.vectors, "cosine")
    # Only images of one part of the concepts stand in one space.
    spaces = held_out_spaces(table, lambda rows: None, 0)
    plain = table.unchanged
    other = [
        cosine[np.ix_(plain & space.held, plain & space.held)][
            table.labels[plain & space.held][:, None] != table.labels[plain & space.held]
        ]
        for space in spaces
    ]
    apart = np.concatenate(other).mean()
    assert found.apart == (pytest.approx(apart), None)
    assert [kind.name for kind in found.kinds] == ["k0", "k1", NATURAL]
    for code, kind in enumerate(found.kinds[:2]):
        rows = np.flatnonzero(table.kinds == code)
        assert kind.count == 36
        assert kind.before.value == pytest.approx(100 * cosine[rows, table.origins[rows]].mean() / apart)
    same = (table.concepts[:, None] == table.concepts) & plain[:, None] & plain
    same &= table.environments[:, None] < table.environments
    assert found.kinds[2].count == same.sum()
    assert found.kinds[2].before.value == pytest.approx(100 * cosine[same].mean() / apart)


def test_a_projection_narrows_the_gap_of_concepts_that_it_did_not_see(world):
    table = world.random_table(concepts=40, environments=3, width=6)
    # environments move one direction alone
    moved = table.vectors.copy()
    moved[:, 0] += 2.0 * (table.environments - 1)
    table.vectors[:] = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    spaces = held_out_spaces(table, lambda rows: fit(fitted_moments(rows), "generalised", 5), 0)
    assert len(spaces) == 4
    assert np.sum([space.held for space in spaces], axis=0).tolist() == [1] * len(table.vectors)
    found = gaps(table, spaces, 0)
    assert found.kinds[0].after.high < found.kinds[0].before.low
    reading = leakage(table, spaces, ranks(table), 0)
    assert [one.name for one in reading] == [
        "centroid, any class",
        "linear, any class",
        "centroid, within class",
        "linear, within class",
    ]
    assert reading[0].before.value > 80
    # what is cut away can be told no more, with or without the class
    for one in reading:
        assert one.after.high < one.before.low


@pytest.mark.parametrize("concepts", [12, 4])
def test_noise_tells_no_environment(world, concepts):
    values = {}
    for seed in range(25):
        table = world.random_table(concepts=concepts, environments=3, width=6)
        table.vectors[:] = np.random.default_rng(seed).normal(size=table.vectors.shape)
        spaces = held_out_spaces(table, lambda rows: None, 0)
        assert len(spaces) == (4 if concepts == 12 else 1)
        for one in leakage(table, spaces, ranks(table), 0):
            assert one.after is None
            values.setdefault(one.name, []).append(one.before.value)
    assert len(values) == 4
    for found in values.values():
        assert 22 < np.mean(found) < 45  # chance is 33; means of classes over tested images too made it 80


def test_readers_agree_with_scikit_learn(world):
    neighbors = pytest.importorskip("sklearn.neighbors")
    linear = pytest.importorskip("sklearn.linear_model")
    table = world.random_table(concepts=60, environments=3, width=6)
    table.vectors[:, 1] += 0.4 * table.environments
    spaces = held_out_spaces(table, lambda rows: None, 0)
    reading = {one.name: one.before.value for one in leakage(table, spaces, ranks(table), 0)}
    right = {"centroid": [], "linear": []}
    for space in spaces:
        train, test = ~space.held, space.held
        seen, asked = table.vectors[train], table.vectors[test]
        of, wanted = table.environments[train], table.environments[test]
        centroid = neighbors.NearestCentroid().fit(seen, of)
        right["centroid"].append(centroid.predict(asked) == wanted)
        centred = seen - seen.mean(axis=0)
        # environments are equally large here: their weights are equal
        ridge = linear.Ridge(alpha=1e-2 * np.mean(np.var(seen, axis=0)) * len(seen))
        scores = ridge.fit(centred, np.eye(3)[of]).predict(asked - seen.mean(axis=0))
        right["linear"].append(scores.argmax(axis=1) == wanted)
    for name, parts in right.items():
        assert reading[f"{name}, any class"] == pytest.approx(100 * np.concatenate(parts).mean())


def test_one_environment_has_no_leakage(world):
    table = world.random_table(environments=1, kinds=3)
    assert leakage(table, held_out_spaces(table, lambda rows: None, 0), ranks(table), 0) == []


def test_every_left_out_row_asks_once_and_finds_what_is_nearest(table):
    found = retrieve(table, shrunk, bank=None, ranks=ranks(table), seed=0)
    _, folds = make_folds(table, seed=0)
    asked = np.any([fold.queries for fold in folds], axis=0)
    assert found.left_out
    assert sorted(found.queries.tolist()) == np.flatnonzero(asked).tolist()
    for place, row in enumerate(found.queries):
        fold = next(fold for fold in folds if fold.queries[row])
        support = np.flatnonzero(fold.support)
        projection = shrunk(table.where(fold.fit))
        for vectors, answer in (
            (table.vectors, found.images.before),
            (projection.apply(table.vectors), found.images.after),
        ):
            distance = cdist(vectors[[row]], vectors[support], "cosine")[0]
            assert answer[place].tolist() == support[np.argsort(distance)[:3]].tolist()
        assert table.environments[answer[place]].tolist().count(table.environments[row]) == 0


def test_more_rows_than_can_be_asked_about_are_drawn(table, monkeypatch):
    monkeypatch.setattr("invariclip.calibrate.report.retrieval.MAX_QUERIES", 10)
    order = ranks(table)
    found = retrieve(table, lambda rows: None, bank=np.eye(12, 6), ranks=order, seed=0)
    assert len(found.queries) == 10
    assert found.images.after is None
    assert found.texts.before.shape == (10, 1)
    rest = np.setdiff1d(np.flatnonzero(np.any([fold.queries for fold in make_folds(table)[1]], axis=0)), found.queries)
    assert order[found.queries].max() < order[rest].min()
