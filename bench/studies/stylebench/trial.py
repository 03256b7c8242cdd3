"""One trial: every row of the table by one protocol under one seed; kept whole, so that a run resumes."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.artifact.projection import Projection, identity
from invariclip.bench.studies.selections import kept_selection
from invariclip.bench.studies.stylebench.world import (
    DRAWS,
    ELSEWHERE_TEMPLATES,
    TEMPLATES,
    answers,
    elsewhere_answers,
    group_answers,
    home_answers,
)
from invariclip.calibrate.data.pairs import ALL_SOURCES, Sources, fitted_moments
from invariclip.calibrate.evaluation import baselines, erasure, text_baselines
from invariclip.calibrate.evaluation.invariance import side_effects
from invariclip.calibrate.projection.candidates import ProjectionCandidate, grid
from invariclip.calibrate.projection.estimators import fit
from invariclip.calibrate.projection.folds import CHANGED
from invariclip.console import Progress, silent
from invariclip.files import write_atomically
from invariclip.preprocessing.interventions import CATALOGUE, PAPER

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.bench.studies.stylebench.world import StyleWorld, Way
    from invariclip.calibrate.data.moments import Moments
    from invariclip.calibrate.evaluation.baselines import Map
    from invariclip.calibrate.projection.selection import Selection

VERSION = 5
"""Changes when trials would come out differently."""
SEVEN, EVERYTHING = "the seven", "all eighteen"
KINDS = {SEVEN: PAPER, EVERYTHING: tuple(CATALOGUE)}
"""Lists that changed versions are drawn from; the rows' own is the first, as `calibrate` has it."""
ESTIMATORS = ("icm", "generalised", "shrinkage")
NATURAL, CHANGES = Sources(interventions=False), Sources(natural=False)
PAIRS: dict[str, tuple[str, Sources, bool]] = {
    "natural": (SEVEN, NATURAL, False),
    "the seven": (SEVEN, CHANGES, False),
    "natural + the seven": (SEVEN, ALL_SOURCES, False),
    "all eighteen": (EVERYTHING, CHANGES, False),
    "natural + all eighteen": (EVERYTHING, ALL_SOURCES, False),
    "natural + captions": (SEVEN, NATURAL, True),
    "natural + the seven + captions": (SEVEN, ALL_SOURCES, True),
}
"""The list, which pairs of images, and whether captions."""
ICM_STRENGTHS = (1.0, 10.0)
"""λ of `icm` that are tried: each costs an eigendecomposition in every fold, and a space 1,280 wide makes that dear."""
CONCEPT_PARTS = 2
"""Into how many parts concepts are split in selection; `calibrate` has twice as many, and twice as many folds."""


def run_trial(
    part: Callable[..., dict[str, Any]],
    make: Callable[[], StyleWorld],
    key: dict[str, Any],
    way: Way,
    folder: Path,
    progress: Progress = silent,
) -> dict[str, Any]:
    """A trial's result, from its file if it was run before.

    Args:
        part: `rows` or `pairs`.
        make: Gives the world; not called where there is a file.
        key: JSON-ready: what the world depends on, with `seed` among it.
        way: The protocol: what is selected for and scored by.
        folder: Where results are kept, under a digest of all that goes into them; selections lie in a folder of it.
        progress: Progress display.
    """
    setup = [KINDS, DRAWS, TEMPLATES, ELSEWHERE_TEMPLATES, ICM_STRENGTHS, CONCEPT_PARTS]
    given = json.dumps([VERSION, part.__name__, key, way, setup], sort_keys=True)
    digest = hashlib.sha256(given.encode()).hexdigest()[:16]
    file = folder / f"{way}-{part.__name__}-{key['seed']}-{digest}.json"
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    result = part(make(), way, progress, folder / "selections")
    write_atomically(file, json.dumps(result, ensure_ascii=False) + "\n")
    return result


def rows(world: StyleWorld, way: Way, progress: Progress = silent, folder: Path | None = None) -> dict[str, Any]:
    """Every estimator and baseline by one protocol.

    Returns:
        JSON-ready: `rows` (name → {`chosen`, and packed `answers`, `home`, by name also `group` and `elsewhere`}),
        `selection` (the whole curve), `side_effects` (of what was chosen, on the held-out styles).
    """
    selection = select_by(world, way, SEVEN, ALL_SOURCES, tried(world.bank.shape[1], way), progress, folder)
    picks = {name: best_of(selection, name) for name in ESTIMATORS} | {"auto": selection.chosen}
    chosen = {name: str(pick) for name, pick in picks.items()}
    by_pick: dict[ProjectionCandidate, Map] = {
        pick: fitted(world, SEVEN, ALL_SOURCES, pick) for pick in set(picks.values())
    }
    maps: dict[str, Map] = {name: by_pick[pick] for name, pick in picks.items()}
    found = {
        name: _row(world, way, what, chosen.get(name, ""))
        for name, what in (_baselines(world, picks["icm"]) | maps).items()
    }
    vectors, concepts = world.table.vectors[world.queries], world.table.concepts[world.queries]
    effects = side_effects(
        vectors,
        maps["auto"].apply(vectors),
        {"group of the concept": world.groups[concepts]},
        groups=concepts,
        seed=world.seed,
    )
    return {
        "rows": found,
        "selection": selection.to_json(),
        "side_effects": [effect.to_json() for effect in effects],
    }


def pairs(world: StyleWorld, way: Way, progress: Progress = silent, folder: Path | None = None) -> dict[str, Any]:
    """Shrinkage fitted on other pairs, λ selected for each.

    Returns:
        JSON-ready: `rows`, as `rows` has them, each with what selection saw: `left_out`, the gain on unchanged images
        of left-out training styles, and `left_out_changed`, that on changed ones.
    """
    found: dict[str, Any] = {}
    for name, (listed, sources, captions) in PAIRS.items():
        if captions and way == "prototypes":
            continue
        candidates = grid(world.bank.shape[1], estimator="shrinkage", captions=(captions,))
        selection = select_by(world, way, listed, sources, candidates, progress, folder)
        pick = selection.chosen
        found[name] = _row(world, way, fitted(world, listed, sources, pick), str(pick)) | {
            "left_out": _gain(selection, changed=False),
            "left_out_changed": _gain(selection, changed=True),
        }
    return {"rows": found}


def tried(width: int, way: Way) -> list[ProjectionCandidate]:
    """What selection chooses from: `calibrate`'s grid with few λ of `icm`, and captions with shrinkage alone."""
    own = [c for c in grid(width) if c.estimator != "icm" or c.strength in ICM_STRENGTHS]
    more = grid(width, estimator="shrinkage", captions=(True,)) if way == "zero-shot" else []
    return list(dict.fromkeys([*own, *more]))


def best_of(selection: Selection, estimator: str) -> ProjectionCandidate:
    """One estimator's best candidate on what was left out, also where no projection is better."""
    own = [scored for scored in selection.curve if scored.candidate.estimator == estimator]
    return max(own, key=lambda scored: scored.behind).candidate


def packed(right: NDArray[np.bool_]) -> str:
    """Answers as files hold them."""
    return np.packbits(right).tobytes().hex()


def unpack(text: str, count: int) -> NDArray[np.bool_]:
    """Answers as `rows` hold them, bool [count]."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=count).astype(np.bool_)


def _baselines(world: StyleWorld, icm: ProjectionCandidate) -> dict[str, Map]:
    """What needs no pairs, and the published order at the rank and λ that were chosen for `icm`."""
    train = world.train[SEVEN]
    seen, rank = train.unchanged, icm.rank or train.vectors.shape[1]
    moments = _moments(world, SEVEN, ALL_SOURCES, icm.captions)
    vectors, labels, styles = train.vectors[seen], train.labels[seen], train.environments[seen]
    found: dict[str, Map] = {
        "none": baselines.none(moments.width),
        "centring": baselines.centring(moments),
        "whitening": baselines.whitening(moments),
        "lda": baselines.lda(vectors, labels),
        "pca": baselines.pca(moments, rank),
        "published": baselines.published(moments, rank, icm.strength or 1.0),
        "leace": erasure.leace(vectors, styles),
        "leace, shrunk": erasure.leace(vectors, styles, shrink=True),
        "splince": erasure.splince(vectors, styles, labels, directions=erasure.room(styles, labels, vectors, rank)),
        "gr-clip": text_baselines.gr_clip(vectors, world.train_bank),
    }
    if world.layers is not None:
        found["isoclip"] = text_baselines.isoclip(world.layers, text_baselines.rank_or_default(world.layers, rank))
    if world.styles is not None:
        found |= text_baselines.by_name(world.styles, rank)
    return found


def _gain(selection: Selection, *, changed: bool) -> float:
    """What was chosen against no projection on left-out training styles, in points: changed images, or the others."""
    means = []
    for scored in (selection.result(), selection.baseline()):
        groups = [name for name in scored.accuracy if name != "mean" and name.endswith(CHANGED) == changed]
        means.append(np.mean([scored.accuracy[name].value for name in groups]))
    return round(float(means[0] - means[1]), 3)


def select_by(
    world: StyleWorld,
    way: Way,
    listed: str,
    sources: Sources,
    candidates: list[ProjectionCandidate],
    progress: Progress,
    folder: Path | None,
) -> Selection:
    """What selection says of a world's training images for one protocol, kept in a folder."""
    return kept_selection(
        folder,
        world.train[listed],
        candidates,
        objective=way,
        bank=world.train_bank,
        sources=sources,
        concept_parts=CONCEPT_PARTS,
        seed=world.seed,
        progress=progress,
    )


def _moments(world: StyleWorld, listed: str, sources: Sources, captions: bool) -> Moments:
    bank = world.train_bank if captions else None
    return fitted_moments(world.train[listed], sources, captions=bank, seed=world.seed)


def fitted(world: StyleWorld, listed: str, sources: Sources, pick: ProjectionCandidate) -> Projection:
    """What was chosen, fitted on a world's training images."""
    if pick.estimator == "identity":
        return identity(world.table.vectors.shape[1])
    return fit(_moments(world, listed, sources, pick.captions), pick.estimator, pick.rank, pick.strength)


def _row(world: StyleWorld, way: Way, what: Map, chosen: str) -> dict[str, Any]:
    found = {
        "chosen": chosen,
        "answers": packed(answers(world, what, way)),
        "home": packed(home_answers(world, what, way)),
    }
    if way == "zero-shot":
        found["group"] = packed(group_answers(world, what))
        if world.elsewhere is not None:
            found["elsewhere"] = packed(elsewhere_answers(world.elsewhere, what))
    return found
