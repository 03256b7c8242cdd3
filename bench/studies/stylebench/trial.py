"""One trial: every row of the table by one protocol under one seed; kept whole, so that a run resumes.

`StyleWorld` is the embedded image set under that seed, and the functions behind it say who names which image right.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from invariclip.bench.studies import trials
from invariclip.bench.studies.encoders import through
from invariclip.bench.studies.stylebench.sources import HELD_OUT_STYLES, STYLES, TRAINING_STYLES
from invariclip.bench.studies.trials import (
    ESTIMATORS,
    ICM_STRENGTHS,
    best_of,
    kept_selection,
    kept_trial,
    packed,
    published_baselines,
)
from invariclip.calibrate.data.pairs import ALL_SOURCES, Sources, fitted_moments
from invariclip.calibrate.evaluation import baselines
from invariclip.calibrate.evaluation.baselines import for_texts
from invariclip.calibrate.evaluation.invariance import side_effects
from invariclip.calibrate.evaluation.text_baselines import embed_style_prompts, projectors
from invariclip.calibrate.fit import FitOptions, bank_of, tabulate
from invariclip.calibrate.projection.candidates import ProjectionCandidate, grid
from invariclip.calibrate.projection.classifiers import prototypes, zero_shot
from invariclip.calibrate.projection.folds import CHANGED
from invariclip.console import Progress, silent
from invariclip.preprocessing.interventions import CATALOGUE, PAPER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.projection import Projection
    from invariclip.bench.studies.encoders import TrunkEncoder
    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.calibrate.data.moments import Moments
    from invariclip.calibrate.data.pairs import EmbeddingTable
    from invariclip.calibrate.evaluation.baselines import Map
    from invariclip.calibrate.evaluation.text_baselines import Projectors, StylePrompts
    from invariclip.calibrate.projection.selection import Selection
    from invariclip.export.checkpoints.checkpoint import Checkpoint


TEMPLATES = ("a picture of a {}.",)
ELSEWHERE_TEMPLATES = ("a picture of a {}.", "a photo of a {}.")
DRAWS = 1
"""Changed versions of every image; `calibrate` has two by default, and embedding them is what a seed costs."""
PROMPTED_CLASSES = 128
"""Most classes that prompts name in every style; evenly spread over the training concepts' names."""
Way = Literal["zero-shot", "prototypes"]
WAYS: tuple[Way, ...] = ("zero-shot", "prototypes")


@dataclass(frozen=True)
class Elsewhere:
    """Another set, which nothing is fitted, selected or looked up on: it is only scored, by its classes' names.

    Attributes:
        table: Its images, unchanged.
        bank: float64 [K, D], its class embeddings by label code.
    """

    table: EmbeddingTable
    bank: NDArray[np.float64]


@dataclass(frozen=True)
class StyleWorld:
    """The embedded image set.

    Attributes:
        table: All images, unchanged.
        bank: float64 [K, D], its class embeddings by label code.
        train: What is fitted on, by the list that changed versions were drawn from: training styles, splits train and
            calibrate. All hold the same images.
        train_bank: The class embeddings of `train`.
        learnt: Concepts of split train: those that an encoder may have learnt.
        groups: int64 [C], the group of every concept of `table` by code.
        seed: Of everything that is drawn.
        layers: The last linear layers of both towers, or None where a tower has none.
        styles: What the text tower makes of the training styles' phrases, or None.
        elsewhere: Another set, or None.
    """

    table: EmbeddingTable
    bank: NDArray[np.float64]
    train: Mapping[str, EmbeddingTable]
    train_bank: NDArray[np.float64]
    learnt: frozenset[str]
    groups: NDArray[np.int64]
    seed: int
    layers: Projectors | None = None
    styles: StylePrompts | None = None
    elsewhere: Elsewhere | None = None

    def rows(self, styles: Sequence[str]) -> NDArray[np.bool_]:
        """Images of some styles, bool [N]."""
        codes = [self.table.environment_names.index(style) for style in styles if style in self.table.environment_names]
        return np.isin(self.table.environments, codes)

    @property
    def queries(self) -> NDArray[np.bool_]:
        """Images of the held-out styles, bool [N]: what is scored."""
        return self.rows(HELD_OUT_STYLES)

    @property
    def home(self) -> NDArray[np.bool_]:
        """Images of the training styles whose concepts nothing was fitted on, bool [N]: where a map may only harm."""
        fitted = set(next(iter(self.train.values())).concept_names)
        others = np.asarray([name not in fitted for name in self.table.concept_names])
        return np.asarray(self.rows(TRAINING_STYLES) & others[self.table.concepts])

    @property
    def is_learnt(self) -> NDArray[np.bool_]:
        """Of the queries, those whose concept is of split train; bool [Q]."""
        known = np.asarray([name in self.learnt for name in self.table.concept_names])
        return np.asarray(known[self.table.concepts[self.queries]])


def answers(world: StyleWorld, what: Map, way: Way) -> NDArray[np.bool_]:
    """Which queries are named right, bool [Q]: by the names' embeddings, or by prototypes from the training styles."""
    table, queries = world.table, world.queries
    images = what.apply(table.vectors[queries])
    if way == "zero-shot":
        return zero_shot(images, table.labels[queries], for_texts(what).apply(world.bank))
    support = world.rows(TRAINING_STYLES)
    return prototypes(what.apply(table.vectors[support]), table.labels[support], images, table.labels[queries])


def group_answers(world: StyleWorld, what: Map) -> NDArray[np.bool_]:
    """Which queries are named right among the names of their concept's own group, bool [Q]."""
    table, queries = world.table, world.queries
    images, bank = what.apply(table.vectors[queries]), for_texts(what).apply(world.bank)
    labels, own = table.labels[queries], world.groups[table.concepts[queries]]
    of_label = np.empty(len(bank), dtype=np.int64)
    of_label[table.labels] = world.groups[table.concepts]
    logits = np.where(of_label[None, :] == own[:, None], images @ bank.T, -np.inf)
    return np.asarray(logits.argmax(axis=1) == labels)


def home_answers(world: StyleWorld, what: Map, way: Way) -> NDArray[np.bool_]:
    """Which images of `StyleWorld.home` are named right, bool [H].

    By name among the names of these concepts alone; by prototypes among all concepts, each from all images of the
    training styles but the one that is asked about.
    """
    table, asked = world.table, world.home
    if way == "zero-shot":
        known, codes = np.unique(table.labels[asked], return_inverse=True)
        return zero_shot(what.apply(table.vectors[asked]), codes, for_texts(what).apply(world.bank[known]))
    support = world.rows(TRAINING_STYLES)
    vectors, labels = what.apply(table.vectors[support]), table.labels[support]
    sums = np.zeros((len(table.label_names), vectors.shape[1]))
    np.add.at(sums, labels, vectors)
    queries, own = vectors[asked[support]], labels[asked[support]]
    cosines = queries @ (sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)).T
    # An image is not part of the prototype that it is compared with.
    rest = sums[own] - queries
    lengths = np.linalg.norm(rest, axis=1)
    mine = np.divide((queries * rest).sum(axis=1), lengths, out=np.full(len(own), -1.0), where=lengths > 1e-9)
    cosines[np.arange(len(own)), own] = mine
    return np.asarray(cosines.argmax(axis=1) == own)


def elsewhere_answers(elsewhere: Elsewhere, what: Map) -> NDArray[np.bool_]:
    """Which images of the other set are named right by their classes' names, bool [N]."""
    table = elsewhere.table
    return zero_shot(what.apply(table.vectors), table.labels, for_texts(what).apply(elsewhere.bank))


def embed_world(
    checkpoint: Checkpoint,
    trunk: TrunkEncoder,
    images: Sequence[ImageRecord],
    groups: Mapping[str, str],
    kinds: Mapping[str, tuple[str, ...]],
    cache: Path,
    seed: int,
    *,
    elsewhere: Elsewhere | None = None,
    progress: Progress = silent,
) -> StyleWorld:
    """Embeds the set; what is fitted on also under interventions, as `calibrate` does it.

    Args:
        checkpoint: For its texts.
        trunk: Its trunk, for images.
        images: The whole set.
        groups: Every concept's group.
        kinds: Lists of interventions by name.
        cache: Keeps the trunk's features across runs and checkpoints.
        seed: Of the interventions.
        elsewhere: Another set to score.
        progress: Progress display.
    """
    fit_on = [p for p in images if p.environment in TRAINING_STYLES and p.split in ("train", "calibrate")]
    table = through(trunk, tabulate(trunk, images, FitOptions(seed=seed), cache=cache, progress=progress)[0])
    train = {}
    for name, listed in kinds.items():
        options = FitOptions(interventions=listed, draws=DRAWS, seed=seed)
        train[name] = through(trunk, tabulate(trunk, fit_on, options, cache=cache, progress=progress)[0])
    bank = bank_of(checkpoint, table.label_names, TEMPLATES)
    some = next(iter(train.values()))
    phrases = [phrase for style in TRAINING_STYLES for phrase in STYLES[style].phrases]
    named = some.label_names[:: -(-len(some.label_names) // PROMPTED_CLASSES)]
    order = sorted(set(groups.values()))
    return StyleWorld(
        table=table,
        bank=bank,
        train=train,
        train_bank=bank[[table.label_names.index(name) for name in some.label_names]],
        learnt=frozenset(image.concept for image in fit_on if image.split == "train"),
        groups=np.asarray([order.index(groups[name]) for name in table.concept_names], dtype=np.int64),
        seed=seed,
        layers=projectors(checkpoint),
        styles=embed_style_prompts(checkpoint, phrases, named),
        elsewhere=elsewhere,
    )


def embed_elsewhere(
    checkpoint: Checkpoint,
    trunk: TrunkEncoder,
    images: Sequence[ImageRecord],
    cache: Path,
    progress: Progress = silent,
) -> Elsewhere:
    """Embeds another set and its classes' names.

    Args:
        checkpoint: For its texts.
        trunk: Its trunk.
        images: Of all its environments.
        cache: Keeps features.
        progress: Progress display.
    """
    table = through(trunk, tabulate(trunk, images, FitOptions(), cache=cache, progress=progress)[0])
    return Elsewhere(table, bank_of(checkpoint, table.label_names, ELSEWHERE_TEMPLATES))


VERSION = 5
"""Changes when trials would come out differently."""
SEVEN, EVERYTHING = "the seven", "all eighteen"
KINDS = {SEVEN: PAPER, EVERYTHING: tuple(CATALOGUE)}
"""Lists that changed versions are drawn from; the rows' own is the first, as `calibrate` has it."""
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
    name = f"{way}-{part.__name__}-{key['seed']}"
    return kept_trial(folder, name, given, lambda: part(make(), way, progress, folder / "selections"))


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


def _baselines(world: StyleWorld, icm: ProjectionCandidate) -> dict[str, Map]:
    """What needs no pairs, and the published order at the rank and λ that were chosen for `icm`."""
    train = world.train[SEVEN]
    seen = train.unchanged
    moments = _moments(world, SEVEN, ALL_SOURCES, icm.captions)
    vectors, labels, styles = train.vectors[seen], train.labels[seen], train.environments[seen]
    found: dict[str, Map] = {
        "none": baselines.none(moments.width),
        "centring": baselines.centring(moments),
        "whitening": baselines.whitening(moments),
        "lda": baselines.lda(vectors, labels),
        "pca": baselines.pca(moments, icm.rank or moments.width),
    }
    return found | published_baselines(
        moments, icm, vectors, labels, styles, world.train_bank, world.layers, world.styles
    )


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
    return trials.fitted(_moments(world, listed, sources, pick.captions), pick)


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
