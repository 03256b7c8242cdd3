"""`python -m invariclip.bench.studies.stylebench`: build the image set, cut the bundled subset, make the table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from invariclip.bench.studies.stylebench.evaluate import evaluate_command
from invariclip.bench.studies.stylebench.sources import STYLES, licence_of
from invariclip.cli.main import run_command
from invariclip.console import bar, emit_json, note, say, table

DATA = Path("build/stylebench")
REFERENCE = Path("export/reference")


@click.group()
def main() -> None:
    """The multi-style image set and the table of estimators on it."""


@main.command("build")
@click.option("--out", type=click.Path(path_type=Path), default=DATA, show_default=True, help="Folder of the set.")
@click.option("--packages", type=click.Path(path_type=Path), help="Where packages are kept. [default: OUT/packages]")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable result.")
def build_command(out: Path, packages: Path | None, as_json: bool) -> None:
    """Fetches the packages and draws every concept in every style (two minutes)."""
    from invariclip.bench.studies.stylebench.build import MANIFEST, build, digest_of

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
    from invariclip.bench.studies.stylebench.subset import write_subset

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


main.add_command(evaluate_command)


if __name__ == "__main__":
    run_command(main)
