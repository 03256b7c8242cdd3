"""One row of the table under one seed: learnt on base classes, scored on base and new ones; kept, so a run resumes.

`CdcWorld` is the image set as the table sees it: base and new classes, styles to adapt to and one held out, the space.
`ROWS` says what is learnt for each row, and `answer` how it answers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.bench.studies.stylebench.sources import HELD_OUT_STYLES, TRAINING_STYLES
from invariclip.bench.studies.trials import kept_trial
from invariclip.calibrate.fit import FitOptions, calibrate
from invariclip.calibrate.prompts.learn import full_bank, learn_from
from invariclip.calibrate.prompts.options import DEFAULT_AUGMENTATIONS, PromptOptions
from invariclip.calibrate.prompts.scales import fit_temperature
from invariclip.calibrate.prompts.scores import (
    auroc,
    fused_answers,
    harmonic_mean,
    reliability,
    risk_coverage,
    uncertainties,
)
from invariclip.calibrate.prompts.texts import hand_written_bank
from invariclip.calibrate.prompts.views import LabelledEmbeddings, augmented, embed_images, split_rows
from invariclip.console import Progress, silent
from invariclip.preprocessing.interventions import PAPER, resolve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.learned_prompts import LearnedPrompts
    from invariclip.bench.studies.encoders import Quick
    from invariclip.calibrate.prompts.views import Split
    from invariclip.export.checkpoints.checkpoint import Checkpoint

    Tests = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.str_]]
    from collections.abc import Sequence

    from invariclip.artifact.projection import Projection
    from invariclip.calibrate.data.images import ImageRecord


TEMPLATES = ("a picture of a {}.",)


@dataclass(frozen=True, eq=False)
class CdcWorld:
    """Half of the learnt concepts to learn templates from, the other half new to them.

    Attributes:
        base: Images of base classes in the styles adapted to, which the encoder was never trained on.
        new: Images of new classes in the same styles.
        base_unseen: Images of base classes in the held-out style.
        new_unseen: The same of new classes.
        projection: The space of all vectors, or None.
        held_out: The held-out style.
        base_names: Every base class, sorted; not each has images in all styles.
        new_names: Every new class, sorted.
    """

    base: LabelledEmbeddings
    new: LabelledEmbeddings
    base_unseen: LabelledEmbeddings
    new_unseen: LabelledEmbeddings
    projection: Projection | None
    held_out: str
    base_names: tuple[str, ...]
    new_names: tuple[str, ...]


def make_world(
    encoder: Quick, images: Sequence[ImageRecord], seed: int, cache: Path, progress: Progress = silent
) -> CdcWorld:
    """Draws the halves, fits the shrinkage that `calibrate` chooses, and embeds everything in its space.

    The projection is fitted and selected on the training styles of the base concepts and of those that no encoder has
    learnt (split `calibrate`): it has seen neither new classes nor any of the four styles. Of those, one is held out,
    another one with every seed, and templates are learnt from the other three.

    Args:
        encoder: The encoder.
        images: The whole set.
        seed: Of the halves; the style held out is number `seed` of the four, and round again.
        cache: Keeps embeddings.
        progress: Progress display.
    """
    seen = [p for p in images if p.environment in TRAINING_STYLES]
    learnt = sorted({p.name for p in seen if p.split == "train"})
    order = np.random.default_rng([seed, 53]).permutation(len(learnt))
    half = len(learnt) // 2
    base = {learnt[index] for index in order[:half]}
    new = set(learnt) - base
    fit_on = [p for p in seen if p.split == "calibrate" or p.name in base]
    # The seed of what interventions draw stays the same, so that one set of embeddings serves every seed
    options = FitOptions(interventions=PAPER, estimator="shrinkage", objective="zero-shot", templates=TEMPLATES)
    found = calibrate(encoder, fit_on, options, cache=cache, progress=progress).projection
    projection = None if found.estimator == "identity" else found
    held_out = HELD_OUT_STYLES[seed % len(HELD_OUT_STYLES)]
    parts = []
    for styles in ([style for style in HELD_OUT_STYLES if style != held_out], [held_out]):
        for names in (base, new):
            some = [p for p in images if p.environment in styles and p.name in names]
            parts.append(embed_images(encoder, some, projection, cache=cache, progress=progress))
    return CdcWorld(
        parts[0], parts[1], parts[2], parts[3], projection, held_out, tuple(sorted(base)), tuple(sorted(new))
    )


def places_of(images: LabelledEmbeddings, names: Sequence[str]) -> NDArray[np.int64]:
    """Labels of images as places in a list of classes that has all of theirs."""
    places = {name: place for place, name in enumerate(names)}
    return np.asarray([places[name] for name in images.names], dtype=np.int64)[images.labels]


SHOTS = 1
"""Training images of a class: each concept has two or three in the styles adapted to."""
MAIN, ZERO_SHOT, SINGLE, MEAN = "CDC", "zero-shot", "single template, softmax", "mean of softmax"
ZERO_SHOT_FITTED, SINGLE_FITTED = "zero-shot, temperature fitted", "single template, temperature fitted"
FITTED = (ZERO_SHOT_FITTED, SINGLE_FITTED)
"""Rows whose softmax has a temperature of its own, fitted on the images that CDC fits its evidence on."""
_FOUR = tuple(resolve(name) for name in DEFAULT_AUGMENTATIONS[:4])
OPTIONS = PromptOptions(templates=TEMPLATES, shots=SHOTS, augmentations=_FOUR)


def _of(learned: int) -> PromptOptions:
    """So many templates; the four augmentations go round."""
    return replace(OPTIONS, learned=learned, augmentations=tuple(_FOUR[m % len(_FOUR)] for m in range(learned)))


_SOFTMAX = replace(OPTIONS, learned=1, losses=("softmax",), augmentations=(None,))
"""As CoOp learns (Zhou et al., IJCV 2022): one template, the cross-entropy of its softmax."""

ROWS: dict[str, PromptOptions | None] = {
    ZERO_SHOT: None,
    ZERO_SHOT_FITTED: None,
    SINGLE: _SOFTMAX,
    SINGLE_FITTED: _SOFTMAX,
    MAIN: OPTIONS,
    MEAN: OPTIONS,
    "M = 1": _of(1),
    "M = 2": _of(2),
    "M = 8": _of(8),
    "softmax for evidential": replace(OPTIONS, losses=("softmax", "misleading", "diversity", "consistency")),
    "without misleading": OPTIONS.without(["misleading"]),
    "without diversity": OPTIONS.without(["diversity"]),
    "without consistency": OPTIONS.without(["consistency"]),
    "without augmentation": replace(OPTIONS, augmentations=(None,) * 4),
}
"""What is learnt for each row. `MEAN` answers by `MAIN`'s templates."""
COMPARED = (ZERO_SHOT, ZERO_SHOT_FITTED, SINGLE, SINGLE_FITTED, MEAN, MAIN)
"""The table; the other rows show what each part gives."""


@dataclass(frozen=True, eq=False)
class RowAnswers:
    """What a row says about images.

    Attributes:
        classes: int64 [N], the classes answered.
        confidence: float64 [N], their probability.
        doubts: float64 [N] by name: what may serve as the uncertainty. The first is the row's own.
    """

    classes: NDArray[np.int64]
    confidence: NDArray[np.floating[Any]]
    doubts: dict[str, NDArray[np.floating[Any]]]


def answer(
    row: str,
    vectors: NDArray[np.float64],
    bank: NDArray[np.float64],
    logit_scale: float,
    semantics: LearnedPrompts | None,
) -> RowAnswers:
    """Answers of a row.

    Args:
        row: One of `ROWS`.
        vectors: float64 [N, d].
        bank: float64 [M + 1, K, d]; rows of one template are answered by the last of it.
        logit_scale: τ.
        semantics: What was learnt for it, if anything.
    """
    if row in (ZERO_SHOT, SINGLE, *FITTED):
        logits = logit_scale * vectors @ bank[-1].T
        doubts = uncertainties(logits)
        return RowAnswers(logits.argmax(axis=1), 1 - doubts["max-softmax"], {**doubts})
    if semantics is None:
        raise ValueError(f"{row} needs learned templates")
    if row == MEAN:
        probability = np.mean([_softmax(logit_scale * vectors @ own.T) for own in bank], axis=0)
        highest = probability.max(axis=1)
        spread = -(probability * np.log(np.maximum(probability, 1e-300))).sum(axis=1)
        return RowAnswers(probability.argmax(axis=1), highest, {"max-softmax": 1 - highest, "entropy": spread})
    numbers = semantics.evidence_scale, semantics.evidence_bias, semantics.background
    fused = fused_answers(vectors, bank, logit_scale, *numbers)
    highest = fused.probabilities.max(axis=1)
    own: dict[str, NDArray[np.floating[Any]]] = {"u": fused.uncertainty, "1 - max p": 1 - highest}
    return RowAnswers(fused.probabilities.argmax(axis=1), highest, own)


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


VERSION = 5
"""Changes when trials would come out differently."""
POINTS = 50
"""Of a kept risk-coverage curve."""
FEW = (2, 20)
"""Classes asked about, where images of none of them are to be told."""
DRAWS = 50
"""Of so few classes."""
SEEN, UNSEEN = "adapted styles", "held-out style"


def run_trial(
    row: str,
    seed: int,
    key: dict[str, Any],
    make: Callable[[], CdcWorld],
    encoders: tuple[Checkpoint, Quick],
    folder: Path,
    cache: Path,
    progress: Progress = silent,
) -> dict[str, Any]:
    """A row's scores under a seed, from its file if it was run before.

    Args:
        row: One of `ROWS`.
        seed: Of the halves, the shots, the start and the steps.
        key: JSON-ready: what the world depends on beside the seed.
        make: Gives the world; not called where there is a file.
        encoders: The checkpoint, and what embeds its images.
        folder: Where scores are kept, under a digest of all that goes into them.
        cache: Keeps embeddings and trainings.
        progress: Progress display.
    """
    options = ROWS[row]
    given = [VERSION, key, row, seed, TEMPLATES, options.to_json() if options else None]
    name = f"{row.replace(' ', '-').replace('=', 'is')}-{seed}"
    run = partial(_trial, row, seed, options)
    return kept_trial(folder, name, json.dumps(given, sort_keys=True), lambda: run(make(), encoders, cache, progress))


def _trial(
    row: str,
    seed: int,
    options: PromptOptions | None,
    world: CdcWorld,
    encoders: tuple[Checkpoint, Quick],
    cache: Path,
    progress: Progress,
) -> dict[str, Any]:
    checkpoint, images = encoders
    split = split_rows(world.base.labels, shots=OPTIONS.shots, validation=0.2, held=0.2, seed=seed)
    semantics, learnt = None, {}
    if options is not None:
        found = learn_from(
            checkpoint, world.base, split, replace(options, seed=seed), world.projection,
            encoder=images, cache=cache, progress=progress,
        )  # fmt: skip
        semantics, learnt = found.semantics, {k: found.facts[k] for k in ("steps", "best_step", "curve")}
    banks = [_bank(checkpoint, world, names, semantics) for names in (world.base_names, world.new_names)]
    tau = checkpoint.logit_scale
    if row in FITTED:
        bank = _bank(checkpoint, world, world.base.names, semantics)
        tau = _temperature(tau, bank[-1], world, split, images, cache)
    held = world.base.vectors[split.held], world.base.labels[split.held], _styles(world.base.used)[split.held]
    held = held[0], places_of(world.base, world.base_names)[split.held], held[2]
    scores = {
        SEEN: _score(row, tau, banks, held, _tests(world.new, world.new_names), semantics),
        UNSEEN: _score(row, tau, banks, _tests(world.base_unseen, world.base_names),
                       _tests(world.new_unseen, world.new_names), semantics),
    }  # fmt: skip
    space = world.projection
    return {
        "scores": scores,
        "learnt": learnt,
        "evidence": [own.tolist() for own in (semantics.evidence_scale, semantics.evidence_bias, semantics.background)]
        if semantics
        else None,
        "temperature": tau,
        "held_out": world.held_out,
        "projection": f"{space.estimator} λ={space.strength} d={space.rank}" if space else "none",
        "counts": {
            "base_classes": len(world.base_names),
            "new_classes": len(world.new_names),
            "taught_classes": len(world.base.names),
            "train": len(split.train),
            "validation": len(split.validation),
            "base_tests": len(split.held),
        },
    }


def _bank(
    checkpoint: Checkpoint, world: CdcWorld, names: tuple[str, ...], semantics: LearnedPrompts | None
) -> NDArray[np.float64]:
    hand_written = hand_written_bank(checkpoint, names, TEMPLATES, world.projection)
    if semantics is None:
        return hand_written[None]
    return full_bank(checkpoint, semantics.context, hand_written, names, world.projection)


def _temperature(
    tau: float, bank: NDArray[np.float64], world: CdcWorld, split: Split, images: Quick, cache: Path
) -> float:
    """Fitted on what CDC fits its evidence on: validation images as they are and augmented."""
    rows, labels = split.validation, world.base.labels[split.validation]
    views, _ = augmented(images, world.base, rows, OPTIONS.views, world.projection,
                         seed=OPTIONS.augmentation_seed, cache=cache)  # fmt: skip
    shown = np.concatenate([world.base.vectors[rows], *views])
    return fit_temperature(shown @ bank.T, np.tile(labels, 1 + len(views)), tau)


def _tests(images: LabelledEmbeddings, names: tuple[str, ...]) -> Tests:
    return images.vectors, places_of(images, names), _styles(images.used)


def _score(
    row: str, tau: float, banks: list[NDArray[np.float64]], base: Tests, new: Tests, semantics: LearnedPrompts | None
) -> dict[str, Any]:
    """Every figure of one group of styles; accuracies are means over styles, the others over all images.

    Args:
        row: As in `answer`.
        tau: The temperature of its softmax.
        banks: Of base classes and of new ones.
        base: Vectors, labels, styles.
        new: The same of new classes.
        semantics: What was learnt, if anything.
    """
    known = answer(row, base[0], banks[0], tau, semantics)
    fresh = answer(row, new[0], banks[1], tau, semantics)
    # Images of new classes, asked about among base classes: there is no right answer
    unknown = answer(row, new[0], banks[0], tau, semantics)
    rights = known.classes == base[1], fresh.classes == new[1]
    right = np.concatenate(rights)
    accuracy = [_by_style(own, tests[2]) for own, tests in zip(rights, (base, new), strict=True)]
    bins = reliability(np.concatenate([known.confidence, fresh.confidence]), right)
    doubts = {name: np.concatenate([known.doubts[name], fresh.doubts[name]]) for name in known.doubts}
    own = next(iter(doubts))
    return {
        "base": accuracy[0]["mean"],
        "new": accuracy[1]["mean"],
        "harmonic": harmonic_mean(accuracy[0]["mean"], accuracy[1]["mean"]),
        "styles": {name: [accuracy[0][name], accuracy[1][name]] for name in accuracy[0] if name != "mean"},
        "ece": bins.error,
        "bins": [
            [int(c), _plain(s), _plain(a)] for c, s, a in zip(bins.counts, bins.confidence, bins.accuracy, strict=True)
        ],
        "auroc_wrong": {name: auroc(doubt, ~right) for name, doubt in doubts.items()},
        "auroc_unknown": {name: _unknown(known, unknown, name) for name in doubts},
        **{f"auroc_of_{count}": _of_few(row, tau, banks[0], base, new[0], semantics, count) for count in FEW},
        "aurc": {name: float(risk_coverage(doubt, right).mean()) for name, doubt in doubts.items()},
        "curve": _curve(doubts[own], right),
        "images": [len(base[1]), len(new[1])],
    }


def _styles(images: Any) -> NDArray[np.str_]:
    return np.asarray([image.environment for image in images])


def _by_style(right: NDArray[np.bool_], styles: NDArray[np.str_]) -> dict[str, float]:
    found = {str(style): 100 * float(right[styles == style].mean()) for style in np.unique(styles)}
    return {**found, "mean": float(np.mean(list(found.values())))}


def _unknown(known: RowAnswers, unknown: RowAnswers, name: str) -> float:
    doubt = np.concatenate([known.doubts[name], unknown.doubts[name]])
    return auroc(doubt, np.arange(len(doubt)) >= len(known.classes))


def _of_few(
    row: str,
    tau: float,
    bank: NDArray[np.float64],
    base: Tests,
    unknown: NDArray[np.float64],
    semantics: LearnedPrompts | None,
    count: int,
) -> dict[str, float]:
    """AUROC by doubt, where so many base classes are asked about: images of them against images of new classes."""
    rng, present = np.random.default_rng([59, count]), np.unique(base[1])
    found: dict[str, list[float]] = {}
    for _ in range(DRAWS):
        classes = np.sort(rng.choice(present, min(count, len(present)), replace=False))
        known = base[0][np.isin(base[1], classes)]
        said = answer(row, np.concatenate([known, unknown]), bank[:, classes], tau, semantics)
        for name, doubt in said.doubts.items():
            found.setdefault(name, []).append(auroc(doubt, np.arange(len(doubt)) >= len(known)))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _curve(doubt: NDArray[np.float64], right: NDArray[np.bool_]) -> list[float]:
    risk = risk_coverage(doubt, right)
    places = np.linspace(1, len(risk), POINTS).round().astype(int) - 1
    return [round(float(value), 5) for value in risk[places]]


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 5)
