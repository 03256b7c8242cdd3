"""The gain told apart for concepts that were fitted and concepts that were not."""

import json
from dataclasses import replace

import numpy as np
import pytest

from invariclip.artifact.projection import identity
from invariclip.calibrate.data.pairs import UNCHANGED, EmbeddingTable, fitted_moments
from invariclip.calibrate.fit import Calibration, FitOptions
from invariclip.calibrate.projection.candidates import ProjectionCandidate, grid
from invariclip.calibrate.projection.classifiers import prototypes, unit
from invariclip.calibrate.projection.estimators import fit
from invariclip.calibrate.projection.folds import make_folds
from invariclip.calibrate.projection.selection import Selection, concept_gains, select
from invariclip.calibrate.report.summary import projection_text
from invariclip.calibrate.report.verdict import conclude

WIDTH = 16


def table(concepts=24, environments=3, private=0.0, seed=0):
    """Offsets of environments; and, with `private`, one direction of its own in which each concept moves."""
    rng = np.random.default_rng(seed)
    concept, environment = (part.ravel() for part in np.meshgrid(range(concepts), range(environments), indexing="ij"))
    centres, offsets = rng.normal(size=(concepts, WIDTH)), 1.5 * rng.normal(size=(environments, WIDTH))
    own = rng.normal(size=(concepts, WIDTH))
    moved = private * rng.normal(size=(len(concept), 1)) * own[concept]
    moved += (1 - private) * offsets[environment] + 0.2 * rng.normal(size=(len(concept), WIDTH))
    rows = centres[concept] + moved
    names = tuple(map(str, range(concepts)))
    return EmbeddingTable(
        vectors=unit(rows), concepts=concept, labels=concept, environments=environment,
        kinds=np.full(len(concept), UNCHANGED), origins=np.arange(len(concept)), concept_names=names,
        label_names=names, environment_names=tuple("abcde"[:environments]),
    )  # fmt: skip


def with_gains(one, candidate=ProjectionCandidate("shrinkage", None, 1.0)):  # noqa: B008 (it is frozen)
    selection = replace(select(one, [ProjectionCandidate("identity"), candidate]), chosen=candidate)
    return replace(selection, by_concept=concept_gains(one, selection))


def test_folds_of_fitted_concepts_are_the_same_fits():
    one = table()
    (said, left), (again, fitted) = make_folds(one), make_folds(one, fitted=True)
    assert said == again
    for a, b in zip(left, fitted, strict=True):
        np.testing.assert_array_equal(a.fit, b.fit)
        np.testing.assert_array_equal(a.support, b.support)
        assert not (a.queries & b.queries).any()
        assert not (b.queries & b.fit).any()  # the environment is left out for both
        assert not np.isin(one.concepts[a.queries], one.concepts[a.fit]).any()
        assert np.isin(one.concepts[b.queries], one.concepts[b.fit]).all()


def test_the_gains_are_those_of_the_folds_by_hand():
    one = table()
    selection = with_gains(one)
    gains = selection.by_concept
    assert gains.unfitted == selection.result().gain
    right = {name: {} for name in ("with", "without")}
    for fold in make_folds(one, fitted=True)[1]:
        A_inv = fit(fitted_moments(one.where(fold.fit)), "shrinkage", None, 1.0).A_inv
        for name, matrix in (("with", A_inv), ("without", np.eye(WIDTH))):
            seen = unit(one.vectors @ matrix)
            support, queries = ((seen[mask], one.labels[mask]) for mask in (fold.support, fold.queries))
            right[name].setdefault(fold.groups[0], []).extend(prototypes(*support, *queries))
    mean = {name: np.mean([np.mean(own) for own in by.values()]) for name, by in right.items()}
    assert gains.fitted.value == pytest.approx(100 * (mean["with"] - mean["without"]), abs=1e-9)


def test_where_each_concept_moves_its_own_way_the_gain_is_on_fitted_ones():
    one = table(concepts=8, environments=5, private=1.0)
    gains = with_gains(one, ProjectionCandidate("shrinkage", None, 100.0)).by_concept
    assert gains.fitted.value > gains.unfitted.value + 5


def test_it_is_kept_and_told():
    selection = with_gains(table())
    assert Selection.from_json(json.loads(json.dumps(selection.to_json()))).to_json() == selection.to_json()
    gains = selection.by_concept
    text = summary(selection)
    assert f"concepts   {gains.unfitted.value:+.1f} [" in text
    assert "on concepts that were not fitted, which is the verdict's gain" in text
    low, high = gains.fitted.low, gains.fitted.high
    assert f"{gains.fitted.value:+.1f} [{low:+.1f}, {high:+.1f}] on concepts that were" in text
    (sentence,) = (s for s in told(selection) if "concepts" in s and "fitted" in s and "scored in the same folds" in s)
    assert sentence.startswith("That is on concepts that were not fitted: ")


def test_too_few_concepts_to_leave_any_out_is_said():
    selection = with_gains(table(concepts=6, environments=4))
    assert selection.by_concept.unfitted is None
    assert selection.by_concept.fitted == selection.result().gain
    assert "on concepts that were fitted; too few to leave any out, so not known of others" in summary(selection)
    assert any("too few to leave any out, so nothing is known of others" in sentence for sentence in told(selection))


def test_without_a_projection_there_is_nothing_to_tell_apart():
    one = table()
    selection = replace(select(one, grid(WIDTH)), chosen=ProjectionCandidate("identity"))
    assert concept_gains(one, selection) is None
    assert "concepts   " not in summary(selection)


def summary(selection):
    facts = {
        "environments": {}, "images": 0, "concepts": 0, "natural_pairs": 0, "interventional_pairs": 0,
        "caption_pairs": 0, "problems": {}, "declined": {},
    }  # fmt: skip
    return projection_text(Calibration(identity(WIDTH), selection, facts))


def told(selection):
    return conclude(Calibration(identity(WIDTH), selection, {}), FitOptions()).sentences
