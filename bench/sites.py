"""What a few unlabelled pictures of a place are worth: `python -m invariclip.bench.sites`.

Each style of stylebench and each domain of PACS that nothing was fitted or chosen on is a site. A site is measured on
some of its pictures and scored on the others, with the projections that the tables of stylebench and PACS chose.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from invariclip.bench.blas import bound_blas
from invariclip.bench.domains import trial as domains
from invariclip.bench.resampling import Stratified
from invariclip.bench.sites_page import render
from invariclip.bench.stylebench import trial as styles
from invariclip.bench.stylebench.encoders import Quick, Trunk
from invariclip.bench.stylebench.manifest import read_manifest
from invariclip.bench.stylebench.sources import HELD_OUT_STYLES, TRAINING_STYLES
from invariclip.bench.stylebench.world import embed_world
from invariclip.calibrate.evaluate import LEVEL, Bootstrap, prototype_bank, unit
from invariclip.calibrate.fit import Options, bank_of, training_mean
from invariclip.calibrate.layouts import find_layout, read_layout
from invariclip.calibrate.pairs import ALL_SOURCES, fitted_moments
from invariclip.calibrate.pictures import read_pictures
from invariclip.calibrate.probe import fit_probe
from invariclip.cli import run_command
from invariclip.console import bar, note, silent
from invariclip.files import write_atomically
from invariclip.projection import Projection, identity
from invariclip.site import new_site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from invariclip.bench.resampling import Resampler
    from invariclip.calibrate.pairs import Table
    from invariclip.console import Progress

    Vectors = NDArray[np.float64]
    Rows = NDArray[np.int64]
    Rule = Callable[[Vectors], Rows]

SIZES = (1, 2, 5, 10, 20, 50, 100)
SKEWED = 20
"""Pictures of a sample whose contents are skewed, of a wrong site, and of the rows beside."""
DRAWS = 6
"""Halves of every site and seed: one to measure it on, one to score."""
NONE, PROJECTION = "no projection", "projection"


@dataclass(frozen=True, eq=False)
class Place:
    """A world and its sites, before any projection.

    Attributes:
        seen: The training pictures.
        sites: Unseen pictures by site; labels are matched by name.
        others: Pictures of another place by site.
        contents: Kinds of things by site, int64 [N].
        bank: [K, D], of `names`.
        names: K class names.
    """

    seen: Table
    sites: dict[str, Table]
    others: dict[str, Table]
    contents: dict[str, Rows]
    bank: Vectors
    names: Sequence[str]


@dataclass(frozen=True, eq=False)
class Ward:
    """Sites of one world in one space, and how a picture is named there.

    Attributes:
        sites: Name → unit embeddings [N, d].
        labels: Name → int64 [N].
        concepts: Name → int64 [N], what the bootstrap draws.
        contents: Name → int64 [N], the kinds of things that skewed samples are drawn by.
        others: Name → unit embeddings of another place.
        rule: Unit embeddings → labels.
        bank: [K, d], embeddings of the classes' names.
        training: m₀.
        centred: The rule of classes whose pictures lost their own environments' means, for the row `centring`.
    """

    sites: dict[str, Vectors]
    labels: dict[str, Rows]
    concepts: dict[str, Rows]
    contents: dict[str, Rows]
    others: dict[str, Vectors]
    rule: Rule
    bank: Vectors
    training: Vectors
    centred: Rule


@dataclass
class Tally:
    """Shares of right answers by row, site and picture, over the halves that were scored."""

    right: dict[str, dict[str, Vectors]] = field(default_factory=dict)
    asked: dict[str, dict[str, Vectors]] = field(default_factory=dict)

    def add(self, row: str, site: str, right: NDArray[np.bool_], asked: NDArray[np.bool_]) -> None:
        """Counts one draw."""
        for kept, values in ((self.right, right & asked), (self.asked, asked)):
            found = kept.setdefault(row, {}).setdefault(site, np.zeros(len(right)))
            found += values


def score(ward: Ward, plain: Ward, seed: int, tally: Tally) -> None:
    """Adds every row of one world to a tally.

    Args:
        ward: In the projected space.
        plain: The same pictures without a projection.
        seed: Of the samples.
        tally: What is added to.
    """
    for place, name in enumerate(ward.sites):
        vectors, there, labels = ward.sites[name], plain.sites[name], ward.labels[name]
        rng = np.random.default_rng([seed, place, 71])
        everything = np.ones(len(labels), dtype=np.bool_)
        tally.add(NONE, name, plain.rule(there) == labels, everything)
        tally.add(PROJECTION, name, ward.rule(vectors) == labels, everything)
        for _ in range(DRAWS):
            order = rng.permutation(len(labels))
            shown, asked = order[: len(order) // 2], np.isin(np.arange(len(order)), order[len(order) // 2 :])
            for row, rows in _samples(ward.contents[name], shown, rng):
                tally.add(row, name, ward.rule(_adapted(ward, vectors, vectors[rows])) == labels, asked)
            some = shown[:SKEWED]
            other = ward.others[name]
            wrong = other[rng.permutation(len(other))[:SKEWED]]
            half = np.concatenate([wrong[: SKEWED // 2], vectors[some[: SKEWED // 2]]])
            mean = vectors[some].mean(axis=0)
            for row, right in (
                ("20, no projection", plain.rule(_adapted(plain, there, there[some]))),
                ("20, whole shift", ward.rule(unit(vectors - (mean - ward.training)))),
                ("20, centring", ward.centred(unit(vectors - mean))),
                ("20 of another site", ward.rule(_adapted(ward, vectors, wrong))),
                ("20, half of another site", ward.rule(_adapted(ward, vectors, half))),
            ):
                tally.add(row, name, right == labels, asked)


def _samples(contents: Rows, shown: Rows, rng: np.random.Generator) -> Iterator[tuple[str, Rows]]:
    """Rows of the table, and the pictures of those shown that a site is measured on."""
    for size in SIZES:
        if size <= len(shown):
            yield f"{size} pictures" if size > 1 else "1 picture", shown[:size]
    yield "half of them", shown
    kinds = np.unique(contents[shown])
    for number, word in ((1, "one kind"), (2, "two kinds")):
        pool = shown[np.isin(contents[shown], rng.choice(kinds, number, replace=False))]
        yield f"20 of {word}", pool[:SKEWED]
        yield f"half of {word}", pool
    odds = rng.permutation(1 / np.arange(1, len(kinds) + 1))[np.searchsorted(kinds, contents[shown])]
    yield "20, kinds by Zipf's law", rng.choice(shown, SKEWED, replace=False, p=odds / odds.sum())


def _adapted(ward: Ward, vectors: Vectors, sample: Vectors) -> Vectors:
    """Through the very code that serves."""
    site = new_site("bench", "bench", ward.training, len(ward.bank), {}).adding(sample, ward.bank)
    return np.asarray(site.apply(vectors), dtype=np.float64)


def nearest(bank: Vectors, labels: Rows) -> Rule:
    """The label of the nearest of some vectors, by cosine; in float32."""
    small = bank.astype(np.float32)
    return lambda vectors: labels[np.argmax(vectors.astype(np.float32) @ small.T, axis=1)]


def ward(what: Projection, place: Place, way: str) -> Ward:
    """A world in the space of one projection.

    Args:
        what: The projection.
        place: The world.
        way: `zero-shot`, `prototypes` or `probe`.
    """
    seen, sites, names, bank = place.seen, place.sites, place.names, place.bank
    places = {name: place for place, name in enumerate(names)}

    def labels(table: Table) -> Rows:
        return np.asarray([places[name] for name in table.label_names])[table.labels]

    plain = seen.where(seen.unchanged)
    shown, given, projected = what.apply(plain.vectors), labels(plain), what.apply(bank)
    centred = shown.copy()
    for code in np.unique(plain.environments):
        own = plain.environments == code
        centred[own] = unit(shown[own] - shown[own].mean(axis=0))
    rules: list[Rule] = []
    for vectors in (shown, centred):
        if way == "zero-shot":
            rules.append(nearest(projected, np.arange(len(names))))
        elif way == "prototypes":
            codes, means = prototype_bank(vectors, given)
            rules.append(nearest(means, codes))
        else:
            rules.append(fit_probe(vectors, given).predict)
    return Ward(
        sites={name: what.apply(table.vectors) for name, table in sites.items()},
        labels={name: labels(table) for name, table in sites.items()},
        concepts={name: table.concepts for name, table in sites.items()},
        contents=place.contents,
        others={name: what.apply(table.vectors) for name, table in place.others.items()},
        rule=rules[0],
        bank=projected,
        training=training_mean(what, plain),
        centred=rules[1],
    )


def stylebench(data: Path, model: Any, seeds: int, work: Path, features: Path, progress: Progress) -> dict[str, Any]:
    """The held-out styles as sites, by zero-shot and by prototypes."""
    pictures, trunk = read_pictures(data / "manifest.jsonl"), Trunk(model, "bfloat16")
    groups = {picture.concept: picture.group for picture in read_manifest(data / "manifest.jsonl")}
    tallies: dict[str, Tally] = defaultdict(Tally)
    kept: dict[str, Rows] = {}
    for seed in range(seeds):
        world = embed_world(model, trunk, pictures, groups, {styles.SEVEN: styles.KINDS[styles.SEVEN]}, features, seed,
                            progress=progress)  # fmt: skip
        table = world.table
        sites = {style: table.where(world.rows([style])) for style in HELD_OUT_STYLES}
        kept = {name: each.concepts for name, each in sites.items()}
        following = dict(zip(HELD_OUT_STYLES, (*HELD_OUT_STYLES[1:], HELD_OUT_STYLES[0]), strict=True))
        others = {name: sites[following[name]] for name in sites}
        for way in ("zero-shot", "prototypes"):
            note(f"stylebench, seed {seed}: {way}")
            tried = styles.tried(world.bank.shape[1], way)
            pick = styles.select_by(world, way, styles.SEVEN, ALL_SOURCES, tried, progress, work).chosen
            what = styles.fitted(world, styles.SEVEN, ALL_SOURCES, pick)
            contents = {name: world.groups[each.concepts] for name, each in sites.items()}
            place = Place(table.where(world.rows(TRAINING_STYLES)), sites, others, contents, world.bank,
                          table.label_names)  # fmt: skip
            score(ward(what, place, way), ward(identity(world.bank.shape[1]), place, way), seed, tallies[way])
    return {way: summarised(tally, kept, Bootstrap) for way, tally in tallies.items()}


def pacs(data: Path, model: Any, seeds: int, work: Path, features: Path, progress: Progress) -> dict[str, Any]:
    """Each domain unseen in turn as a site, by zero-shot, prototypes and probe."""
    layout = find_layout("PACS")
    pictures, encoder, settings = read_layout(layout, data), Quick(model, "bfloat16"), domains.Settings()
    tallies: dict[str, Tally] = defaultdict(Tally)
    kept: dict[str, Rows] = {}
    for seed in range(seeds):
        for test in layout.environments:
            note(f"PACS, seed {seed}: {test}")
            known, _ = domains.divided([p for p in pictures if p.environment != test], settings.fitted)
            options = settings.options(seed)
            seen, _ = domains.embedded(encoder, known, options, features, progress)
            unseen, _ = domains.embedded(
                encoder, [p for p in pictures if p.environment == test], Options(seed=seed), features, progress
            )
            bank = bank_of(model, seen.label_names, settings.templates)
            world = domains.World(seen, unseen, bank, seed)
            kept[test] = unseen.labels
            other = seen.where(seen.unchanged & (seen.environments == seed % len(seen.environment_names)))
            for way in world.ways:
                pick = domains.select_by(world, seen, way, domains.INTERVENTIONS, progress, work).chosen
                what = domains.fitted(fitted_moments(seen, domains.INTERVENTIONS, seed=seed), pick)
                place = Place(seen, {test: unseen}, {test: other}, {test: unseen.labels}, bank, seen.label_names)
                score(ward(what, place, way), ward(identity(bank.shape[1]), place, way), seed, tallies[way])
    return {way: summarised(tally, kept, Stratified) for way, tally in tallies.items()}


def summarised(tally: Tally, kept: dict[str, Rows], resampler: Callable[..., Resampler]) -> dict[str, Any]:
    """JSON-ready: row → accuracy by site and mean, and paired differences to no projection and to the projection.

    Args:
        tally: All draws of all seeds.
        kept: Site → what the bootstrap draws.
        resampler: `Bootstrap` over concepts, or `Stratified` over pictures.
    """
    names = list(kept)
    codes = np.concatenate([np.full(len(kept[name]), place) for place, name in enumerate(names)])
    drawn = resampler(np.concatenate([kept[name] for name in names]), codes)
    tail = 100 * (1 - LEVEL) / 2

    def shares(row: str) -> Vectors:
        right, asked = tally.right[row], tally.asked[row]
        # a picture that no draw scored tells nothing: it counts as the projection leaves it
        plain = {name: tally.right[PROJECTION][name] / tally.asked[PROJECTION][name] for name in names}
        return np.concatenate([np.where(asked[n] > 0, right[n] / np.maximum(asked[n], 1), plain[n]) for n in names])

    samples = {row: drawn.samples(shares(row)) for row in tally.right if set(tally.right[row]) == set(names)}

    def told(values: Vectors) -> dict[str, float]:
        low, high = np.nanpercentile(values[1:, -1], [tail, 100 - tail])
        return {"value": round(float(values[0, -1]), 3), "low": round(float(low), 3), "high": round(float(high), 3)}

    return {
        row: {
            "sites": {name: round(float(values[0, place]), 3) for place, name in enumerate(names)},
            "mean": told(values),
            "to_none": told(values - samples[NONE]),
            "to_projection": told(values - samples[PROJECTION]),
        }
        for row, values in samples.items()
    }


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("build/stylebench"), show_default=True,
              help="The built picture set.")  # fmt: skip
@click.option("--pacs", "pacs_data", type=click.Path(path_type=Path), help="PACS, or the folder that holds it.")
@click.option("--model", default="reference", show_default=True, help="As `calibrate --model`.")
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="How many, counted from 0.")
@click.option("--table", type=click.Path(path_type=Path), default=Path("build/table"), show_default=True,
              help="What the table of stylebench keeps: its selections are taken.")  # fmt: skip
@click.option("--domains", "kept", type=click.Path(path_type=Path), default=Path("build/domains"), show_default=True,
              help="The same of PACS.")  # fmt: skip
@click.option("--features", type=click.Path(path_type=Path), default=Path("build/features"), show_default=True,
              help="Keeps the trunk's features.")  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("docs/sites.md"), show_default=True,
              help="The page; .json too.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="No progress.")
def main(
    data: Path, pacs_data: Path | None, model: str, seeds: int, table: Path, kept: Path, features: Path, out: Path,
    quiet: bool,
) -> None:  # fmt: skip
    """Scores adaptation to sites that nothing was fitted or chosen on, and writes the page."""
    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    bound_blas()
    checkpoint, progress = load_checkpoint(model), silent if quiet else bar
    worlds = {"stylebench": stylebench(data, checkpoint, seeds, table / "trials" / "selections", features, progress)}
    if pacs_data is not None:
        worlds["PACS"] = pacs(pacs_data, checkpoint, seeds, kept / "trials" / "selections", features, progress)
    result = {"model": checkpoint.name, "checkpoint_sha256": checkpoint.sha256, "seeds": seeds, "draws": DRAWS,
              "worlds": worlds}  # fmt: skip
    write_atomically(out.with_suffix(".json"), json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_atomically(out, render(result))
    note(f"wrote {out} and its .json")


if __name__ == "__main__":
    run_command(main)
