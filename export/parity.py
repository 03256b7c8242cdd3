"""`python -m invariclip.export.parity`: the committed parity table, made by one command.

Every model is exported three times, without a projection, with a random one of full rank and with a random one of rank
64, and all three are held against the PyTorch checkpoint on the bundled pictures. Random projections say nothing about
accuracy; they are the hard case for exactness, because no part of the embedding is left as it was.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click
import numpy as np
import torch

from invariclip.console import bar, note
from invariclip.export import evidence
from invariclip.export.assemble import IMAGE_FILE, TEXT_FILE, producer, write_files
from invariclip.export.checkpoint import REFERENCE, load_checkpoint
from invariclip.export.figures import FLOAT32
from invariclip.export.trace import node_count
from invariclip.export.verify import Candidate, check, prepare
from invariclip.files import write_atomically
from invariclip.projection import Projection
from invariclip.prompts import DEFAULT_TEMPLATES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from invariclip.export.checkpoint import Checkpoint

MODELS = (REFERENCE, "ViT-B-32", "RN50")
SEED = 0
_HEADER = (
    "| model | projection | tower | fold | nodes | without projection | inputs | max abs Δ | min cosine | "
    "top-1 equal | alone or in a batch |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def projections_of(embed_dim: int) -> dict[str, Projection | None]:
    """None, and seeded random matrices of full rank and of rank 64 (or of half the width, where that is smaller)."""
    rng = np.random.default_rng(SEED)
    rank = min(64, embed_dim // 2)
    return {
        "none": None,
        f"random, full rank {embed_dim}": Projection(rng.normal(size=(embed_dim, embed_dim)), "random"),
        f"random, rank {rank}": Projection(rng.normal(size=(embed_dim, rank)), "random"),
    }


def stirred(checkpoint: Checkpoint) -> Checkpoint:
    """Random weights whose batch norms do something.

    open_clip starts the last batch norm of every residual block at zero. The block then adds nothing, and an export
    that got it wrong would show no difference. Real weights are left alone.
    """
    norms = [part for part in checkpoint.module.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    if not norms or not checkpoint.source.startswith("random"):
        return checkpoint
    generator = torch.Generator().manual_seed(SEED)
    for norm in norms:
        norm.weight.uniform_(0.3, 0.7, generator=generator)
        norm.bias.normal_(0, 0.1, generator=generator)
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.normal_(0, 0.1, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
    return replace(checkpoint, source=f"{checkpoint.source}, batch norms stirred")


def rows_of(checkpoint: Checkpoint, images: Sequence[Path], threads: int | None) -> tuple[list[str], list[str]]:
    """Table rows of one model, and every bound that it breaks, in words."""
    nodes: dict[str, tuple[int, int]] = {}
    with TemporaryDirectory() as name:
        candidates: dict[str, Candidate] = {}
        folds: dict[str, dict[str, str]] = {}
        for label, projection in projections_of(checkpoint.embed_dim).items():
            folder = Path(name) / str(len(candidates))
            folder.mkdir()
            job = prepare(checkpoint, projection, (), DEFAULT_TEMPLATES)
            facts = write_files(job, folder, bar).projection
            folds[label] = (
                {"image": facts.image_fold, "text": facts.text_fold} if facts else {"image": "–", "text": "–"}
            )
            nodes[label] = node_count(folder / IMAGE_FILE), node_count(folder / TEXT_FILE)
            candidates[label] = Candidate.open(folder / IMAGE_FILE, folder / TEXT_FILE, job, threads=threads)
        pictures = evidence.pictures_of(images or None, checkpoint.pixels)
        verdicts = check(candidates, pictures, FLOAT32, progress=bar)
    rows: list[str] = []
    broken: list[str] = []
    weights = "" if checkpoint.name == REFERENCE else f" ({checkpoint.source})"
    for label, verdict in verdicts.items():
        broken += [f"{checkpoint.name}, {label}: {line}" for line in verdict.broken]
        for place, (tower, figures) in enumerate((("image", verdict.image), ("text", verdict.text))):
            ties = f" ({figures.top1_ties} ties)" if figures.top1_ties else ""
            rows.append(
                f"| {checkpoint.name}{weights} | {label} | {tower} | {folds[label][tower]} | {nodes[label][place]} | "
                f"{nodes['none'][place]} | {figures.items} | {figures.max_abs_diff:.1e} | {figures.cosine_min:.9f} | "
                f"{figures.top1_agreement:.1%} of {figures.items}{ties} | {figures.batch_diff:.1e} |"
            )
            if nodes[label][place] > nodes["none"][place]:
                broken.append(f"{checkpoint.name}, {label}: {tower} has more nodes than without a projection")
    return rows, broken


@click.command()
@click.option("--model", "models", multiple=True, help=f"Repeatable [default: {', '.join(MODELS)}].")
@click.option("--images", multiple=True, type=click.Path(path_type=Path), help="[default: the bundled pictures]")
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("docs/parity.md"), show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
def parity(models: tuple[str, ...], images: tuple[Path, ...], out: Path, threads: int | None) -> int:
    """Write the parity table; exit code 1 if a bound is broken."""
    began = time.monotonic()
    rows: list[str] = []
    broken: list[str] = []
    versions: dict[str, str] = {}
    for model in models or MODELS:
        checkpoint = stirred(load_checkpoint(model, threads=threads, allow_random=True, seed=SEED))
        more, failed = rows_of(checkpoint, images, threads)
        rows, broken, versions = rows + more, broken + failed, producer(checkpoint)
    versions.pop("weights", None)
    write_atomically(out, page(rows, broken, versions))
    note(f"{out}: {len(rows)} rows, {len(broken)} bounds broken, {time.monotonic() - began:.0f} s")
    return 1 if broken else 0


def page(rows: list[str], broken: list[str], versions: dict[str, str]) -> str:
    """The table as Markdown."""
    made_by = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        "# Parity: fused ONNX against PyTorch",
        "",
        "Made by `python -m invariclip.export.parity`. Reference: PyTorch float32 encoder, unfolded, then the "
        "projection and the L2 norm in float64.",
        "Candidate: ONNX Runtime on the CPU, projection folded in. Pictures are the bundled ones; texts are "
        "`export/evidence.py`'s.",
        f"Bounds: max abs Δ ≤ {FLOAT32.max_abs_diff:g}, cosine ≥ {FLOAT32.min_cosine:g}, top-1 equal on all. Pictures "
        "are matched with prompts, texts with pictures; best matches closer than 1e-6 in cosine are ties.",
        "",
        *_HEADER,
        *rows,
        "",
        f"Broken bounds: {'; '.join(broken) or 'none'}.",
        "",
        f"Versions: {made_by}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(parity(standalone_mode=False))
