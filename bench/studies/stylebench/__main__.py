"""`python -m invariclip.bench.studies.stylebench`: build the image set, cut the bundled subset, make the table.

The table has every estimator and baseline on styles that nothing was fitted on, also where it does not help. They are
fitted and selected on training styles alone; concepts of split `test` are left out there as well. Scored on the four
held-out styles over all concepts, on the left-out concepts in the training styles, and, if it is there, on PACS.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from invariclip.bench.studies.pages import write_result
from invariclip.bench.studies.stylebench.sources import HELD_OUT_STYLES, STYLES, TRAINING_STYLES, licence_of
from invariclip.calibrate.data.domainbed import find_layout, read_layout
from invariclip.calibrate.data.images import read_images
from invariclip.cli.main import run_command
from invariclip.console import bar, emit_json, note, say, table
from invariclip.files import sha256_file

if TYPE_CHECKING:
    from invariclip.bench.studies.encoders import Precision
    from invariclip.bench.studies.stylebench.trial import StyleWorld


DATA = Path("build/stylebench")
REFERENCE = Path("export/reference")
PAGE = Path("docs/stylebench.md")
TRANSFER = Path("docs/transfer.md")


@click.group()
def main() -> None:
    """The multi-style image set and the table of estimators on it."""


@main.command("build")
@click.option("--out", type=click.Path(path_type=Path), default=DATA, show_default=True, help="Folder of the set.")
@click.option("--packages", type=click.Path(path_type=Path), help="Where packages are kept. [default: OUT/packages]")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable result.")
def build_command(out: Path, packages: Path | None, as_json: bool) -> None:
    """Fetches the packages and draws every concept in every style (two minutes)."""
    from invariclip.bench.studies.stylebench.images import MANIFEST, build, digest_of

    images = build(out, packages, bar)
    counts = Counter(image.style for image in images)
    if as_json:
        concepts = len({image.concept for image in images})
        emit_json({"manifest": str(out / MANIFEST), "sha256": digest_of(images), "concepts": concepts, **counts})
        return
    rows = [
        [style, str(counts[style]), "held out" if STYLES[style].held_out else "training", licence_of(style)]
        for style in counts
    ]
    say(table(["style", "concepts", "use", "licence"], rows))
    note(f"wrote {out / MANIFEST}")


@main.command("subset")
@click.option("--data", type=click.Path(path_type=Path), default=DATA, show_default=True, help="The built set.")
@click.option("--out", type=click.Path(path_type=Path), default=REFERENCE, show_default=True, help="Where to write.")
def subset_command(data: Path, out: Path) -> None:
    """Writes the committed subset of the built set."""
    from invariclip.bench.studies.stylebench.images import write_subset

    images = write_subset(data, out, bar)
    size = sum((out / image.file).stat().st_size for image in images)
    note(f"wrote {len(images)} images, {size / 1e6:.2f} MB, to {out}")


@main.command("vit")
@click.option("--data", type=click.Path(path_type=Path), default=DATA, show_default=True, help="The built set.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write. [default: the recipe's folder]")
def vit_command(data: Path, out: Path | None) -> None:
    """Learns the head of `reference-vit`: a trained ViT beside the sentence encoder, one ridge regression."""
    from invariclip.bench.studies.stylebench.vit import learn

    record = learn(data, out, bar)
    say(table(["measured", ""], [[name, str(value)] for name, value in record["validation"].items()]))


@main.command("evaluate")
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
    from invariclip.bench.studies.encoders import TrunkEncoder
    from invariclip.bench.studies.stylebench.images import read_manifest
    from invariclip.bench.studies.stylebench.report import elsewhere_scores, plot, render, render_transfer, summarise
    from invariclip.bench.studies.stylebench.trial import (
        KINDS,
        SEVEN,
        WAYS,
        embed_elsewhere,
        embed_world,
        pairs,
        rows,
        run_trial,
    )
    from invariclip.bench.studies.trials import bound_blas
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
    write_result(out, result, render(result), plot(result))
    if elsewhere is not None:
        names, codes = elsewhere.table.environment_names, elsewhere.table.environments
        moved = {
            **given,
            "elsewhere": {name: int((codes == code).sum()) for code, name in enumerate(names)},
            "classes": list(elsewhere.table.label_names),
            "rows": elsewhere_scores(first, trials["zero-shot"]),
        }
        write_result(transfer_out, moved, render_transfer(moved))


if __name__ == "__main__":
    run_command(main)
