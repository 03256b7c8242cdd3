"""The committed table: every estimator on styles that nothing was fitted on, also where it does not help.

Fitted and selected on training styles alone; concepts of split `test` are left out there as well. Scored on the four
held-out styles over all concepts, by zero-shot and by class prototypes from the training styles.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import numpy as np

from invariclip.bench.stylebench.sources import HELD_OUT_STYLES, TRAINING_STYLES
from invariclip.calibrate.candidates import Candidate, grid
from invariclip.calibrate.estimators import fit, published
from invariclip.calibrate.evaluate import Bootstrap, Interval, prototypes, zero_shot
from invariclip.calibrate.fit import Options, bank_of, tabulate
from invariclip.calibrate.pairs import ALL_SOURCES, Sources, Table, fitted_moments
from invariclip.calibrate.pictures import Picture, read_pictures
from invariclip.calibrate.select import Objective, Selection, select
from invariclip.console import Progress, bar, note, silent
from invariclip.files import sha256_file, write_atomically
from invariclip.interventions import PAPER
from invariclip.projection import Projection, identity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from invariclip.calibrate.embed import Encoder
    from invariclip.calibrate.moments import Moments

DATA = Path("build/stylebench")
PAGE = Path("docs/stylebench.md")
TEMPLATES = ("a picture of a {}.",)
OBJECTIVES: tuple[Objective, ...] = ("both", "zero-shot", "prototypes")
ESTIMATORS = ("icm", "generalised", "shrinkage")
VARIANTS: dict[str, tuple[Sources, bool]] = {
    "natural": (Sources(True, False), False),
    "interventions": (Sources(False, True), False),
    "natural + interventions": (Sources(True, True), False),
    "natural + captions": (Sources(True, False), True),
    "interventions + captions": (Sources(False, True), True),
    "all three": (Sources(True, True), True),
}
"""Which pairs of pictures, and whether captions."""
Protocol = Literal["zero-shot", "prototypes"]
PROTOCOLS: tuple[Protocol, ...] = ("zero-shot", "prototypes")


@dataclass(frozen=True)
class World:
    """The embedded picture set.

    Attributes:
        table: All pictures, unchanged.
        bank: float64 [K, D], its class embeddings by label code.
        train: What is fitted on: training styles, splits train and calibrate, with changed versions.
        train_bank: The class embeddings of `train`.
        learnt: Concepts that the encoder was trained on.
        seed: Of everything that is drawn.
    """

    table: Table
    bank: NDArray[np.float64]
    train: Table
    train_bank: NDArray[np.float64]
    learnt: frozenset[str]
    seed: int

    def rows(self, styles: Sequence[str]) -> NDArray[np.bool_]:
        """Pictures of some styles, bool [N]."""
        codes = [self.table.environment_names.index(style) for style in styles if style in self.table.environment_names]
        return np.isin(self.table.environments, codes)

    def is_learnt(self, table: Table) -> NDArray[np.bool_]:
        """Rows of a table whose concept the encoder was trained on, bool [N]."""
        return np.asarray([name in self.learnt for name in table.concept_names])[table.concepts]


def embed_set(encoder: Encoder, pictures: Sequence[Picture], cache: Path, seed: int, progress: Progress) -> World:
    """Embeds the whole set; what is fitted on also under interventions, exactly as `calibrate` does it."""
    options = Options(interventions=PAPER, seed=seed)
    fit_on = [p for p in pictures if p.environment in TRAINING_STYLES and p.split in ("train", "calibrate")]
    train, _ = tabulate(encoder, fit_on, options, cache=cache, progress=progress)
    table, _ = tabulate(encoder, pictures, replace(options, interventions=()), cache=cache, progress=progress)
    banks = [bank_of(encoder, each.label_names, TEMPLATES) for each in (table, train)]
    learnt = frozenset(picture.concept for picture in fit_on if picture.split == "train")
    return World(table, banks[0], train, banks[1], learnt, seed)


def answers(world: World, projection: Projection, protocol: Protocol) -> NDArray[np.bool_]:
    """Which pictures of held-out styles are named right, in the order of `world.rows(HELD_OUT_STYLES)`."""
    queries, table = world.rows(HELD_OUT_STYLES), world.table
    images = projection.apply(table.vectors[queries])
    if protocol == "zero-shot":
        return zero_shot(images, table.labels[queries], projection.apply(world.bank))
    support = world.rows(TRAINING_STYLES)
    shown = projection.apply(table.vectors[support])
    return prototypes(shown, table.labels[support], images, table.labels[queries])


def score(world: World, projections: Mapping[str, Projection], mask: NDArray[np.bool_] | None = None) -> dict[str, Any]:
    """Accuracy per held-out style and their mean, and the paired difference to `none`, for every projection.

    Args:
        world: The set.
        projections: By name; `none` must be among them.
        mask: Which of the held-out pictures count, in the order of `answers`; all by default.

    Returns:
        JSON-ready: protocol → name → {style or `mean`: {value, low, high}, `difference`: {…}}.
    """
    queries = world.rows(HELD_OUT_STYLES)
    kept = np.ones(int(queries.sum()), dtype=np.bool_) if mask is None else mask
    concepts, styles = world.table.concepts[queries][kept], world.table.environments[queries][kept]
    bootstrap = Bootstrap(concepts, styles, seed=world.seed)
    columns = [*(world.table.environment_names[code] for code in bootstrap.codes), "mean"]
    found: dict[str, Any] = {}
    for protocol in PROTOCOLS:
        right = {name: answers(world, projection, protocol)[kept] for name, projection in projections.items()}
        found[protocol] = {
            name: dict(zip(columns, _plain(bootstrap.intervals(correct)), strict=True))
            | {"difference": bootstrap.intervals(correct, right["none"])[-1].to_json()}
            for name, correct in right.items()
        }
    return found


def evaluate(world: World, progress: Progress = silent, tell: Any = note) -> dict[str, Any]:
    """Everything in the table.

    Returns:
        JSON-ready: `chosen` (row → what selection chose and by what), `selections` (the whole curves), `held_out`,
        `learnt`, `never_seen` (scores), `variants`.
    """
    train = world.train
    width = train.vectors.shape[1]
    projections, chosen, curves = {"none": identity(width)}, {"none": "identity"}, {}
    for objective in OBJECTIVES:
        tell(f"selecting for {objective}")
        captions = (False,) if objective == "prototypes" else (False, True)
        selection = _select(world, train, objective, ALL_SOURCES, grid(width, captions=captions), progress)
        curves[objective] = selection.to_json()
        picks = {f"auto, for {objective}": selection.chosen}
        if objective == "both":
            picks = {name: best_of(selection, name) for name in ESTIMATORS} | picks
            icm = picks["icm"]
            moments = _moments(world, train, ALL_SOURCES, icm.captions)
            projections["published order"] = published(moments, icm.rank or width, icm.strength or 1.0)
            chosen["published order"] = str(icm)
        for name, pick in picks.items():
            moments = _moments(world, train, ALL_SOURCES, pick.captions)
            projections[name] = fit(moments, pick.estimator, pick.rank, pick.strength)
            chosen[name] = str(pick)
    learnt = world.is_learnt(world.table)[world.rows(HELD_OUT_STYLES)]
    main = {name: projections[name] for name in ("none", *(f"auto, for {objective}" for objective in OBJECTIVES))}
    return {
        "chosen": chosen,
        "held_out": score(world, projections),
        "learnt": score(world, main, learnt),
        "never_seen": score(world, main, ~learnt),
        "variants": variants(world, progress, tell),
        "selections": curves,
    }


def best_of(selection: Selection, estimator: str) -> Candidate:
    """One estimator's best candidate on what was left out, also where no projection is better."""
    own = [scored for scored in selection.curve if scored.candidate.estimator == estimator]
    return max(own, key=lambda scored: scored.behind).candidate


def variants(world: World, progress: Progress, tell: Any) -> list[dict[str, Any]]:
    """Shrinkage, λ selected each time, fitted on other concepts and from other sources of pairs."""
    rows = []
    learnt = world.is_learnt(world.train)
    groups = {"learnt": learnt, "never seen": ~learnt, "all": np.ones_like(learnt)}
    for group, mask in groups.items():
        for name, (sources, captions) in VARIANTS.items():
            if group != "all" and name not in ("natural", "natural + interventions", "all three"):
                continue
            tell(f"fitting on {name} pairs of {group} concepts")
            train = world.train.where(mask)
            candidates = grid(train.vectors.shape[1], estimator="shrinkage", captions=(captions,))
            selection = _select(world, train, "both", sources, candidates, progress)
            pick = selection.chosen
            moments = _moments(world, train, sources, pick.captions)
            projection = fit(moments, pick.estimator, pick.rank, pick.strength)
            scores = score(world, {"none": identity(projection.embed_dim), "fitted": projection})
            rows.append(
                {
                    "concepts": group,
                    "pairs": name,
                    "chosen": str(pick),
                }
                | {protocol: scores[protocol]["fitted"] for protocol in PROTOCOLS}
            )
    return rows


def _select(
    world: World,
    train: Table,
    objective: Objective,
    sources: Sources,
    candidates: list[Candidate],
    progress: Progress,
) -> Selection:
    return select(
        train,
        candidates,
        objective=objective,
        bank=world.train_bank,
        sources=sources,
        seed=world.seed,
        progress=progress,
    )


def _moments(world: World, train: Table, sources: Sources, captions: bool) -> Moments:
    return fitted_moments(train, sources, captions=world.train_bank if captions else None, seed=world.seed)


def _plain(intervals: list[Interval]) -> list[dict[str, float]]:
    return [interval.to_json() for interval in intervals]


@click.command("evaluate")
@click.option("--data", type=click.Path(path_type=Path), default=DATA, show_default=True, help="The built picture set.")
@click.option("--model", default="reference", show_default=True, help="As in `invariclip calibrate`.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="File with the model's weights.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default=PAGE, show_default=True, help="The page; .json too."
)
def evaluate_command(data: Path, model: str, checkpoint: Path | None, seed: int, out: Path) -> None:
    """Scores every estimator on the held-out styles and writes the committed table (ten to thirty minutes)."""
    from invariclip.bench.stylebench.evaluate_page import plot, render
    from invariclip.export.models.checkpoint import load_checkpoint

    manifest = data / "manifest.jsonl"
    pictures = read_pictures(manifest)
    encoder = load_checkpoint(model, checkpoint)
    world = embed_set(encoder, pictures, data / "embeddings", seed, bar)
    result = {
        "model": encoder.name,
        "checkpoint_sha256": encoder.sha256,
        "manifest_sha256": sha256_file(manifest),
        "pictures": {style: int(world.rows([style]).sum()) for style in (*TRAINING_STYLES, *HELD_OUT_STYLES)},
        "concepts": len(world.table.concept_names),
        "learnt_concepts": len(world.learnt),
        "seed": seed,
        **evaluate(world, bar),
    }
    write_atomically(out.with_suffix(".json"), json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_atomically(out, render(result))
    write_atomically(out.with_suffix(".svg"), plot(result))
    note(f"wrote {out}, its .json and its .svg")
