"""One row under one seed: learnt on base classes, scored on base and new ones; kept whole, so that a run resumes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.bench.studies.cdc.rows import FITTED, OPTIONS, ROWS, RowAnswers, answer
from invariclip.bench.studies.cdc.world import TEMPLATES, places_of
from invariclip.calibrate.prompts.learn import full_bank, learn_from
from invariclip.calibrate.prompts.scales import fit_temperature
from invariclip.calibrate.prompts.scores import auroc, harmonic_mean, reliability, risk_coverage
from invariclip.calibrate.prompts.texts import hand_written_bank
from invariclip.calibrate.prompts.views import augmented, split_rows
from invariclip.console import Progress, silent
from invariclip.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.learned_prompts import LearnedPrompts
    from invariclip.bench.studies.cdc.world import CdcWorld
    from invariclip.bench.studies.stylebench.encoders import Quick
    from invariclip.calibrate.prompts.options import PromptOptions
    from invariclip.calibrate.prompts.views import LabelledEmbeddings, Split
    from invariclip.export.checkpoints.checkpoint import Checkpoint

    Tests = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.str_]]

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
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]
    file = folder / f"{row.replace(' ', '-').replace('=', 'is')}-{seed}-{digest}.json"
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    result = _trial(row, seed, options, make(), encoders, cache, progress)
    write_atomically(file, json.dumps(result) + "\n")
    return result


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
