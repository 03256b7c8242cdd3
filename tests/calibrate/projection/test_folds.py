"""What is left out is really left out."""

import numpy as np
import pytest

from invariclip.calibrate.projection.folds import CHANGED, make_folds
from invariclip.errors import InputError


def test_environment_kinds_and_concepts_are_left_out(world):
    table = world.random_table(concepts=12, environments=3, kinds=4)
    said, folds = make_folds(table)
    assert said == "each of 3 environments in turn, half of the kinds of intervention and a quarter of the concepts"
    assert len(folds) == 3 * 2 * 4
    for fold in folds:
        for column in (table.environments, table.concepts):
            assert not set(column[fold.fit]) & set(column[fold.queries])
        scored_kinds = set(table.kinds[fold.queries]) - {-1}
        assert scored_kinds
        assert not set(table.kinds[fold.fit]) & scored_kinds
        assert table.unchanged[fold.support].all()
        assert not set(table.environments[fold.support]) & set(table.environments[fold.queries])
        assert len(fold.groups) == fold.queries.sum()


def test_everything_is_scored_and_named(world):
    table = world.random_table(concepts=12, environments=3, kinds=4)
    _, folds = make_folds(table)
    times = sum(fold.queries.astype(int) for fold in folds)
    assert (times[table.unchanged] == 2).all()  # once with each half of the kinds
    assert (times[~table.unchanged] == 1).all()
    for fold in folds:
        plain = table.unchanged[fold.queries]
        assert all(name.endswith(CHANGED) != bool(flag) for name, flag in zip(fold.groups, plain, strict=True))


def test_without_interventions(world):
    _, folds = make_folds(world.random_table(concepts=12, environments=3))
    assert len(folds) == 3 * 4
    assert not any(name.endswith(CHANGED) for fold in folds for name in fold.groups)


def test_two_environments_leave_concepts_out(world):
    table = world.random_table(concepts=12, environments=2)
    said, folds = make_folds(table)
    assert "neither can be left out" in said
    for fold in folds:
        assert not set(table.concepts[fold.fit]) & set(table.concepts[fold.queries])
        assert set(table.environments[fold.fit]) == {0, 1}


def test_one_environment_leaves_kinds_out(world):
    table = world.random_table(concepts=12, environments=1, kinds=3)
    said, folds = make_folds(table)
    assert said.startswith("each of 3 kinds of intervention in turn")
    for fold in folds:
        assert not set(table.kinds[fold.fit]) & set(table.kinds[fold.queries])
        assert set(fold.groups) <= {"k0", "k1", "k2"}


def test_few_concepts_stay_together(world):
    table = world.random_table(concepts=5, environments=3)
    said, folds = make_folds(table)
    assert "no concepts" in said
    assert len(folds) == 3


def test_parts_are_equal_and_depend_on_names_and_seed_alone(world):
    table = world.random_table(concepts=12, environments=3)
    sizes = [len(set(table.concepts[fold.queries])) for fold in make_folds(table)[1]]
    assert sizes == [3] * 12
    fewer = table.where(table.environments != 0)
    rows = table.environments != 0
    for fold, small in zip(make_folds(table)[1][4:], make_folds(fewer)[1][0:4], strict=False):
        assert np.array_equal(np.unique(table.concepts[rows & fold.queries]), np.unique(fewer.concepts[small.queries]))


@pytest.mark.parametrize(("environments", "kinds", "concepts"), [(1, 0, 12), (1, 1, 12), (2, 0, 5)])
def test_nothing_to_leave_out(world, environments, kinds, concepts):
    with pytest.raises(InputError, match="nothing can be left out"):
        make_folds(world.random_table(concepts=concepts, environments=environments, kinds=kinds))
