"""The command `bench`."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import click

from invariclip.artifact.folder import read_manifest
from invariclip.bench.latency import machine, report
from invariclip.bench.latency.peers import entries
from invariclip.bench.latency.prepare import ReferenceRequest, prepare
from invariclip.bench.latency.report import write_page
from invariclip.bench.latency.session import Plan, Session, open_record
from invariclip.cli.options import JSON, QUIET, THREADS
from invariclip.console import bar, emit_json, note, say, silent
from invariclip.threads import available_threads

RECORD, PAGE = "bench.json", "index.html"


@click.command()
@click.argument("artifact", required=False, type=click.Path(path_type=Path))
@click.option("--model", help="The checkpoint's model [default: the one the artifact names, else reference].")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights: .safetensors or a tensors-only .pt.")
@click.option("--random-weights", type=int, metavar="SEED", help="Random weights: speed is the same.")
@click.option("--tokenizer", metavar="DIR", help="For models with another vocabulary than CLIP's; see `export`.")
@click.option("--images", multiple=True, type=click.Path(path_type=Path), help="Images to compare answers on.")
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(1, 1024), help="Batch size; repeatable [default: 1, 8]."
)
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Turns of every candidate.")
@click.option("--cold", default=3, show_default=True, type=click.IntRange(0), help="Cold starts after the first one.")
@click.option("--seconds-per-turn", default=0.4, show_default=True, type=click.FloatRange(0.001, 60))
@click.option("--fresh", is_flag=True, help="Forget what was timed before in this folder; prepared files stay.")
@click.option("--out", "-o", default=Path("invariclip-bench"), show_default=True, type=click.Path(path_type=Path),
              help="Folder for everything it makes; a run that was stopped goes on from there.")  # fmt: skip
@THREADS
@JSON
@QUIET
def bench(
    artifact: Path | None, model: str | None, checkpoint: Path | None, random_weights: int | None,
    tokenizer: str | None, images: tuple[Path, ...], batches: tuple[int, ...], rounds: int, cold: int,
    seconds_per_turn: float, fresh: bool, out: Path, threads: int | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Time an artifact beside PyTorch, plain engines and NNCF: one process each, taking turns, answers compared.

    Without ARTIFACT, one is exported in float32.
    """
    began = time.monotonic()
    progress, tell = (silent, lambda _: None) if quiet else (bar, note)
    named = model or ("reference" if artifact is None else read_manifest(artifact).model.name)
    count = threads or available_threads()
    wanted = ReferenceRequest(named, checkpoint, random_weights, tokenizer, artifact, images, count)
    prepared = prepare(wanted, out, progress=progress, tell=tell)
    facts = machine.facts()
    key = {**prepared.key, "processor": facts["processor"], "threads": str(count)}
    path = out / RECORD
    if fresh:
        path.unlink(missing_ok=True)
    record = open_record(path, key)
    record.machine = facts
    record.settings = {
        **record.settings,
        "model": prepared.manifest.model.name,
        "artifact": str(prepared.artifact.name),
        "threads": count,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    plan = Plan(tuple(dict.fromkeys(batches)) or (1, 8), rounds, cold, seconds_per_turn, count)
    Session(record, path, entries(wanted, prepared), prepared, plan, progress=progress, tell=tell).run()
    summary = report.summarise(record)
    record.settings["seconds"] = round(record.settings.get("seconds", 0.0) + time.monotonic() - began, 1)
    record.write(path, summary)
    write_page(out / PAGE, record, summary)
    if as_json:
        emit_json({"record": str(path), "page": str(out / PAGE), "settings": record.settings, **summary})
        return
    say(report.summary_table(record, summary))
    stages = report.stage_table(summary)
    if stages:
        say(f"\nWhere an image's time goes, ms at batch 1\n{stages}")
    for warning in summary["warnings"]:
        say(f"\nwarning: {warning}")
    say(f"\nRecord: {path}\nPage:   {out / PAGE}")
