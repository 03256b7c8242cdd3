"""One trial: fitted and selected on all environments but one, scored on that one; kept whole, so that a run resumes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from invariclip.artifact.projection import identity
from invariclip.bench.studies.encoders import Quick, through
from invariclip.bench.studies.trials import (
    ESTIMATORS,
    ICM_STRENGTHS,
    best_of,
    fitted,
    kept_selection,
    kept_trial,
    packed,
    published_baselines,
)
from invariclip.calibrate.data.pairs import EmbeddingTable, Sources, fitted_moments, interventional_pairs
from invariclip.calibrate.evaluation import baselines, text_baselines
from invariclip.calibrate.evaluation.invariance import domain_leakage, invariance_gap
from invariclip.calibrate.evaluation.unseen import WAYS, Way, answers, base_classes
from invariclip.calibrate.fit import FitOptions, bank_of, tabulate
from invariclip.calibrate.projection.candidates import ProjectionCandidate, grid
from invariclip.console import Progress, silent
from invariclip.errors import CheckpointError
from invariclip.preprocessing.interventions.catalogue import PAPER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.calibrate.data.encoders import Encoder, TextEncoder
    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.calibrate.data.moments import Moments
    from invariclip.calibrate.evaluation.baselines import Map
    from invariclip.calibrate.evaluation.text_baselines import Projectors, StylePrompts
    from invariclip.calibrate.projection.candidates import Objective
    from invariclip.calibrate.projection.selection import Selection
    from invariclip.export.checkpoints.checkpoint import Checkpoint

Plain = Literal["probe", "prototypes", "zero-shot"]
STYLE = "style-exchange"
MAIN = "auto, for the probe"
OWN: dict[str, str] = {way: MAIN if way.startswith("probe") else f"auto, for {way}" for way in WAYS}
"""The row that was selected for a way of naming classes."""
INTERVENTIONS, SAME_CLASS = Sources(natural=False), Sources(interventions=False)
OWN_C = ("none", MAIN)
"""Rows for which C is chosen as well: that costs as much as all the rest."""
WIDE = 1024
"""Dimensions from which on only `ICM_STRENGTHS` are tried."""

TRIAL_VERSION = 4
"""Changes when trials would come out differently."""


@dataclass(frozen=True)
class TrialSettings:
    """What a trial depends on besides images and encoder.

    Attributes:
        interventions: Names of the kinds that every image's changed versions are drawn from.
        draws: Changed versions of every image; the paper has one.
        templates: Prompts, for encoders that take texts.
        fitted: Most images of a class and environment that are fitted on, and at most half of those that there are;
            the others of the training environments are asked about beside the unseen environment.
    """

    interventions: tuple[str, ...] = (*PAPER, STYLE)
    draws: int = 1
    templates: tuple[str, ...] = ("a photo of a {}.",)
    fitted: int = 70

    def options(self, seed: int) -> FitOptions:
        """As calibration takes them."""
        return FitOptions(interventions=self.interventions, draws=self.draws, templates=self.templates, seed=seed)


@dataclass(frozen=True)
class DomainWorld:
    """The embedded images of one trial.

    Attributes:
        seen: The training environments with their changed versions, whose donors are training images too.
        unseen: The test environment, unchanged.
        bank: Class embeddings by the label codes of `seen`, or None without a text tower.
        seed: Of everything that is drawn.
        layers: The last linear layers of both towers, or None where a tower has none.
        styles: What the text tower makes of the training environments' names, or None without one.
        home: Images of the training environments that nothing was fitted on, unchanged; None where there are none.
        moved: Some of the test environment with their changed versions, for the invariance gap alone; None for none.
    """

    seen: EmbeddingTable
    unseen: EmbeddingTable
    bank: NDArray[np.float64] | None
    seed: int
    layers: Projectors | None = None
    styles: StylePrompts | None = None
    home: EmbeddingTable | None = None
    moved: EmbeddingTable | None = None

    @property
    def ways(self) -> tuple[Plain, ...]:
        """How classes are named here; each is selected for, and every row is scored by all."""
        return ("probe", "prototypes") if self.bank is None else ("probe", "prototypes", "zero-shot")


def run_trial(
    encoder: Encoder,
    images: Sequence[ImageRecord],
    test: str,
    seed: int,
    settings: TrialSettings,
    *,
    folder: Path,
    cache: Path,
    progress: Progress = silent,
) -> dict[str, Any]:
    """A trial's result, from its file if it was run before.

    Args:
        encoder: Takes the images.
        images: Of all environments.
        test: The environment that is unseen.
        seed: Of interventions, donors, folds, pairs and of which classes are base classes.
        settings: The rest.
        folder: Where results are kept, under a digest of all that goes into them.
        cache: Where embeddings are kept.
        progress: Progress display.
    """
    names = "\n".join(f"{p.environment}\t{p.concept}\t{p.path.name}" for p in images)
    given = json.dumps([TRIAL_VERSION, encoder.sha256, encoder.pixels.to_json(), names, test, seed, asdict(settings)])

    def run() -> dict[str, Any]:
        world, facts = _world(encoder, images, test, seed, settings, cache, progress)
        return {"test": test, "seed": seed, "images": facts, **evaluate(world, progress, folder / "selections")}

    return kept_trial(folder, f"{test}-{seed}", given, run)


def _world(
    encoder: Encoder,
    images: Sequence[ImageRecord],
    test: str,
    seed: int,
    settings: TrialSettings,
    cache: Path,
    progress: Progress,
) -> tuple[DomainWorld, dict[str, Any]]:
    """The embedded images of a trial, and what was embedded."""
    known, asked = divided([p for p in images if p.environment != test], settings.fitted)
    new = [p for p in images if p.environment == test]
    shown, _ = divided(new, settings.fitted)
    seen, facts = embedded(encoder, known, settings.options(seed), cache, progress)
    home, _ = embedded(encoder, asked, FitOptions(seed=seed), cache, progress)
    unseen, _ = embedded(encoder, new, FitOptions(seed=seed), cache, progress)
    moved, _ = embedded(encoder, shown, settings.options(seed), cache, progress)
    bank = styles = None
    if hasattr(encoder, "encode_texts"):
        bank = bank_of(encoder, seen.label_names, settings.templates)
        named = [in_words(name) for name in seen.environment_names]
        styles = text_baselines.embed_style_prompts(cast("TextEncoder", encoder), named, seen.label_names)
    return DomainWorld(seen, unseen, bank, seed, _layers(encoder), styles, home, moved), facts


def divided(images: Sequence[ImageRecord], most: int) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Images to fit on, and the others: of every class and environment half, `most` at most, whatever the seed.

    Args:
        images: Of some environments.
        most: Of a class and environment.
    """
    cells: dict[tuple[str, str], list[ImageRecord]] = {}
    for image in images:
        cells.setdefault((image.environment, image.concept), []).append(image)
    known: set[ImageRecord] = set()
    for (environment, concept), cell in cells.items():
        # By names alone, so that it does not matter how many there are elsewhere.
        ranked = sorted(cell, key=lambda p: hashlib.sha256(f"{environment}/{concept}/{p.path.name}".encode()).digest())
        known.update(ranked[: min(most, -(-len(cell) // 2))])
    return [p for p in images if p in known], [p for p in images if p not in known]


def embedded(
    encoder: Encoder, images: Sequence[ImageRecord], options: FitOptions, cache: Path, progress: Progress
) -> tuple[EmbeddingTable, dict[str, Any]]:
    """A table of embeddings; of a checkpoint taken apart the trunk's features are what is kept."""
    if not isinstance(encoder, Quick):
        return tabulate(encoder, images, options, cache=cache, progress=progress)
    table, facts = tabulate(encoder.trunk, images, options, cache=cache, progress=progress)
    return through(encoder.trunk, table), facts


def evaluate(world: DomainWorld, progress: Progress = silent, folder: Path | None = None) -> dict[str, Any]:
    """Every projection of the table on one test environment.

    Returns:
        JSON-ready: `labels` (of the test images, in words), `rows` (name → {`chosen`, `answers` (way → packed),
        `leakage`, `gap`}), `sources` (which pairs → the same), `open` (name → the same), `selections`; `home`: `places`
        (the environment of each image), `labels` and `rows` (name → {`answers`}).
    """
    selections = {way: select_by(world, world.seen, way, INTERVENTIONS, progress, folder) for way in world.ways}
    moments = fitted_moments(world.seen, INTERVENTIONS, seed=world.seed)
    picks = {MAIN: selections["probe"].chosen}
    picks |= {f"auto, for {way}": selections[way].chosen for way in world.ways if way != "probe"}
    picks |= {name: best_of(selections["probe"], name) for name in ESTIMATORS}
    width = world.seen.vectors.shape[1]
    maps: dict[str, Map] = {"none": identity(width)}
    maps |= {name: fitted(moments, pick) for name, pick in picks.items()}
    chosen = {name: str(pick) for name, pick in picks.items()}
    maps |= fitted_baselines(world, moments, picks["icm"])
    chosen["published"] = str(picks["icm"])
    rows: dict[str, Any] = {}
    for name, what in maps.items():
        # What selection takes is mostly one of the estimators' best, which need not be scored twice.
        twin = next((r for r in rows if name in picks and r in picks and picks[r] == picks[name]), None)
        rows[name] = rows[twin] if twin else _row(world, name, what, chosen.get(name, ""))
    return {
        "labels": [world.unseen.label_names[code] for code in world.unseen.labels[world.unseen.unchanged]],
        "rows": rows,
        "sources": _by_source(world, progress, folder),
        "open": _open(world, progress, folder),
        "home": _home(world, {name: maps[name] for name in maps if name == "none" or name.startswith("auto")}),
        "selections": {way: selection.to_json() for way, selection in selections.items()},
    }


def fitted_baselines(world: DomainWorld, moments: Moments, icm: ProjectionCandidate) -> dict[str, Map]:
    """Everything that a projection is compared with, by name; what needs a rank or λ takes those of `icm`.

    Args:
        world: Only its training environments are looked at.
        moments: Of those.
        icm: The candidate of `icm` that selection puts first.
    """
    plain = world.seen.where(world.seen.unchanged)
    vectors, labels, places = plain.vectors, plain.labels, plain.environments
    found: dict[str, Map] = {
        "centring": baselines.centring(moments),
        "whitening": baselines.whitening(moments),
        "pca": baselines.pca(moments, icm.rank or moments.width),
        "within-class": baselines.within_class(vectors, labels),
        "lda": baselines.lda(vectors, labels),
    }
    return found | published_baselines(moments, icm, vectors, labels, places, world.bank, world.layers, world.styles)


def in_words(environment: str) -> str:
    """An environment's name as a prompt says it: `art_painting` is "an art painting"."""
    words = environment.replace("_", " ").lower()
    return f"{'an' if words[:1] in tuple('aeiou') else 'a'} {words}"


def _layers(encoder: Encoder) -> Projectors | None:
    """Both towers' last linear layers, or None: trunks have no text tower, and some towers end otherwise."""
    if not hasattr(encoder, "module"):
        return None
    try:
        return text_baselines.projectors(cast("Checkpoint", encoder))
    except CheckpointError:
        return None


def _row(world: DomainWorld, name: str, what: Map, chosen: str) -> dict[str, Any]:
    ways: tuple[Way, ...] = (*world.ways, "probe, own C") if name in OWN_C else world.ways
    found = _answers(world, what, chosen, ways)
    both = [table.where(table.unchanged) for table in (world.seen, world.unseen)]
    vectors = np.concatenate([what.apply(table.vectors) for table in both])
    # Codes differ between the two tables where a class or an environment is missing in one; names do not.
    names = [np.asarray(table.label_names)[table.labels] for table in both]
    places = [np.asarray(table.environment_names)[table.environments] for table in both]
    labels, environments = (np.unique(np.concatenate(x), return_inverse=True)[1] for x in (names, places))
    leak = domain_leakage(vectors, labels, environments, seed=world.seed)
    gap = None
    if world.moved is not None and len(pairs := interventional_pairs(world.moved)) > 1:
        shown = what.apply(world.moved.vectors)
        gap = invariance_gap(shown[pairs.first], shown[pairs.second])
    return found | {"leakage": leak.accuracy, "chance": leak.chance, "gap": gap}


def _home(world: DomainWorld, maps: Mapping[str, Map]) -> dict[str, Any]:
    """Each training environment by itself: fitted on its images alone, asked about others of it."""
    if world.home is None:
        return {}
    home, seen = world.home, world.seen
    found: dict[str, dict[str, NDArray[np.bool_]]] = {
        name: {way: np.zeros(len(home.labels), dtype=np.bool_) for way in world.ways} for name in maps
    }
    for code, place in enumerate(home.environment_names):
        rows = home.environments == code
        own = seen.where(seen.environments == seen.environment_names.index(place))
        for name, what in maps.items():
            for way in world.ways:
                found[name][way][rows] = answers(what, own, home.where(rows), way, bank=world.bank)
    return {
        "places": [home.environment_names[code] for code in home.environments],
        "labels": [home.label_names[code] for code in home.labels],
        "rows": {
            name: {"answers": {way: packed(right) for way, right in own_answers.items()}}
            for name, own_answers in found.items()
        },
    }


def _by_source(world: DomainWorld, progress: Progress, folder: Path | None) -> dict[str, Any]:
    """Shrinkage, λ selected for prototypes each time, from other pairs."""
    table, found = world.seen, {}
    style = np.isin(table.kinds, [code for code, name in enumerate(table.kind_names) if name == STYLE])
    plain = table.unchanged
    for name, mask, sources in (
        ("the seven", plain | ~style, INTERVENTIONS),
        ("style exchange", plain | style, INTERVENTIONS),
        ("same class", plain, SAME_CLASS),
        ("all three", np.ones_like(plain), Sources()),
    ):
        part = table.where(mask)
        if sources.interventions and part.unchanged.all():
            continue
        pick = select_by(world, part, "prototypes", sources, progress, folder, estimator="shrinkage").chosen
        what = fitted(fitted_moments(part, sources, seed=world.seed), pick)
        found[name] = _answers(world, what, str(pick), world.ways)
    return found


def _open(world: DomainWorld, progress: Progress, folder: Path | None) -> dict[str, Any]:
    """Fitted and selected on the base classes alone; all classes are told apart, by prototypes and by name."""
    table = world.seen
    base = base_classes(table.label_names, world.seed)
    part = table.where(np.asarray([name in base for name in table.label_names])[table.labels])
    pick = select_by(world, part, "prototypes", INTERVENTIONS, progress, folder).chosen
    what = fitted(fitted_moments(part, INTERVENTIONS, seed=world.seed), pick)
    maps: dict[str, tuple[Map, str]] = {"none": (identity(table.vectors.shape[1]), ""), "auto": (what, str(pick))}
    return {
        "base": sorted(base),
        "rows": {name: _answers(world, each, said, world.ways) for name, (each, said) in maps.items()},
    }


def tried(width: int, estimator: str = "auto") -> list[ProjectionCandidate]:
    """What selection chooses from: `calibrate`'s grid, with few λ of `icm` in a wide space."""
    return [
        c
        for c in grid(width, estimator=estimator)
        if c.estimator != "icm" or width < WIDE or c.strength in ICM_STRENGTHS
    ]


def select_by(
    world: DomainWorld,
    table: EmbeddingTable,
    objective: Objective,
    sources: Sources,
    progress: Progress,
    folder: Path | None,
    *,
    estimator: str = "auto",
) -> Selection:
    """What selection says of a table's images for one way of naming classes, kept in a folder."""
    candidates = tried(table.vectors.shape[1], estimator)
    # A table of base classes has other codes than the bank's; none is selected for by name.
    bank = world.bank if objective == "zero-shot" else None
    return kept_selection(
        folder, table, candidates, objective=objective, bank=bank, sources=sources, seed=world.seed, progress=progress
    )


def _answers(world: DomainWorld, what: Map, chosen: str, ways: Sequence[Way]) -> dict[str, Any]:
    found: Mapping[Way, NDArray[np.bool_]] = {
        way: answers(what, world.seen, world.unseen, way, bank=world.bank) for way in ways
    }
    return {"chosen": chosen, "answers": {way: packed(right) for way, right in found.items()}}
