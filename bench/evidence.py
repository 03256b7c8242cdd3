"""What learned templates cost when they answer: `python -m invariclip.bench.evidence` writes docs/evidence.md.

The same image tower with four ends: none, a softmax over one template, and evidence of M = 1 and M = 8 learned
templates beside the hand-written one, each with an uncertainty. One process per graph, taking turns.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click
import numpy as np

from invariclip.backends.threads import available_threads
from invariclip.bench.latency import Candidate, Timing, measure
from invariclip.console import bar, note
from invariclip.export.graphs.head import attach_head
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.export.graphs.trace import write_graph
from invariclip.export.models.checkpoint import load_checkpoint
from invariclip.files import write_atomically
from invariclip.manifest import SemanticsFacts

if TYPE_CHECKING:
    from collections.abc import Sequence

BARE, SOFTMAX, ONE, EIGHT = "no classes", "one template, softmax", "evidence, M = 1", "evidence, M = 8"
LEARNED = {ONE: 1, EIGHT: 8}
BATCHES = (1, 32)
GOAL = 0.01
"""Of M = 8 over M = 1."""
_SEED = 0


@dataclass(frozen=True)
class Group:
    """One engine's times; `setting` is versions, threads and rounds in words."""

    backend: str
    setting: str
    timings: list[Timing]


def write_graphs(model: str, classes: int, folder: Path, threads: int | None) -> dict[str, Path]:
    """Writes the tower with each end; weights and class embeddings are drawn from a seed.

    Args:
        model: An open_clip architecture.
        classes: K.
        folder: Where they go.
        threads: Torch's.
    """
    checkpoint = load_checkpoint(model, threads=threads, allow_random=True, seed=_SEED)
    graph = tower_graph(checkpoint, "image").model
    rng = np.random.default_rng(_SEED)
    bank = rng.normal(size=(max(LEARNED.values()) + 1, classes, checkpoint.embed_dim))
    bank /= np.linalg.norm(bank, axis=-1, keepdims=True)
    written = {}
    for place, name in enumerate((BARE, SOFTMAX, ONE, EIGHT)):
        scale = checkpoint.logit_scale
        if name in LEARNED:
            count = LEARNED[name] + 1
            attach_head(
                graph, bank[:count], scale, None, SemanticsFacts("", count - 1, 1, (0.3,) * count, (-2.0,) * count)
            )
        else:
            attach_head(graph, None if name == BARE else bank[0], scale, None)
        written[name] = folder / f"{place}.onnx"
        write_graph(graph, written[name])
    return written


@click.command()
@click.option("--model", default="ViT-B-32", show_default=True)
@click.option("--classes", default=1000, show_default=True, type=click.IntRange(min=1))
@click.option("--backend", "backends", multiple=True, default=("onnxruntime", "openvino"), show_default=True)
@click.option("--rounds", default=31, show_default=True, type=click.IntRange(min=3))
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("docs/evidence.md"), show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
def evidence(model: str, classes: int, backends: tuple[str, ...], rounds: int, out: Path, threads: int | None) -> int:
    """Time an image tower with evidence of one and of eight learned templates, in turns."""
    began = time.monotonic()
    groups = []
    with TemporaryDirectory() as folder:
        graphs = write_graphs(model, classes, Path(folder), threads)
        for backend in backends:
            order = (ONE, EIGHT, SOFTMAX, BARE)  # the first is the yardstick
            candidates = [Candidate(name, "whole", str(graphs[name]), backend=backend) for name in order]
            timings = measure(candidates, batches=BATCHES, rounds=rounds, threads=threads, seed=_SEED, progress=bar)
            said = f"{threads or available_threads()} threads, {rounds} rounds, {backend} {version(backend)}"
            groups.append(Group(backend, said, timings))
    plain = {"model": model, "classes": classes, "groups": [asdict(group) for group in groups]}
    write_atomically(out.with_suffix(".json"), json.dumps(plain, indent=1))
    write_atomically(out, page(model, classes, groups))
    note(f"{out}: {time.monotonic() - began:.0f} s")
    return 0


def page(model: str, classes: int, groups: Sequence[Group]) -> str:
    """The table as Markdown; more than M = 1 is `1 / ratio` less one."""
    lines = [
        "# What an answer of several templates costs",
        "",
        f"Made by `python -m invariclip.bench.evidence`: {model}'s image tower, seeded random weights, float32, "
        f"{classes:,} classes,",
        "one process per graph, taking turns. *over M = 1* is how much longer it takes than evidence of one learned "
        "template beside the hand-written one, paired round by round, with the 95 % interval over rounds.",
        "",
    ]
    for group in groups:
        batches = sorted({row.batch for row in group.timings})
        head = "".join(f" batch {batch}, ms | over M = 1 |" for batch in batches)
        lines += [
            f"## {group.backend}",
            "",
            f"{group.setting}.",
            "",
            f"| head |{head}",
            "|---|" + "---|---|" * len(batches),
        ]
        for name in (BARE, SOFTMAX, ONE, EIGHT):
            rows = [next(row for row in group.timings if (row.name, row.batch) == (name, batch)) for batch in batches]
            lines.append(f"| {name} |" + "".join(map(_cells, rows)))
        lines += ["", *map(_verdict, (row for row in group.timings if row.name == EIGHT)), ""]
    return "\n".join(lines)


def _verdict(row: Timing) -> str:
    """Whether the goal is kept, missed, or lost in the machine's noise."""
    least, most = 1 / row.ratio_high - 1, 1 / row.ratio_low - 1
    said = "kept" if most <= GOAL else "missed" if least > GOAL else "not told: the interval holds both"
    return f"- M = 8 at most {GOAL:.0%} over M = 1, batch {row.batch}: {said}."


def _cells(row: Timing) -> str:
    if row.name == ONE:
        return f" {row.median_ms:.2f} | – |"
    more = [1 / value - 1 for value in (row.ratio, row.ratio_high, row.ratio_low)]
    return f" {row.median_ms:.2f} | {more[0]:+.2%} [{more[1]:+.2%}, {more[2]:+.2%}] |"


if __name__ == "__main__":
    sys.exit(evidence(standalone_mode=False))
