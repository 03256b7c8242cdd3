"""The committed table: every estimator and baseline on styles that nothing was fitted on, also where it does not help.

Fitted and selected on training styles alone; concepts of split `test` are left out there as well. Scored on the four
held-out styles over all concepts, on the left-out concepts in the training styles, and, if it is there, on PACS.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from invariclip.bench.studies.stylebench.sources import HELD_OUT_STYLES, TRAINING_STYLES
from invariclip.calibrate.data.domainbed import find_layout, read_layout
from invariclip.calibrate.data.images import read_images
from invariclip.console import bar, note
from invariclip.files import sha256_file, write_atomically

if TYPE_CHECKING:
    from invariclip.bench.studies.stylebench.encoders import Precision
    from invariclip.bench.studies.stylebench.world import StyleWorld

DATA = Path("build/stylebench")
PAGE = Path("docs/stylebench.md")
TRANSFER = Path("docs/transfer.md")


@click.command("evaluate")
@click.option("--data", type=click.Path(path_type=Path), default=DATA, show_default=True, help="The built image set.")
@click.option("--model", default="reference", show_default=True,
              help="As `calibrate --model`; its image tower has to be a trunk with a linear head.")  # fmt: skip
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="How many, counted from 0.")
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True,
              help="Of the trunk; bfloat16 is several times as fast where the processor multiplies in it.")  # fmt: skip
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/table"), show_default=True,
              help="Keeps trials and selections: an interrupted run goes on from there.")  # fmt: skip
@click.option("--features", type=click.Path(path_type=Path), default=Path("build/features"), show_default=True,
              help="Keeps the trunk's features, whatever the checkpoint's head and texts.")  # fmt: skip
@click.option("--pairs/--no-pairs", "with_pairs", default=False, show_default=True,
              help="Ask also which pairs are best, under the first seed.")  # fmt: skip
@click.option("--pacs", type=click.Path(path_type=Path),
              help="PACS, or the folder that holds it: writes the page of the transfer as well.")  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), default=PAGE, show_default=True,
              help="The page; .json and .svg too.")  # fmt: skip
@click.option("--transfer-out", type=click.Path(path_type=Path), default=TRANSFER, show_default=True,
              help="The page of the transfer; .json too.")  # fmt: skip
def evaluate_command(
    data: Path,
    model: str,
    seeds: int,
    precision: str,
    work: Path,
    features: Path,
    with_pairs: bool,
    pacs: Path | None,
    out: Path,
    transfer_out: Path,
) -> None:
    """Scores every estimator and baseline on the held-out styles and writes the committed table."""
    from invariclip.bench.studies.blas import bound_blas
    from invariclip.bench.studies.stylebench.encoders import TrunkEncoder
    from invariclip.bench.studies.stylebench.evaluate_page import plot, render
    from invariclip.bench.studies.stylebench.manifest import read_manifest
    from invariclip.bench.studies.stylebench.summary import elsewhere_scores, summarise
    from invariclip.bench.studies.stylebench.transfer_page import render_transfer
    from invariclip.bench.studies.stylebench.trial import KINDS, SEVEN, pairs, rows, run_trial
    from invariclip.bench.studies.stylebench.world import WAYS, embed_elsewhere, embed_world
    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    bound_blas()
    manifest = data / "manifest.jsonl"
    images = read_images(manifest)
    groups = {image.concept: image.group for image in read_manifest(manifest)}
    checkpoint = load_checkpoint(model)
    trunk = TrunkEncoder(checkpoint, cast("Precision", precision))
    known = {"trunk": trunk.sha256, "checkpoint": checkpoint.sha256, "manifest": sha256_file(manifest)}
    elsewhere = None
    if pacs is not None:
        others = read_layout(find_layout("PACS"), pacs)
        elsewhere = embed_elsewhere(checkpoint, trunk, others, features, bar)
        known["elsewhere"] = hashlib.sha256(elsewhere.table.vectors.tobytes()).hexdigest()

    @lru_cache(maxsize=1)
    def world(seed: int, *lists: str) -> StyleWorld:
        kinds = {name: KINDS[name] for name in lists}
        return embed_world(checkpoint, trunk, images, groups, kinds, features, seed, elsewhere=elsewhere, progress=bar)

    trials: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        for way in WAYS:
            note(f"seed {seed}: {way}")
            make = partial(world, seed, SEVEN)
            trials[way].append(run_trial(rows, make, {**known, "seed": seed}, way, work / "trials", bar))
    by_pairs: dict[str, Any] = dict.fromkeys(WAYS)
    for way in WAYS if with_pairs else ():
        note(f"which pairs: {way}")
        by_pairs[way] = run_trial(pairs, partial(world, 0, *KINDS), {**known, "seed": 0}, way, work / "trials", bar)
    first = world(0, SEVEN)
    tables = {
        way: summarise(first, trials[way], by_pairs[way]) | {"curve": trials[way][0]["selection"]} for way in WAYS
    }
    given = {
        "model": checkpoint.name,
        "checkpoint_sha256": checkpoint.sha256,
        "width": checkpoint.embed_dim,
        "manifest_sha256": known["manifest"],
        "precision": precision,
        "seeds": seeds,
        "images": {style: int(first.rows([style]).sum()) for style in (*TRAINING_STYLES, *HELD_OUT_STYLES)},
        "concepts": len(first.table.concept_names),
        "learnt_concepts": len(first.learnt),
        "home_concepts": len({int(code) for code in first.table.concepts[first.home]}),
    }
    result = {**given, "tables": tables}
    write_atomically(out.with_suffix(".json"), json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_atomically(out, render(result))
    write_atomically(out.with_suffix(".svg"), plot(result))
    note(f"wrote {out}, its .json and its .svg")
    if elsewhere is not None:
        names, codes = elsewhere.table.environment_names, elsewhere.table.environments
        moved = {
            **given,
            "elsewhere": {name: int((codes == code).sum()) for code, name in enumerate(names)},
            "classes": list(elsewhere.table.label_names),
            "rows": elsewhere_scores(first, trials["zero-shot"]),
        }
        write_atomically(transfer_out.with_suffix(".json"), json.dumps(moved, indent=1, ensure_ascii=False) + "\n")
        write_atomically(transfer_out, render_transfer(moved))
        note(f"wrote {transfer_out} and its .json")
