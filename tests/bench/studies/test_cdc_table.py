"""CDC's table: rows that answer, seeds put together, a page of the figures alone."""

import json

import numpy as np
import pytest

from invariclip.artifact.learned_prompts import LearnedPrompts
from invariclip.bench.studies.cdc import report, trial
from invariclip.bench.studies.cdc.report import plot, render, summarise


@pytest.fixture
def scored():
    """Scores of every row under two seeds, on made-up embeddings."""
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(9, 6, 8))
    bank /= np.linalg.norm(bank, axis=2, keepdims=True)
    found = {}
    for seed in range(2):
        for row, options in trial.ROWS.items():
            learned = options.learned if options else 1
            semantics = LearnedPrompts(
                np.zeros((learned, 4, 2), np.float32), np.ones(learned + 1), np.zeros(learned + 1),
                np.full(learned + 1, 0.1), ("a {}",), "0" * 64,
            )  # fmt: skip
            scores = {}
            for group in (trial.SEEN, trial.UNSEEN):
                labels = rng.integers(6, size=(2, 40))
                vectors = bank[0][labels] + 0.3 * rng.normal(size=(2, 40, 8))
                vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
                styles = np.repeat(["a", "b"] if group == trial.SEEN else ["cd"[seed]] * 2, 20)
                tests = [(vectors[half], labels[half], styles) for half in (0, 1)]
                scores[group] = trial._score(
                    row, 10.0, [bank[: learned + 1 if options else 1]] * 2, *tests, semantics if options else None
                )
            found[row, seed] = {
                "scores": scores, "learnt": {"best_step": 10}, "evidence": None, "projection": "none",
                "temperature": 10.0 + seed, "held_out": "c",
                "counts": {"base_classes": 6, "new_classes": 6, "taught_classes": 6, "train": 12, "validation": 12,
                           "base_tests": 40},
            }  # fmt: skip
    return found


def test_a_group_of_styles_is_scored_by_its_definitions(scored):
    one = scored[trial.MAIN, 0]["scores"][trial.UNSEEN]
    assert one["harmonic"] == pytest.approx(2 / (1 / one["base"] + 1 / one["new"]))
    assert one["base"] == one["styles"]["c"][0]
    both = scored[trial.MAIN, 0]["scores"][trial.SEEN]
    assert both["base"] == pytest.approx(np.mean([both["styles"][style][0] for style in "ab"]))
    assert next(iter(one["auroc_wrong"])) == "u"
    assert sum(count for count, _, _ in one["bins"]) == 80
    assert one["curve"][-1] == pytest.approx(1 - (one["base"] + one["new"]) / 200, abs=1e-4)


def test_seeds_are_put_together_and_shown(scored):
    result = summarise(scored, 2) | {"precision": "bfloat16"}
    result = json.loads(json.dumps(result, allow_nan=False))
    values = [scored[trial.MAIN, seed]["scores"][trial.UNSEEN]["harmonic"] for seed in range(2)]
    shown = result["rows"][trial.MAIN][trial.UNSEEN]["harmonic"]
    assert (shown["mean"], shown["sd"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)), abs=1e-4)
    assert set(result["rows"][trial.MAIN][trial.UNSEEN]["styles"]) == {"c", "d"}
    for goal in result["goals"]:
        low, high = goal["interval"]
        # Student's t of one degree of freedom is 12.7 standard errors wide
        assert high - goal["difference"] == pytest.approx(12.706 * np.std(goal["by_seed"], ddof=1) / 2**0.5, abs=2e-3)
        assert goal["reached"] == (low > 0)
    # What needs no template is held against u as well: the energy of the plain model
    ours, plain = (result["rows"][row][trial.UNSEEN]["auroc_of_2"] for row in (trial.MAIN, trial.ZERO_SHOT))
    name = "AUROC of u for unknown classes, of 2 asked about, above energy of zero-shot"
    (goal,) = (goal for goal in result["goals"] if goal["goal"] == name)
    assert goal["difference"] == pytest.approx(ours["u"]["mean"] - plain["energy"]["mean"], abs=2e-4)
    page = render(result)
    assert f"{shown['mean']:.1f} ± {shown['sd']:.1f}" in page
    assert all(row in page for row in trial.ROWS if row != trial.MAIN)
    assert plot(result).startswith("<?xml")


def test_mean_of_softmax_is_the_mean():
    rng = np.random.default_rng(1)
    vectors, bank = rng.normal(size=(5, 4)), rng.normal(size=(2, 3, 4))
    semantics = LearnedPrompts(
        np.zeros((1, 1, 2), np.float32), np.ones(2), np.zeros(2), np.zeros(2), ("a {}",), "0" * 64
    )
    found = trial.answer(trial.MEAN, vectors, bank, 2.0, semantics)
    powers = [np.exp(2 * vectors @ own.T) for own in bank]
    mean = sum(p / p.sum(axis=1, keepdims=True) for p in powers) / 2
    np.testing.assert_allclose(found.confidence, mean.max(axis=1))
    with pytest.raises(ValueError, match="needs learned templates"):
        trial.answer(trial.MAIN, vectors, bank, 2.0, None)


def test_differences_between_styles_are_no_spread():
    """Seeds of the same style agree: the interval is narrow however far styles are apart."""
    low, high = report._interval(np.array([1.0, 5.0, 1.1, 5.1]), ["a", "b", "a", "b"])
    # two degrees of freedom, a variance of (4 * 0.05²) / 2
    assert (low, high) == pytest.approx(
        (3.05 - 4.303 * (0.005 / 4) ** 0.5, 3.05 + 4.303 * (0.005 / 4) ** 0.5), abs=1e-3
    )
    assert report._interval(np.array([1.0, 5.0]), ["a", "b"]) is None
