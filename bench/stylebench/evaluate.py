"""The committed table: every estimator and baseline on styles that nothing was fitted on, also where it does not help.

Fitted and selected on training styles alone; concepts of split `test` are left out there as well. Scored on the four
held-out styles over all concepts.
"""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from invariclip.bench.stylebench.sources import HELD_OUT_STYLES, TRAINING_STYLES
from invariclip.calibrate.pictures import read_pictures
from invariclip.console import bar, note
from invariclip.files import sha256_file, write_atomically

if TYPE_CHECKING:
    from invariclip.bench.stylebench.encoders import Precision
    from invariclip.bench.stylebench.world import Way, World

DATA = Path("build/stylebench")
PAGE = Path("docs/stylebench.md")
TABLES: tuple[tuple[str, Way], ...] = (
    ("resnet18", "prototypes"),
    ("reference", "zero-shot"),
    ("reference", "prototypes"),
)
"""Encoder and protocol: the trunk takes no texts."""


@click.command("evaluate")
@click.option("--data", type=click.Path(path_type=Path), default=DATA, show_default=True, help="The built picture set.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights that `train` wrote. [default: bundled]")
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="How many, counted from 0.")
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True,
              help="Of the trunk; bfloat16 is five times as fast where the processor multiplies in it.")  # fmt: skip
@click.option("--work", type=click.Path(path_type=Path), default=DATA / "table", show_default=True,
              help="Keeps embeddings and trials: an interrupted run goes on from there.")  # fmt: skip
@click.option("--pairs/--no-pairs", "with_pairs", default=True, show_default=True,
              help="Ask also which pairs are best, under the first seed.")  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), default=PAGE, show_default=True,
              help="The page; .json and .svg too.")  # fmt: skip
def evaluate_command(
    data: Path, checkpoint: Path | None, seeds: int, precision: str, work: Path, with_pairs: bool, out: Path
) -> None:
    """Scores every estimator and baseline on the held-out styles and writes the committed table."""
    from invariclip.bench.stylebench.encoders import Trunk
    from invariclip.bench.stylebench.evaluate_page import plot, render
    from invariclip.bench.stylebench.summary import summarise
    from invariclip.bench.stylebench.trial import KINDS, SEVEN, pairs, rows, run_trial
    from invariclip.bench.stylebench.world import embed_worlds
    from invariclip.export.models.checkpoint import load_checkpoint

    manifest = data / "manifest.jsonl"
    pictures = read_pictures(manifest)
    loaded = load_checkpoint("reference", checkpoint)
    trunk = Trunk(loaded, cast("Precision", precision))

    @cache
    def worlds(seed: int, *lists: str) -> dict[str, World]:
        kinds = {name: KINDS[name] for name in lists}
        return embed_worlds(loaded, trunk, pictures, kinds, work / "embeddings", seed, bar)

    known = {"trunk": trunk.sha256, "manifest": sha256_file(manifest)}
    trials: dict[tuple[str, Way], list[dict[str, Any]]] = {table: [] for table in TABLES}
    for seed in range(seeds):
        for encoder, way in TABLES:
            note(f"seed {seed}: {encoder}, {way}")
            key = {**known, "encoder": encoder, "seed": seed}
            make = partial(lambda seed, name: worlds(seed, SEVEN)[name], seed, encoder)
            trials[encoder, way].append(run_trial(rows, make, key, way, work / "trials", bar))
    tables = {}
    for encoder, way in TABLES:
        own, by_pairs = trials[encoder, way], None
        if with_pairs:
            note(f"which pairs: {encoder}, {way}")
            key = {**known, "encoder": encoder, "seed": 0}
            make = partial(lambda name: worlds(0, *KINDS)[name], encoder)
            by_pairs = run_trial(pairs, make, key, way, work / "trials", bar)
        found = summarise(worlds(0, SEVEN)[encoder], own, by_pairs)
        tables[f"{encoder}, {way}"] = found | {"curve": own[0]["selection"]}
    first = worlds(0, SEVEN)["reference"]
    result = {
        "checkpoint_sha256": loaded.sha256,
        "manifest_sha256": known["manifest"],
        "precision": precision,
        "seeds": seeds,
        "pictures": {style: int(first.rows([style]).sum()) for style in (*TRAINING_STYLES, *HELD_OUT_STYLES)},
        "concepts": len(first.table.concept_names),
        "learnt_concepts": len(first.learnt),
        "tables": tables,
    }
    write_atomically(out.with_suffix(".json"), json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_atomically(out, render(result))
    write_atomically(out.with_suffix(".svg"), plot(result))
    note(f"wrote {out}, its .json and its .svg")
