"""One row under one seed: learnt on base classes, scored on base and new ones; kept whole, so that a run resumes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.bench.cdc.rows import OPTIONS, ROWS, Answers, answer
from invariclip.bench.cdc.world import TEMPLATES, held_out_labels
from invariclip.calibrate.cdc.evaluate import auroc, harmonic_mean, reliability, risk_coverage
from invariclip.calibrate.cdc.learn import full_bank, learn_from
from invariclip.calibrate.cdc.splits import split_rows
from invariclip.calibrate.cdc.texts import hand_written_bank
from invariclip.console import Progress, silent
from invariclip.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.bench.cdc.world import Images, World
    from invariclip.calibrate.cdc.options import Options
    from invariclip.export.models.checkpoint import Checkpoint
    from invariclip.semantics import Semantics

VERSION = 2
"""Changes when trials would come out differently."""
POINTS = 50
"""Of a kept risk-coverage curve."""
SEEN, UNSEEN = "training styles", "held-out styles"


def run_trial(
    row: str,
    seed: int,
    key: dict[str, Any],
    make: Callable[[], World],
    encoders: tuple[Checkpoint, Images],
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
        encoders: The checkpoint, and what embeds its pictures.
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
    options: Options | None,
    world: World,
    encoders: tuple[Checkpoint, Images],
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
    banks = [_bank(checkpoint, world, names, semantics) for names in (world.base.names, world.new.names)]
    tests = world.base.vectors[split.held], world.base.labels[split.held]
    news = world.new.vectors, world.new.labels
    environments = np.asarray([p.environment for p in world.base.used])[split.held], _styles(world.new.used)
    scores = {SEEN: _score(row, checkpoint.logit_scale, banks, tests, news, environments, semantics)}
    tests = world.base_unseen.vectors, held_out_labels(world.base_unseen, world.base)
    news = world.new_unseen.vectors, held_out_labels(world.new_unseen, world.new)
    environments = _styles(world.base_unseen.used), _styles(world.new_unseen.used)
    scores[UNSEEN] = _score(row, checkpoint.logit_scale, banks, tests, news, environments, semantics)
    space = world.projection
    return {
        "scores": scores,
        "learnt": learnt,
        "evidence": [semantics.evidence_scale.tolist(), semantics.evidence_bias.tolist()] if semantics else None,
        "projection": f"{space.estimator} λ={space.strength} d={space.rank}" if space else "none",
        "counts": {
            "base_classes": len(world.base.names),
            "new_classes": len(world.new.names),
            "train": len(split.train),
            "validation": len(split.validation),
            "base_tests": len(split.held),
        },
    }


def _bank(
    checkpoint: Checkpoint, world: World, names: tuple[str, ...], semantics: Semantics | None
) -> NDArray[np.float64]:
    hand_written = hand_written_bank(checkpoint, names, TEMPLATES, world.projection)
    if semantics is None:
        return hand_written[None]
    return full_bank(checkpoint, semantics.context, hand_written, names, world.projection)


def _score(
    row: str,
    tau: float,
    banks: list[NDArray[np.float64]],
    base: tuple[NDArray[np.float64], NDArray[np.int64]],
    new: tuple[NDArray[np.float64], NDArray[np.int64]],
    environments: tuple[NDArray[np.str_], NDArray[np.str_]],
    semantics: Semantics | None,
) -> dict[str, Any]:
    """Every figure of one group of styles; accuracies are means over styles, the others over all pictures."""
    known = answer(row, base[0], banks[0], tau, semantics)
    fresh = answer(row, new[0], banks[1], tau, semantics)
    # Pictures of new classes, asked about among base classes: there is no right answer
    unknown = answer(row, new[0], banks[0], tau, semantics)
    rights = known.classes == base[1], fresh.classes == new[1]
    right = np.concatenate(rights)
    accuracy = [_by_style(own, styles) for own, styles in zip(rights, environments, strict=True)]
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
        "aurc": {name: float(risk_coverage(doubt, right).mean()) for name, doubt in doubts.items()},
        "curve": _curve(doubts[own], right),
        "pictures": [len(base[1]), len(new[1])],
    }


def _styles(pictures: Any) -> NDArray[np.str_]:
    return np.asarray([picture.environment for picture in pictures])


def _by_style(right: NDArray[np.bool_], styles: NDArray[np.str_]) -> dict[str, float]:
    found = {str(style): 100 * float(right[styles == style].mean()) for style in np.unique(styles)}
    return {**found, "mean": float(np.mean(list(found.values())))}


def _unknown(known: Answers, unknown: Answers, name: str) -> float:
    doubt = np.concatenate([known.doubts[name], unknown.doubts[name]])
    return auroc(doubt, np.arange(len(doubt)) >= len(known.classes))


def _curve(doubt: NDArray[np.float64], right: NDArray[np.bool_]) -> list[float]:
    risk = risk_coverage(doubt, right)
    places = np.linspace(1, len(risk), POINTS).round().astype(int) - 1
    return [round(float(value), 5) for value in risk[places]]


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 5)
