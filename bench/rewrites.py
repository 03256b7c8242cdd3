"""What each exact rewrite of the graphs gains: `python -m invariclip.bench.rewrites` writes docs/rewrites.md.

A rewrite's gain is the time of the graph *without* it over the time of the graph with all, in one run, one process per
graph, taking turns: what one would lose by leaving it out. The plain export, which torch gives without any rewrite, is
one more candidate.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from invariclip.backends.threads import available_threads
from invariclip.bench.latency import Candidate, Timing, measure
from invariclip.console import bar, note
from invariclip.export.graphs.rewrites import NAMES, REWRITES
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.export.graphs.trace import write_graph
from invariclip.export.models.checkpoint import load_checkpoint
from invariclip.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator

    from invariclip.export.graphs.rewrites import Tower
    from invariclip.export.models.checkpoint import Checkpoint

ALL, PLAIN = "all rewrites", "plain export"
TEXT_IDS = 12
"""A ten-token prompt with its start and its end."""
_SEED = 0


def variants(tower: Tower) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name and rewrites of each graph: all, none, and all but one in turn (and but those that need it)."""
    yield ALL, NAMES
    yield PLAIN, ()
    for rewrite in REWRITES:
        if tower in rewrite.towers:
            yield f"without {rewrite.name}", tuple(name for name in NAMES if name != rewrite.name)


def write_graphs(checkpoint: Checkpoint, tower: Tower, folder: Path) -> dict[str, tuple[Path, int, bool]]:
    """Writes each variant's graph; answers its file, its nodes and whether it takes short texts.

    A variant whose plan equals the full one's is left out: the rewrite does not apply to this tower.
    """
    written: dict[str, tuple[Path, int, bool]] = {}
    full: set[str] = set()
    pairs = list(variants(tower))
    for name, rewrites in bar(pairs, total=len(pairs), desc=f"graphs of the {tower} tower"):
        graph = tower_graph(checkpoint, tower, rewrites=rewrites)
        applied = {step.name for step in graph.plan if step.applied}
        full = full or applied
        if name not in (ALL, PLAIN) and applied == full:
            continue
        path = folder / f"{tower}-{len(written)}.onnx"
        write_graph(graph.model, path)
        written[name] = path, len(graph.model.graph), graph.applied("text-cut")
    return written


@click.command()
@click.option("--model", default="ViT-B-32", show_default=True)
@click.option("--backend", "backends", multiple=True, default=("onnxruntime", "openvino"), show_default=True)
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=3))
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("docs/rewrites.md"), show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
def rewrites(model: str, backends: tuple[str, ...], rounds: int, out: Path, threads: int | None) -> int:
    """Time each tower with all rewrites, with none, and with all but one."""
    began = time.monotonic()
    checkpoint = load_checkpoint(model, threads=threads, allow_random=True, seed=_SEED)
    towers: dict[Tower, tuple[int, ...]] = {"image": (1, 8), "text": (1, 32)}
    rows: dict[tuple[str, str], list[Timing]] = {}
    nodes: dict[str, dict[str, int]] = {}
    with TemporaryDirectory() as folder:
        for tower, batches in towers.items():
            graphs = write_graphs(checkpoint, tower, Path(folder))
            nodes[tower] = {name: count for name, (_, count, _) in graphs.items()}
            for backend in backends:
                candidates = [
                    Candidate(name, "graph", str(path), backend=backend, ids=_ids(tower, cut, checkpoint))
                    for name, (path, _, cut) in graphs.items()
                ]
                rows[tower, backend] = measure(
                    candidates, batches=batches, rounds=rounds, threads=threads, seed=_SEED, progress=bar
                )
    write_atomically(out, page(model, rows, nodes, rounds, threads))
    plain = [
        {"tower": tower, "backend": engine, **row.to_json()} for (tower, engine), group in rows.items() for row in group
    ]
    write_atomically(out.with_suffix(".json"), json.dumps({"model": model, "timings": plain, "nodes": nodes}, indent=1))
    note(f"{out}: {time.monotonic() - began:.0f} s")
    return 0


def _ids(tower: Tower, cut: bool, checkpoint: Checkpoint) -> int | None:
    if tower == "image":
        return None
    return TEXT_IDS if cut else checkpoint.tokenizer.spec.context_length


def page(
    model: str,
    rows: dict[tuple[str, str], list[Timing]],
    nodes: dict[str, dict[str, int]],
    rounds: int,
    threads: int | None,
) -> str:
    """The tables as Markdown. The yardstick is the full graph, so `1 / ratio` is how much longer another one takes."""
    engines = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "openvino"))
    lines = [
        "# What each exact rewrite gains",
        "",
        f"Made by `python -m invariclip.bench.rewrites`. {model}, seeded random weights, float32, "
        f"{threads or available_threads()} threads; one process per graph, taking turns, {rounds} rounds. {engines}.",
        f"Texts are prompts of {TEXT_IDS - 2} tokens: {TEXT_IDS} ids where the graph takes short texts, else padded to "
        "the context.",
        "",
        "*Time* is the median of a batch. *× all* is how many times as long as the graph with all rewrites it takes, "
        "paired round by round, with the 95 % interval over rounds: what leaving the rewrite out costs.",
        "",
    ]
    for (tower, backend), timings in rows.items():
        batches = sorted({row.batch for row in timings})
        head = "".join(f" batch {batch}, ms | × all |" for batch in batches)
        lines += [
            f"## {tower} tower, {backend}",
            "",
            f"| graph | nodes |{head}",
            "|---|---|" + "---|---|" * len(batches),
        ]
        for name, count in nodes[tower].items():
            cells = ""
            for batch in batches:
                row = next(row for row in timings if row.name == name and row.batch == batch)
                cells += f" {row.median_ms:.1f} | "
                cells += (
                    "1 |"
                    if name == ALL
                    else f"{1 / row.ratio:.2f} [{1 / row.ratio_high:.2f}, {1 / row.ratio_low:.2f}] |"
                )
            lines.append(f"| {name} | {count} |{cells}")
        lines.append("")
    lines += ["What they are:", "", *(f"- `{one.name}` ({', '.join(one.towers)}): {one.saves}." for one in REWRITES)]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(rewrites(standalone_mode=False))
