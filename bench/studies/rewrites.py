"""What each exact rewrite of the graphs gains: `python -m invariclip.bench.studies.rewrites` writes docs/rewrites.md.

A rewrite's gain is the time of the graph *without* it over the time of the graph with all, in one run, one process per
graph, taking turns: what one would lose by leaving it out. The plain export, which torch gives without any rewrite, is
one more candidate.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from invariclip.bench.latency.measure import Timing, measure
from invariclip.bench.latency.worker import LatencyCandidate
from invariclip.cli.main import run_command
from invariclip.console import bar, note
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.graphs.rewrites.plan import NAMES, REWRITES
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.export.graphs.writing import write_graph
from invariclip.files import scratch_directory, write_atomically
from invariclip.threads import available_threads

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from invariclip.export.checkpoints.checkpoint import Checkpoint
    from invariclip.export.graphs.rewrites import Tower

ALL, PLAIN = "all rewrites", "plain export"
TEXT_IDS = 12
"""A ten-token prompt with its start and its end."""
BATCHES: dict[str, tuple[int, ...]] = {"image": (1, 8), "text": (1, 32)}
CASES = ("ViT-B-32:image", "ViT-B-32:text", "MobileCLIP2-S0:image")
"""A transformer, which most rewrites are for, and a convolutional trunk with training branches for the rest."""
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


@dataclass(frozen=True)
class TowerTimings:
    """One tower of one model, timed in one engine.

    Attributes:
        model: The open_clip architecture.
        tower: `image` or `text`.
        backend: The engine.
        setting: Versions, threads and rounds, in words.
        nodes: Of each graph.
        timings: Of each graph and batch size.
    """

    model: str
    tower: Tower
    backend: str
    setting: str
    nodes: dict[str, int]
    timings: list[Timing]

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> TowerTimings:
        """Reads what `asdict` wrote."""
        return cls(**{**plain, "timings": [Timing(**row) for row in plain["timings"]]})


@click.command()
@click.option("--case", "cases", multiple=True, metavar="MODEL:TOWER", help=f"[default: {', '.join(CASES)}]")
@click.option("--backend", "backends", multiple=True, default=("onnxruntime", "openvino"), show_default=True)
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=3))
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("docs/rewrites.md"), show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
def rewrites(cases: tuple[str, ...], backends: tuple[str, ...], rounds: int, out: Path, threads: int | None) -> int:
    """Time towers with all rewrites, with none, and with all but one; cases that are not named stay as they were."""
    began = time.monotonic()
    data = out.with_suffix(".json")
    kept = {group_key(group): group for group in _stored(data)}
    for case in cases or CASES:
        model, _, tower = case.partition(":")
        if tower not in BATCHES:
            raise click.BadParameter(f"{case!r} is not MODEL:TOWER with one of the towers {', '.join(BATCHES)}")
        for group in time_tower(model, cast("Tower", tower), backends, rounds, threads):
            kept[group_key(group)] = group
    write_atomically(data, json.dumps([asdict(group) for group in kept.values()], indent=1))
    write_atomically(out, page(list(kept.values())))
    note(f"{out}: {time.monotonic() - began:.0f} s")
    return 0


def group_key(group: TowerTimings) -> tuple[str, str, str]:
    """What tells groups apart."""
    return group.model, group.tower, group.backend


def time_tower(
    model: str, tower: Tower, backends: Sequence[str], rounds: int, threads: int | None
) -> Iterator[TowerTimings]:
    """Times every graph of a tower, one engine after the other."""
    checkpoint = load_checkpoint(model, threads=threads, allow_random=True, seed=_SEED)
    engines = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "openvino"))
    setting = f"{threads or available_threads()} threads, {rounds} rounds, {engines}"
    with scratch_directory() as folder:
        graphs = write_graphs(checkpoint, tower, folder)
        nodes = {name: count for name, (_, count, _) in graphs.items()}
        for backend in backends:
            candidates = [
                LatencyCandidate(name, "graph", str(path), backend=backend, ids=_ids(tower, cut, checkpoint))
                for name, (path, _, cut) in graphs.items()
            ]
            timings = measure(
                candidates, batches=BATCHES[tower], rounds=rounds, threads=threads, seed=_SEED, progress=bar
            )
            yield TowerTimings(model, tower, backend, setting, nodes, timings)


def _stored(data: Path) -> list[TowerTimings]:
    return [TowerTimings.from_json(plain) for plain in json.loads(data.read_text())] if data.is_file() else []


def _ids(tower: Tower, cut: bool, checkpoint: Checkpoint) -> int | None:
    if tower == "image":
        return None
    return TEXT_IDS if cut else checkpoint.tokenizer.spec.context_length


def page(groups: Sequence[TowerTimings]) -> str:
    """The tables as Markdown. The yardstick is the full graph, so `1 / ratio` is how much longer another one takes."""
    lines = [
        "# What each exact rewrite gains",
        "",
        "Made by `python -m invariclip.bench.studies.rewrites`: seeded random weights, float32, one process per graph, "
        "taking turns.",
        f"Texts are prompts of {TEXT_IDS - 2} tokens: {TEXT_IDS} ids where the graph takes short texts, else padded to "
        "the context.",
        "",
        "*ms* is the median of a batch. *× all* is how many times as long as the graph with all rewrites it takes, "
        "paired round by round, with the 95 % interval over rounds: what leaving the rewrite out costs. A rewrite that "
        "does not apply to a tower has no row.",
        "",
    ]
    for group in groups:
        batches = sorted({row.batch for row in group.timings})
        head = "".join(f" batch {batch}, ms | × all |" for batch in batches)
        lines += [
            f"## {group.model}, {group.tower} tower, {group.backend}",
            "",
            f"{group.setting}.",
            "",
            f"| graph | nodes |{head}",
            "|---|---|" + "---|---|" * len(batches),
        ]
        for name, count in group.nodes.items():
            rows = [next(row for row in group.timings if (row.name, row.batch) == (name, batch)) for batch in batches]
            lines.append(f"| {name} | {count} |" + "".join(map(_cells, rows)))
        lines.append("")
    lines += ["What they are:", "", *(f"- `{one.name}` ({', '.join(one.towers)}): {one.saves}." for one in REWRITES)]
    return "\n".join([*lines, ""])


def _cells(row: Timing) -> str:
    longer = f"{1 / row.ratio:.2f} [{1 / row.ratio_high:.2f}, {1 / row.ratio_low:.2f}]"
    return f" {row.median_ms:.1f} | {'1' if row.name == ALL else longer} |"


if __name__ == "__main__":
    run_command(rewrites)
