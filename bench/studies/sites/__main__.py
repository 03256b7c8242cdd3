"""What a few unlabelled images of a place are worth: `python -m invariclip.bench.studies.sites`.

Each style of stylebench and each domain of PACS that nothing was fitted or chosen on is a site. A site is measured on
some of its images and scored on the others, with the projections that the tables of stylebench and PACS chose.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from invariclip.bench.studies.domains import trial as domains
from invariclip.bench.studies.encoders import Quick, TrunkEncoder
from invariclip.bench.studies.pages import write_result
from invariclip.bench.studies.sites.peers import colours, recoloured, t3a, tda
from invariclip.bench.studies.sites.report import BOUND, NONE, WHOLE, plot, render
from invariclip.bench.studies.sites.worlds import (
    ALIGNED,
    ALONE,
    GUARDS,
    HALF,
    SHOWN,
    SKEWED,
    FormChoice,
    Place,
    answers,
    choose,
    measured,
    samples,
    wards,
)
from invariclip.bench.studies.stylebench import trial as styles
from invariclip.bench.studies.stylebench.images import read_manifest
from invariclip.bench.studies.stylebench.sources import HELD_OUT_STYLES, TRAINING_STYLES
from invariclip.bench.studies.stylebench.trial import embed_world
from invariclip.bench.studies.trials import Stratified, bound_blas, ends, fitted
from invariclip.calibrate.data.domainbed import find_layout, read_layout
from invariclip.calibrate.data.images import read_images
from invariclip.calibrate.data.pairs import ALL_SOURCES, fitted_moments
from invariclip.calibrate.fit import FitOptions, bank_of
from invariclip.calibrate.projection.bootstrap import Bootstrap
from invariclip.calibrate.projection.classifiers import unit
from invariclip.calibrate.projection.selection import Selection
from invariclip.cli.main import run_command
from invariclip.console import bar, note, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from invariclip.artifact.projection import Projection
    from invariclip.bench.studies.sites.worlds import Rows, Vectors, Ward
    from invariclip.bench.studies.stylebench.trial import StyleWorld
    from invariclip.bench.studies.trials import Resampler
    from invariclip.calibrate.data.pairs import EmbeddingTable
    from invariclip.calibrate.projection.candidates import ProjectionCandidate
    from invariclip.console import Progress

    Told = tuple[dict[str, Any], dict[str, Any]]
    """Rows and choices by way of naming classes."""

DRAWS = 6
"""Halves of every site and seed: one to measure it on, one to score."""
STYLE_DRAWS = 2
"""Halves of every training style that forms are chosen on: one shows hundreds of classes, and takes as long."""
CHOSEN = (SHOWN, HALF, *GUARDS)
"""Samples that the chosen form is scored with."""


@dataclass
class SiteScores:
    """Shares of right answers by row, site and image, over the halves that were scored.

    Attributes:
        right: Row → site → right answers by image.
        asked: Row → site → answers by image.
        costs: Row → what a draw keeps of a site, in numbers, and adds to each image, in products.
        choices: What training environments chose, for each world, JSON-ready.
    """

    right: dict[str, dict[str, Vectors]] = field(default_factory=dict)
    asked: dict[str, dict[str, Vectors]] = field(default_factory=dict)
    costs: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    choices: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: str, site: str, right: NDArray[np.bool_], asked: NDArray[np.bool_]) -> None:
        """Counts one draw.

        Args:
            row: Of the table.
            site: Its name.
            right: Of the images that are asked about, in their order.
            asked: bool [N].
        """
        for kept, values in ((self.right, right), (self.asked, np.ones_like(right))):
            found = kept.setdefault(row, {}).setdefault(site, np.zeros(len(asked)))
            found[asked] += values


@dataclass(frozen=True, eq=False)
class Draw:
    """One half of a site that is shown, and the other, which is asked about.

    Attributes:
        both: The world by space.
        name: The site.
        shown: Rows that the site may be measured on.
        asked: bool [N].
    """

    both: Mapping[str, Ward]
    name: str
    shown: Rows
    asked: NDArray[np.bool_]

    @property
    def ward(self) -> Ward:
        """The world in the projected space."""
        return self.both[ALONE]

    @property
    def vectors(self) -> Vectors:
        """All images of the site, projected."""
        return self.ward.sites[self.name]


def score(both: Mapping[str, Ward], choice: FormChoice, world: tuple[str, int], tally: SiteScores) -> None:
    """Adds every row of one world to a tally.

    Args:
        both: The world by space.
        choice: What its training environments chose.
        world: What is unseen in it, if it has a name, and the seed of its samples.
        tally: What is added to.
    """
    (unseen, seed), ward, plain = world, both[ALONE], both[NONE]
    tally.choices.append({"unseen": unseen, "seed": seed} | choice.to_json())
    for place, name in enumerate(ward.sites):
        vectors, labels = ward.sites[name], ward.labels[name]
        rng = np.random.default_rng([seed, place, 71])
        every = np.ones(len(labels), dtype=np.bool_)
        tally.add(NONE, name, plain.rule(plain.sites[name]) == labels, every)
        tally.add(ALONE, name, ward.rule(vectors) == labels, every)
        for _ in range(DRAWS):
            order = rng.permutation(len(labels))
            shown, asked = order[: len(order) // 2], np.isin(np.arange(len(order)), order[len(order) // 2 :])
            draw = Draw(both, name, shown, asked)
            for row, told in (*_rows(draw, choice, rng), *_peers(draw, choice, tally.costs), *_bounds(draw)):
                tally.add(row, name, told == labels[asked], asked)
        tally.add(WHOLE, name, ward.rule(measured(ward, vectors).apply(vectors)) == labels, every)


def _rows(draw: Draw, choice: FormChoice, rng: np.random.Generator) -> Iterator[tuple[str, Rows]]:
    """Rows of the form that `adapt` has, and of other forms of a shift."""
    ward, vectors, asked, some = draw.ward, draw.vectors, draw.asked, draw.shown[:SKEWED]
    drawn = dict(samples(ward.contents[draw.name], draw.shown, rng))
    for row, rows in drawn.items():
        yield row, ward.rule(measured(ward, vectors[rows]).apply(vectors[asked]))
    for row, form in (
        ("20, no projection", "no projection, site"),
        ("20, no projection, classes aligned", "no projection, site, classes aligned"),
        ("20, centring", "projection, centring"),
    ):
        yield row, answers(form, draw.both, draw.name, asked, some)
    for row in CHOSEN:
        yield f"{row}, classes aligned", answers(ALIGNED, draw.both, draw.name, asked, drawn[row])
        yield f"{row}, chosen", answers(choice.form, draw.both, draw.name, asked, drawn[row])
    yield "20, whole shift", ward.rule(unit(vectors[asked] - (vectors[some].mean(axis=0) - ward.training)))
    other = ward.others[draw.name]
    wrong = other[rng.permutation(len(other))[:SKEWED]]
    half = np.concatenate([wrong[: SKEWED // 2], vectors[some[: SKEWED // 2]]])
    yield "20 of another site", ward.rule(measured(ward, wrong).apply(vectors[asked]))
    yield "20, half of another site", ward.rule(measured(ward, half).apply(vectors[asked]))


def _peers(draw: Draw, choice: FormChoice, costs: dict[str, list[tuple[int, int]]]) -> Iterator[tuple[str, Rows]]:
    """Rows of what others do with the same images, in the projected space."""
    ward, vectors = draw.ward, draw.vectors[draw.asked]
    classes, width = ward.bank.shape
    for row, rows in ((SHOWN, draw.shown[:SKEWED]), (HALF, draw.shown)):
        sample = draw.vectors[rows]
        shift, mean = measured(ward, sample).shift.astype(np.float64), sample.mean(axis=0)
        moved = recoloured(vectors, shift, mean, colours(sample), ward.colours, choice.shrinkages[row])
        yield f"{row}, CORAL", ward.rule(moved)
        costs[f"{row}, CORAL"].append((width * (width + 1), width * width))
        keep = choice.filters[row]
        yield f"{row}, T3A", t3a(ward.rule, sample).filtered(keep)(vectors)
        yield f"{row}, T3A after the site", t3a(ward.rule, unit(sample - shift)).filtered(keep)(unit(vectors - shift))
        costs[f"{row}, T3A"].append((classes * width, 0))
        costs[f"{row}, T3A after the site"].append(((classes + 1) * width, 0))
        caches = tda(ward.rule, sample)
        yield f"{row}, TDA", caches(vectors)
        costs[f"{row}, TDA"].append((caches.numbers, caches.products))
        costs[row].append((width, 0))


def _bounds(draw: Draw) -> Iterator[tuple[str, Rows]]:
    """What the labels of the half that is shown would be worth, where it has images of every class."""
    labels = draw.ward.labels[draw.name]
    known = labels[draw.shown]
    if len(np.unique(known)) < len(np.unique(labels)):
        return
    for space, ward in draw.both.items():
        vectors = ward.sites[draw.name]
        shown = vectors[draw.shown]
        mean = np.mean([shown[known == label].mean(axis=0) for label in np.unique(known)], axis=0)
        moved = unit(vectors[draw.asked] - (mean - ward.training))
        yield f"{BOUND}{space}, whole shift by the true means of its classes", ward.rule(moved)
        yield f"{BOUND}{space}, the same, classes aligned", ward.aligned(moved)
    if draw.ward.learn is not None:
        yield (
            f"{BOUND}classes of its own labelled half",
            draw.ward.learn(draw.vectors[draw.shown], known)(draw.vectors[draw.asked]),
        )


def stylebench(data: Path, model: Any, seeds: int, work: Path, features: Path, progress: Progress) -> Told:
    """The held-out styles as sites, by zero-shot and by prototypes."""
    images, trunk = read_images(data / "manifest.jsonl"), TrunkEncoder(model, "bfloat16")
    groups = {image.concept: image.group for image in read_manifest(data / "manifest.jsonl")}
    tallies: dict[str, SiteScores] = defaultdict(SiteScores)
    kept: dict[str, Rows] = {}
    for seed in range(seeds):
        world = embed_world(model, trunk, images, groups, {styles.SEVEN: styles.KINDS[styles.SEVEN]}, features, seed,
                            progress=progress)  # fmt: skip
        sites = {style: world.table.where(world.rows([style])) for style in HELD_OUT_STYLES}
        kept = {name: each.concepts for name, each in sites.items()}
        following = dict(zip(HELD_OUT_STYLES, (*HELD_OUT_STYLES[1:], HELD_OUT_STYLES[0]), strict=True))
        others = {name: sites[following[name]] for name in sites}
        for way in ("zero-shot", "prototypes"):
            note(f"stylebench, seed {seed}: {way}")
            tried = styles.tried(world.bank.shape[1], way)
            pick = styles.select_by(world, way, styles.SEVEN, ALL_SOURCES, tried, progress, work).chosen
            place = Place(
                seen=world.table.where(world.rows(TRAINING_STYLES)),
                sites=sites,
                others=others,
                kinds=partial(_groups, world),
                bank=world.bank,
                names=world.table.label_names,
                refit=partial(_style_projection, world, pick),
            )
            what, choice = (
                styles.fitted(world, styles.SEVEN, ALL_SOURCES, pick),
                choose(place, way, seed, Bootstrap, STYLE_DRAWS),
            )
            score(wards(what, place, way), choice, ("", seed), tallies[way])
    return told(tallies, kept, Bootstrap)


def told(tallies: Mapping[str, SiteScores], kept: dict[str, Rows], resampler: Callable[..., Resampler]) -> Told:
    """See `summarised`; and what was chosen in each world."""
    rows = {way: summarised(tally, kept, resampler) for way, tally in tallies.items()}
    return rows, {way: tally.choices for way, tally in tallies.items()}


def _labels(table: EmbeddingTable) -> Rows:
    return table.labels


def _groups(world: StyleWorld, table: EmbeddingTable) -> Rows:
    return np.asarray(world.groups[table.concepts])


def _domain_projection(seen: EmbeddingTable, pick: ProjectionCandidate, seed: int, without: str | None) -> Projection:
    """What was chosen, fitted on training images without one domain, or on all."""
    codes = [code for code, name in enumerate(seen.environment_names) if name != without]
    rest = seen.where(np.isin(seen.environments, codes))
    return fitted(fitted_moments(rest, domains.INTERVENTIONS, seed=seed), pick)


def _style_projection(world: StyleWorld, pick: ProjectionCandidate, without: str) -> Projection:
    """What was chosen, fitted on a world's training images without one style."""
    table = world.train[styles.SEVEN]
    rest = table.where(table.environments != table.environment_names.index(without))
    bank = world.train_bank if pick.captions else None
    return fitted(fitted_moments(rest, ALL_SOURCES, captions=bank, seed=world.seed), pick)


def pacs(data: Path, model: Any, seeds: int, work: Path, features: Path, progress: Progress) -> Told:
    """Each domain unseen in turn as a site, by zero-shot, prototypes and probe; projections are those of its table."""
    layout = find_layout("PACS")
    images, encoder, settings = read_layout(layout, data), Quick(model, "bfloat16"), domains.TrialSettings()
    tallies: dict[str, SiteScores] = defaultdict(SiteScores)
    kept: dict[str, Rows] = {}
    for seed in range(seeds):
        for test in layout.environments:
            trial = domains.run_trial(
                encoder, images, test, seed, settings, folder=work, cache=features, progress=progress
            )
            known, _ = domains.divided([p for p in images if p.environment != test], settings.fitted)
            new = [p for p in images if p.environment == test]
            seen, _ = domains.embedded(encoder, known, settings.options(seed), features, progress)
            unseen, _ = domains.embedded(encoder, new, FitOptions(seed=seed), features, progress)
            bank = bank_of(encoder, seen.label_names, settings.templates)
            kept[test] = unseen.labels
            other = seen.where(seen.unchanged & (seen.environments == seed % len(seen.environment_names)))
            for way, said in trial["selections"].items():
                note(f"PACS, seed {seed}: {test}, {way}")
                pick = Selection.from_json(said).chosen

                refit = partial(_domain_projection, seen, pick, seed)
                place = Place(seen, {test: unseen}, {test: other}, _labels, bank, seen.label_names, refit)
                choice = choose(place, way, seed, Stratified)
                score(wards(refit(None), place, way), choice, (test, seed), tallies[way])
    return told(tallies, kept, Stratified)


def summarised(tally: SiteScores, kept: dict[str, Rows], resampler: Callable[..., Resampler]) -> dict[str, Any]:
    """JSON-ready: row → accuracy by site and mean, and paired differences to three of the rows.

    Args:
        tally: All draws of all seeds.
        kept: Site → what the bootstrap draws.
        resampler: `Bootstrap` over concepts, or `Stratified` over images.
    """
    names = list(kept)
    codes = np.concatenate([np.full(len(kept[name]), place) for place, name in enumerate(names)])
    drawn = resampler(np.concatenate([kept[name] for name in names]), codes)

    def shares(row: str) -> Vectors:
        right, asked = tally.right[row], tally.asked[row]
        # an image that no draw scored tells nothing: it counts as the projection leaves it
        plain = {name: tally.right[ALONE][name] / tally.asked[ALONE][name] for name in names}
        return np.concatenate([np.where(asked[n] > 0, right[n] / np.maximum(asked[n], 1), plain[n]) for n in names])

    found = {row: drawn.samples(shares(row)) for row in tally.right if set(tally.right[row]) == set(names)}

    def interval(values: Vectors) -> dict[str, float]:
        low, high = ends(values[1:, -1])
        return {"value": round(float(values[0, -1]), 3), "low": round(float(low), 3), "high": round(float(high), 3)}

    return {
        row: {
            "sites": {name: round(float(values[0, place]), 3) for place, name in enumerate(names)},
            "mean": interval(values),
            "to_none": interval(values - found[NONE]),
            "to_projection": interval(values - found[ALONE]),
            "to_adapted": interval(values - found[SHOWN]),
            **_cost(tally.costs.get(row, [])),
        }
        for row, values in found.items()
    }


def _cost(costs: list[tuple[int, int]]) -> dict[str, Any]:
    """Means over draws: numbers that are kept of a site, and products that an image costs more."""
    if not costs:
        return {}
    numbers, products = (float(np.mean(values)) for values in zip(*costs, strict=True))
    return {"cost": {"numbers": round(numbers), "products": round(products)}}


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("build/stylebench"), show_default=True,
              help="The built image set.")  # fmt: skip
@click.option("--pacs", "pacs_data", type=click.Path(path_type=Path), help="PACS, or the folder that holds it.")
@click.option("--model", default="reference", show_default=True, help="As `calibrate --model`.")
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="How many, counted from 0.")
@click.option("--table", type=click.Path(path_type=Path), default=Path("build/table"), show_default=True,
              help="What the table of stylebench keeps: its projections are taken.")  # fmt: skip
@click.option("--domains", "kept", type=click.Path(path_type=Path), default=Path("build/domains"), show_default=True,
              help="The same of PACS.")  # fmt: skip
@click.option("--features", type=click.Path(path_type=Path), default=Path("build/features"), show_default=True,
              help="Keeps the trunk's features.")  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("docs/sites.md"), show_default=True,
              help="The page; .json and .svg too.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="No progress.")
def main(
    data: Path, pacs_data: Path | None, model: str, seeds: int, table: Path, kept: Path, features: Path, out: Path,
    quiet: bool,
) -> None:  # fmt: skip
    """Scores adaptation to sites that nothing was fitted or chosen on, and writes the page."""
    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    bound_blas()
    checkpoint, progress = load_checkpoint(model), silent if quiet else bar
    found = {"stylebench": stylebench(data, checkpoint, seeds, table / "trials" / "selections", features, progress)}
    if pacs_data is not None:
        found["PACS"] = pacs(pacs_data, checkpoint, seeds, kept / "trials", features, progress)
    result = {"model": checkpoint.name, "checkpoint_sha256": checkpoint.sha256, "seeds": seeds, "draws": DRAWS,
              "worlds": {name: rows for name, (rows, _) in found.items()},
              "choices": {name: choices for name, (_, choices) in found.items()}}  # fmt: skip
    write_result(out, result, render(result, out.stem), plot(result))


if __name__ == "__main__":
    run_command(main)
