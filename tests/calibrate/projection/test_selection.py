"""Selection finds what helps, says so when nothing does, and never looks at what it fits on; gains by concept."""

import json
from dataclasses import replace

import numpy as np
import pytest

from invariclip.artifact.projection import identity
from invariclip.calibrate.data.pairs import UNCHANGED, EmbeddingTable, fitted_moments
from invariclip.calibrate.fit import Calibration, FitOptions
from invariclip.calibrate.projection.candidates import (
    ProjectionCandidate,
    grid,
    needs_screening,
    screening_folds,
    screening_winners,
)
from invariclip.calibrate.projection.classifiers import fit_probe, prototypes, unit, zero_shot
from invariclip.calibrate.projection.estimators import fit
from invariclip.calibrate.projection.folds import make_folds
from invariclip.calibrate.projection.selection import Selection, concept_gains, select
from invariclip.calibrate.report.summary import projection_text
from invariclip.calibrate.report.verdict import conclude
from invariclip.errors import InputError

WIDTH, INVARIANT = 24, 8


def shifted(*, concepts=60, environments=5, nuisance=1.0, noise=0.3, seed=0):
    """Concepts in the first dimensions, environments in the others: each has an offset and a mixing of its own."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    centres = rng.normal(size=(concepts, INVARIANT))
    concept, environment = (part.ravel() for part in np.meshgrid(range(concepts), range(environments), indexing="ij"))
    free = WIDTH - INVARIANT
    offsets = nuisance * rng.normal(size=(environments, free))
    own = nuisance * rng.normal(size=(len(concept), free))
    rows = np.concatenate(
        [centres[concept] + noise * rng.normal(size=(len(concept), INVARIANT)), offsets[environment] + own], axis=1
    )
    names = tuple(map(str, range(concepts)))
    count = len(concept)
    return EmbeddingTable(
        vectors=unit(rows @ turn),
        concepts=concept,
        labels=concept,
        environments=environment,
        kinds=np.full(count, UNCHANGED),
        origins=np.arange(count),
        concept_names=names,
        label_names=names,
        environment_names=tuple("abcdefg"[:environments]),
    )


@pytest.mark.parametrize("seed", range(3))
def test_what_is_chosen_helps_in_an_unseen_environment(seed):
    table = shifted(seed=seed)
    seen, unseen = table.environments < 4, table.environments == 4
    selection = select(table.where(seen), grid(WIDTH))
    assert selection.chosen.estimator != "identity"
    A_inv = fit(
        fitted_moments(table.where(seen)),
        selection.chosen.estimator,
        selection.chosen.rank,
        selection.chosen.strength,
    ).A_inv

    def accuracy(matrix):
        z = unit(table.vectors @ matrix)
        return 100 * prototypes(z[seen], table.labels[seen], z[unseen], table.labels[unseen]).mean()

    assert accuracy(A_inv) > accuracy(np.eye(WIDTH)) + 10
    assert selection.result().gain.low > 0


def test_nothing_to_gain_gives_the_identity():
    """Noise alike in all directions: every projection only loses."""
    rng = np.random.default_rng(0)
    table = shifted(nuisance=0)
    vectors = unit(rng.normal(size=(60, WIDTH))[table.concepts] + 0.5 * rng.normal(size=table.vectors.shape))
    table = EmbeddingTable(**{**table.__dict__, "vectors": vectors})
    selection = select(table, grid(WIDTH))
    assert selection.chosen == ProjectionCandidate("identity")
    assert selection.result().gain.value == 0


def test_the_rule_takes_the_best_unless_no_projection_is_within_one_standard_error():
    clear = select(shifted(), grid(WIDTH))
    assert clear.baseline().behind < -clear.baseline().behind_error
    assert clear.result().behind == max(scored.behind for scored in clear.curve) == 0
    assert clear.baseline().gain.value == 0
    unclear = select(shifted(nuisance=0.05, concepts=12), grid(WIDTH))
    assert unclear.baseline().behind >= -unclear.baseline().behind_error
    assert unclear.chosen == ProjectionCandidate("identity")


def test_the_test_environment_is_not_looked_at():
    """Rubbish in an environment that is not in the table changes nothing, bit for bit."""
    table = shifted()
    spoiled = EmbeddingTable(
        **{**table.__dict__, "vectors": np.where((table.environments == 4)[:, None], 1.0, table.vectors)}
    )
    first, second = (select(each.where(each.environments < 4), grid(WIDTH)).to_json() for each in (table, spoiled))
    assert first == second


def test_reproducible_and_through_json():
    first, again = (select(shifted(concepts=20), grid(WIDTH), seed=3) for _ in range(2))
    assert first == again
    restored = Selection.from_json(json.loads(json.dumps(first.to_json())))
    assert restored.chosen == first.chosen
    assert restored.to_json() == first.to_json()


def test_zero_shot_and_both():
    table = shifted()
    bank = unit(np.stack([table.vectors[table.labels == code].mean(axis=0) for code in range(60)]))
    scores = {
        objective: select(table, grid(WIDTH, estimator="shrinkage"), objective=objective, bank=bank).baseline()
        for objective in ("prototypes", "zero-shot", "both")
    }
    mean = {name: scored.accuracy["mean"].value for name, scored in scores.items()}
    assert mean["both"] == pytest.approx((mean["prototypes"] + mean["zero-shot"]) / 2)


def test_captions_close_the_gap_between_modalities():
    """Images and texts in two cones: shrinking all but the gap ruins zero-shot, caption pairs shrink the gap too."""
    rng = np.random.default_rng(0)
    table = shifted(nuisance=0.7)
    centres = np.stack([table.vectors[table.labels == code].mean(axis=0) for code in range(60)])
    gap = np.concatenate([np.zeros(WIDTH), [1.0]])
    images = np.pad(table.vectors, ((0, 0), (0, 1))) - 1.5 * gap
    bank = unit(np.pad(centres + 0.02 * rng.normal(size=centres.shape), ((0, 0), (0, 1))) + 1.5 * gap)
    table = EmbeddingTable(**{**table.__dict__, "vectors": unit(images)})
    seen, unseen = table.where(table.environments < 4), table.environments == 4
    results = {}
    for captions in (False, True):
        moments = fitted_moments(seen, captions=bank if captions else None)
        A_inv = fit(moments, "shrinkage", None, 10.0).A_inv
        answers = zero_shot(unit(table.vectors[unseen] @ A_inv), table.labels[unseen], unit(bank @ A_inv))
        results[captions] = answers.mean()
    assert results[True] > results[False] + 0.1
    candidates = grid(WIDTH + 1, captions=(False, True))
    assert select(seen, candidates, objective="zero-shot", bank=bank).chosen.captions


def test_interventions_in_one_environment(world):
    table = world.random_table(concepts=20, environments=1, width=8, kinds=4)
    selection = select(table, grid(8))
    assert set(selection.result().accuracy) == {"k0", "k1", "k2", "k3", "mean"}


def test_grids():
    candidates = grid(64)
    assert candidates[0] == ProjectionCandidate("identity")
    assert len(candidates) == len(set(candidates))
    assert {candidate.estimator for candidate in candidates} == {"identity", "shrinkage", "generalised", "icm"}
    assert grid(64, estimator="icm", rank=5, strength=2.0) == [
        ProjectionCandidate("identity"),
        ProjectionCandidate("icm", 5, 2.0),
    ]
    assert {c.estimator for c in grid(64, rank=5)} == {"identity", "generalised", "icm"}
    assert grid(64, estimator="identity") == [ProjectionCandidate("identity")]
    with pytest.raises(InputError, match="only icm takes both"):
        grid(64, estimator="shrinkage", rank=5)
    assert str(ProjectionCandidate("icm", 5, 2.0)) == "icm d=5 λ=2"


def test_refusals():
    with pytest.raises(InputError, match="no projection must be among"):
        select(shifted(concepts=8), [ProjectionCandidate("icm", 2, 1.0)])
    with pytest.raises(InputError, match="zero-shot and captions need"):
        select(shifted(concepts=8), grid(WIDTH), objective="zero-shot")


def test_the_probe_is_scored_as_it_will_be_used():
    """Every score of the curve is the accuracy of a probe on the environment left out, by hand."""
    table = shifted(concepts=4, environments=3)
    table = replace(
        table,
        vectors=np.concatenate([table.vectors, shifted(concepts=4, environments=3, seed=1).vectors]),
        **{
            name: np.concatenate([getattr(table, name)] * 2) for name in ("concepts", "labels", "environments", "kinds")
        },
        origins=np.arange(24),
    )
    candidates = [ProjectionCandidate("identity"), ProjectionCandidate("shrinkage", None, 3.0)]
    selection = select(table, candidates, objective="probe")
    for scored in selection.curve:
        for code, name in enumerate(table.environment_names):
            left = table.environments == code
            pick = scored.candidate
            what = fit(fitted_moments(table.where(~left)), pick.estimator, pick.rank, pick.strength)
            z = what.apply(table.vectors)
            right = fit_probe(z[~left], table.labels[~left]).correct(z[left], table.labels[left])
            assert scored.accuracy[name].value == pytest.approx(100 * right.mean())
    assert selection.to_json()["objective"] == "probe"


def test_few_concepts_are_classes_and_images_are_resampled():
    """With seven classes a resample of classes would say little; four times the images halve the interval."""
    rng = np.random.default_rng(0)
    widths = []
    for copies in (8, 32):
        count = 4 * 3 * copies
        concepts, environments = np.arange(count) % 4, np.arange(count) // 4 % 3
        vectors = unit(rng.normal(size=(4, 6))[concepts] + 1.2 * rng.normal(size=(count, 6)))
        names = tuple("abcd")
        kinds, origins = np.full(count, UNCHANGED), np.arange(count)
        table = EmbeddingTable(vectors, concepts, concepts, environments, kinds, origins, names, names, tuple("xyz"))
        mean = (
            select(table, [ProjectionCandidate("identity"), ProjectionCandidate("shrinkage", None, 1.0)])
            .baseline()
            .accuracy["mean"]
        )
        widths.append(mean.high - mean.low)
    assert 1.4 < widths[0] / widths[1] < 2.8


@pytest.mark.parametrize("objective", ["prototypes", "both"])
def test_screening_chooses_the_same_with_the_same_scores(objective):
    table = shifted()
    bank = unit(np.random.default_rng(1).normal(size=(60, WIDTH)))
    candidates = grid(WIDTH, captions=(False, True) if objective == "both" else (False,))
    everything = select(table, candidates, objective=objective, bank=bank, screen=False)
    screened = select(table, candidates, objective=objective, bank=bank, screen=True)
    assert screened.chosen == everything.chosen
    assert len(screened.curve) < len(everything.curve)
    assert not everything.screened
    names = {str(scored.candidate) for scored in screened.curve}
    assert names | set(screened.screened) == {str(candidate) for candidate in candidates}
    assert max(screened.screened.values()) <= 0
    for scored in screened.curve:
        other = everything.result(scored.candidate)
        for ours, theirs in ((scored.gain, other.gain), (scored.accuracy["mean"], other.accuracy["mean"])):
            assert (ours.value, ours.low, ours.high) == pytest.approx((theirs.value, theirs.low, theirs.high), abs=1e-9)
        assert scored.removed == pytest.approx(other.removed, abs=1e-9)
        assert (scored.behind, scored.behind_error) == pytest.approx((other.behind, other.behind_error), abs=1e-9)
    assert Selection.from_json(json.loads(json.dumps(screened.to_json()))).screened.keys() == screened.screened.keys()


def test_screening_is_for_wide_encoders_and_takes_one_fold_of_each_environment():
    assert not needs_screening(grid(512, captions=(False, True)), 24, 512)
    assert needs_screening(grid(1280, captions=(False, True)), 24, 1280)
    assert not needs_screening([ProjectionCandidate("identity"), ProjectionCandidate("shrinkage", None, 3.0)], 24, 4096)
    _, folds = make_folds(shifted())
    few = screening_folds(folds)
    assert len({folds[place].groups[0] for place in few}) == len(few) == 5
    behind = {
        ProjectionCandidate("shrinkage", None, 1.0): -1.0, ProjectionCandidate("identity"): -9.0,
        ProjectionCandidate("shrinkage", None, 3.0): -5.0,
        ProjectionCandidate("icm", 3, 1.0): -2.0, ProjectionCandidate("generalised", 3): 0.0,
    }  # fmt: skip
    assert screening_winners(behind) == [each for each in behind if each.estimator != "icm"]


def test_folds_scored_side_by_side_answer_as_one_after_the_other(monkeypatch):
    several = select(shifted(), grid(WIDTH))
    monkeypatch.setattr("invariclip.calibrate.projection.parallel.available_threads", lambda: 1)
    assert select(shifted(), grid(WIDTH)) == several


GAIN_WIDTH = 16


def table(concepts=24, environments=3, private=0.0, seed=0):
    """Offsets of environments; and, with `private`, one direction of its own in which each concept moves."""
    rng = np.random.default_rng(seed)
    concept, environment = (part.ravel() for part in np.meshgrid(range(concepts), range(environments), indexing="ij"))
    centres, offsets = (
        rng.normal(size=(concepts, GAIN_WIDTH)),
        1.5 * rng.normal(size=(environments, GAIN_WIDTH)),
    )
    own = rng.normal(size=(concepts, GAIN_WIDTH))
    moved = private * rng.normal(size=(len(concept), 1)) * own[concept]
    moved += (1 - private) * offsets[environment] + 0.2 * rng.normal(size=(len(concept), GAIN_WIDTH))
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
        for name, matrix in (("with", A_inv), ("without", np.eye(GAIN_WIDTH))):
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
    selection = replace(select(one, grid(GAIN_WIDTH)), chosen=ProjectionCandidate("identity"))
    assert concept_gains(one, selection) is None
    assert "concepts   " not in summary(selection)


def summary(selection):
    facts = {
        "environments": {}, "images": 0, "concepts": 0, "natural_pairs": 0, "interventional_pairs": 0,
        "caption_pairs": 0, "problems": {}, "declined": {},
    }  # fmt: skip
    return projection_text(Calibration(identity(GAIN_WIDTH), selection, facts))


def told(selection):
    return conclude(Calibration(identity(GAIN_WIDTH), selection, {}), FitOptions()).sentences
