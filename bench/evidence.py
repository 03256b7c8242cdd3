"""What learned templates cost when they answer: `python -m invariclip.bench.evidence` writes docs/evidence.md.

The same image tower with four ends: none, a softmax over one template, and evidence of M = 1 and M = 8 learned
templates beside the hand-written one, each with an uncertainty. Ends are timed in place, see `ends`, and whole graphs
beside that: one process per graph, taking turns.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import onnx_ir as ir

from invariclip.backends.threads import available_threads
from invariclip.bench.candidates import Candidate, Timing
from invariclip.bench.ends import EMBEDDING_INPUT, EndCost, measure_ends
from invariclip.bench.latency import measure
from invariclip.cli import run_command
from invariclip.console import bar, note
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.graphs.head import attach_head
from invariclip.export.graphs.opinions import BANK
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.export.graphs.trace import OPSET, write_graph
from invariclip.files import write_atomically
from invariclip.manifest import EMBEDDING, SemanticsFacts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

BARE, SOFTMAX, ONE, EIGHT = "no classes", "one template, softmax", "evidence, M = 1", "evidence, M = 8"
LEARNED = {ONE: 1, EIGHT: 8}
BATCHES = (1, 32)
GOAL = 0.01
"""Of M = 8 over M = 1."""
REPETITIONS = {1: 40, 32: 5}
"""Of every end in a process, by batch."""
_SEED = 0


@dataclass(frozen=True)
class Group:
    """One engine's times; `setting` is versions, threads and rounds in words."""

    backend: str
    setting: str
    ends: list[EndCost]
    timings: list[Timing]


@dataclass(frozen=True)
class Graphs:
    """Files by name: the tower with each end, and the ends alone."""

    whole: dict[str, Path]
    ends: dict[str, Path]


def write_graphs(model: str, classes: int, folder: Path, threads: int | None) -> Graphs:
    """Writes the tower with each end, and each end alone; weights and class embeddings are drawn from a seed.

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
    written = Graphs({}, {})
    for place, name in enumerate((BARE, ONE, EIGHT, SOFTMAX)):
        targets = [(graph, written.whole, "whole")]
        if name != BARE:
            targets.append((_end(checkpoint.embed_dim), written.ends, "end"))
        for target, files, kind in targets:
            if name in LEARNED:
                count = LEARNED[name] + 1
                facts = SemanticsFacts("", count - 1, 1, (1.0,) * count, (-2.0,) * count, (0.2,) * count)
                attach_head(target, bank[:count], checkpoint.logit_scale, None, facts)
            else:
                attach_head(target, bank[0] if name == SOFTMAX else None, checkpoint.logit_scale, None)
            files[name] = folder / f"{kind}{place}.onnx"
            write_graph(target, files[name])
    return written


def _end(width: int) -> ir.Model:
    """An embedding that is given."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    given = ir.Value(name=EMBEDDING_INPUT, type=kind, shape=ir.Shape(["batch", width]))
    node = ir.node("Identity", [given])
    (same,) = node.outputs
    same.name, same.shape, same.type = EMBEDDING, ir.Shape(["batch", width]), kind
    graph = ir.Graph([given], [same], nodes=[node], opset_imports={"": OPSET}, name="end")
    return ir.Model(graph, ir_version=10)


def _bank_bytes(end: Path) -> int:
    """What an end's class embeddings take, read anew with every batch."""
    values = ir.load(end).graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.name == BANK and value.const_value is not None)


@click.command()
@click.option("--model", default="ViT-B-32", show_default=True)
@click.option("--classes", default=1000, show_default=True, type=click.IntRange(min=1))
@click.option("--backend", "backends", multiple=True, default=("onnxruntime", "openvino"), show_default=True)
@click.option("--processes", default=9, show_default=True, type=click.IntRange(min=3), help="That time ends in place.")
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(min=3), help="Of whole graphs in turns.")
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("docs/evidence.md"), show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
def evidence(
    model: str, classes: int, backends: tuple[str, ...], processes: int, rounds: int, out: Path, threads: int | None
) -> int:
    """Time an image tower with evidence of one and of eight learned templates, in turns."""
    began = time.monotonic()
    groups = []
    with TemporaryDirectory() as folder:
        graphs = write_graphs(model, classes, Path(folder), threads)
        for backend in backends:
            order = (ONE, EIGHT, SOFTMAX, BARE)  # the first is the yardstick
            ends = measure_ends(
                graphs.whole[BARE], graphs.ends, backend, batches=BATCHES, processes=processes,
                repetitions=REPETITIONS, threads=threads, progress=bar,
            )  # fmt: skip
            candidates = [Candidate(name, "whole", str(graphs.whole[name]), backend=backend) for name in order]
            timings = measure(candidates, batches=BATCHES, rounds=rounds, threads=threads, seed=_SEED, progress=bar)
            said = f"{threads or available_threads()} threads, {backend} {version(backend)}"
            groups.append(Group(backend, said, ends, timings))
        banks = {name: _bank_bytes(graphs.ends[name]) for name in (ONE, EIGHT)}
    how = {"model": model, "classes": classes, "processes": processes, "rounds": rounds, "bank_bytes": banks}
    plain = {**how, "groups": [asdict(group) for group in groups]}
    write_atomically(out.with_suffix(".json"), json.dumps(plain, indent=1))
    write_atomically(out, page(plain))
    note(f"{out}: {time.monotonic() - began:.0f} s")
    return 0


def page(found: Mapping[str, Any]) -> str:
    """The tables as Markdown, of the JSON's figures alone."""
    lines = [
        "# What an answer of several templates costs",
        "",
        f"Made by `python -m invariclip.bench.evidence`: {found['model']}'s image tower, seeded random weights, "
        f"float32, {found['classes']:,} classes.",
        "",
        "*In place*: the tower runs, then the end alone on its embedding, on what the tower left in the caches; ends "
        f"take turns behind one and the same tower, in each of {found['processes']} processes. *Over M = 1* is tower "
        "and end, over tower and evidence of one learned template beside the hand-written one; median and 95 % "
        "interval over processes.",
        "",
        f"*Whole graphs*: one process per graph, {found['rounds']} rounds in turns; the interval is over rounds. Two "
        "processes differ by a few percent for where their weights lie in memory alone, which rounds do not average "
        "away: it is here to show that nothing larger hides.",
        "",
    ]
    for group in found["groups"]:
        lines += [f"## {group['backend']}", "", f"{group['setting']}.", ""]
        lines += _table("in place", "the end", (ONE, EIGHT, SOFTMAX), group["ends"], _in_place)
        lines += [*map(_verdict, (row for row in group["ends"] if row["name"] == EIGHT))]
        lines += [_traffic(group["ends"], found["bank_bytes"]), ""]
        lines += _table("whole graphs", "whole", (ONE, EIGHT, SOFTMAX, BARE), group["timings"], _whole)
    return "\n".join(lines)


def _table(
    title: str,
    what: str,
    names: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    cells: Callable[[Mapping[str, Any]], str],
) -> list[str]:
    batches = sorted({row["batch"] for row in rows})
    head = "".join(f" batch {batch}: {what}, ms | over M = 1 |" for batch in batches)
    lines = [f"| {title} |{head}", "|---|" + "---|---|" * len(batches)]
    for name in names:
        own = [next(row for row in rows if (row["name"], row["batch"]) == (name, batch)) for batch in batches]
        lines.append(f"| {name} |" + "".join(map(cells, own)))
    return [*lines, ""]


def _verdict(row: Mapping[str, Any]) -> str:
    """Whether the goal is kept, missed, or lost in the machine's noise."""
    least, most = row["over"]["low"] - 1, row["over"]["high"] - 1
    said = "kept" if most <= GOAL else "missed" if least > GOAL else "not told: the interval holds both"
    return f"- M = 8 at most {GOAL:.0%} over M = 1, batch {row['batch']}: {said}."


def _traffic(ends: Sequence[Mapping[str, Any]], bank_bytes: Mapping[str, int]) -> str:
    """What batch 1 pays for: the classes' embeddings come from memory once a call."""
    one, eight = (next(row for row in ends if (row["name"], row["batch"]) == (name, 1)) for name in (ONE, EIGHT))
    more, longer = bank_bytes[EIGHT] - bank_bytes[ONE], eight["end_ms"] - one["end_ms"]
    rate = f", {more / longer / 1e6:.0f} GB/s" if longer > 0 else ""
    return (
        f"- At batch 1 it is memory that M = 8 pays for: {more / 1e6:.1f} MB more of class embeddings are read, in "
        f"{longer:.2f} ms more{rate}. [banks.md](banks.md) has what was tried against that."
    )


def _in_place(row: Mapping[str, Any]) -> str:
    if row["name"] == ONE:
        return f" {row['end_ms']:.3f} of {row['tower_ms'] + row['end_ms']:.1f} | – |"
    more = [row["over"][end] - 1 for end in ("value", "low", "high")]
    return f" {row['end_ms']:.3f} | {more[0]:+.2%} [{more[1]:+.2%}, {more[2]:+.2%}] |"


def _whole(row: Mapping[str, Any]) -> str:
    """More than M = 1 is `1 / ratio` less one."""
    if row["name"] == ONE:
        return f" {row['median_ms']:.2f} | – |"
    more = [1 / row[end] - 1 for end in ("ratio", "ratio_high", "ratio_low")]
    return f" {row['median_ms']:.2f} | {more[0]:+.2%} [{more[1]:+.2%}, {more[2]:+.2%}] |"


if __name__ == "__main__":
    run_command(evidence)
