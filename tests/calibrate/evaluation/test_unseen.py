"""An unseen environment is scored from training environments alone, whatever codes its table has."""

from dataclasses import replace

import numpy as np
import pytest

from invariclip.artifact.projection import Projection, identity
from invariclip.calibrate.evaluation.unseen import answers, base_classes, shared_labels
from invariclip.calibrate.projection.classifiers import choose_penalty, fit_probe, prototypes, unit
from invariclip.errors import InputError


@pytest.fixture
def tables(world):
    table = world.random_table(concepts=5, environments=4, kinds=2, seed=1)
    return table.where(table.environments < 3), table.where(table.environments == 3)


def test_probe_and_prototypes_agree_with_a_direct_computation(tables):
    seen, unseen = tables
    matrix = np.random.default_rng(0).normal(size=(6, 4))
    what = Projection(matrix, "icm")
    plain, new = seen.where(seen.unchanged), unseen.where(unseen.unchanged)
    shown, queries = unit(plain.vectors @ matrix), unit(new.vectors @ matrix)
    probe = fit_probe(shown, plain.labels)
    own = fit_probe(shown, plain.labels, choose_penalty(shown, plain.labels, plain.environments))
    assert np.array_equal(answers(what, seen, unseen, "probe"), probe.predict(queries) == new.labels)
    assert np.array_equal(answers(what, seen, unseen, "probe, own C"), own.predict(queries) == new.labels)
    expected = prototypes(shown, plain.labels, queries, new.labels)
    assert np.array_equal(answers(what, seen, unseen, "prototypes"), expected)


def test_the_test_labels_change_no_answer_but_its_verdict(tables):
    """Shifting the test labels by one makes right what was answered so, and nothing else moves."""
    seen, unseen = tables
    named = []
    for shift in range(5):
        turned = replace(unseen, labels=(unseen.labels + shift) % 5)
        named.append(answers(identity(6), seen, turned, "probe"))
    assert np.array_equal(np.sum(named, axis=0), np.ones(len(named[0])))


def test_codes_are_matched_by_name_and_a_new_class_is_wrong(tables):
    seen, unseen = tables
    order = np.asarray([4, 2, 0, 1, 3])
    place = np.argsort(order)
    renamed = replace(
        unseen, labels=place[unseen.labels], label_names=tuple(unseen.label_names[code] for code in order)
    )
    for way in ("probe", "prototypes"):
        assert np.array_equal(answers(identity(6), seen, unseen, way), answers(identity(6), seen, renamed, way))
    stranger = replace(unseen, label_names=("new", *unseen.label_names[1:]))
    assert (shared_labels(stranger, seen)[unseen.labels == 0] == -1).all()
    plain = unseen.labels[unseen.unchanged]
    assert not answers(identity(6), seen, stranger, "prototypes")[plain == 0].any()


def test_zero_shot_needs_names(tables):
    seen, unseen = tables
    with pytest.raises(InputError, match="text tower"):
        answers(identity(6), seen, unseen, "zero-shot")
    bank = unit(np.stack([seen.vectors[seen.labels == label].mean(axis=0) for label in range(5)]))
    right = answers(identity(6), seen, unseen, "zero-shot", bank=bank)
    new = unseen.where(unseen.unchanged)
    assert np.array_equal(right, np.argmax(new.vectors @ bank.T, axis=1) == new.labels)


def test_half_of_the_classes_is_drawn_from_their_names():
    names = [f"class {index}" for index in range(7)]
    base = base_classes(names, 0)
    assert len(base) == 4
    assert base == base_classes(names[::-1], 0)
    assert len({base_classes(names, seed) for seed in range(10)}) > 3
