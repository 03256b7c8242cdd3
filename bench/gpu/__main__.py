"""`python -m invariclip.bench.gpu`: parity and times on a GPU, in minutes, offline."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from invariclip.bench.gpu.cases import BATCHES, MODELS, TOWERS, Case, cases, plan
from invariclip.calibrate.report.rendering import require_page_packages
from invariclip.cli.main import run_command
from invariclip.console import emit_json, note, say, table
from invariclip.files import write_atomically


@click.command()
@click.option("--model", "models", multiple=True, help=f"Repeatable [default: {', '.join(MODELS)}].")
@click.option("--tower", "towers", multiple=True, help="image, text; repeatable [default: both].")
@click.option(
    "--batch", "batches", multiple=True, type=int, help=f"Repeatable [default: {', '.join(map(str, BATCHES))}]."
)
@click.option("--minutes", type=click.FloatRange(0.1), default=9.0, show_default=True,
              help="No measurement begins later; what is left is listed.")  # fmt: skip
@click.option("--short", is_flag=True, help="First and last blocks only: to try the bench, not to measure.")
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("build/gpu"), show_default=True,
              help="bench.json and index.html, kept after every step.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Shapes and plan only; runs anywhere.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(
    models: tuple[str, ...], towers: tuple[str, ...], batches: tuple[int, ...], minutes: float, short: bool, out: Path,
    dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Checks answers against PyTorch in float32 on this GPU, then times everything that is installed."""
    questions = cases(models or MODELS, towers or TOWERS, batches or BATCHES)
    if dry_run:
        _show(questions, as_json=as_json)
        return
    record = _measured(questions, minutes, out, short=short)
    if as_json:
        emit_json(record)
    else:
        from invariclip.bench.gpu.page import as_text

        say(as_text(record))


def _measured(questions: list[Case], minutes: float, out: Path, *, short: bool) -> dict[str, Any]:
    deadline = time.monotonic() + 60 * minutes
    require_page_packages("python -m invariclip.bench.gpu")
    from invariclip.bench.gpu.measure import machine, measure
    from invariclip.bench.gpu.page import line, write_page
    from invariclip.bench.gpu.runners import GraphFiles

    folder = out / "graphs"
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "short": short, "machine": machine(folder), "rows": [],
    }  # fmt: skip

    def keep(row: dict[str, Any]) -> None:
        record["rows"].append(row)
        note(line(row))
        write_atomically(out / "bench.json", json.dumps(record, indent=1, ensure_ascii=False))

    measure(questions, GraphFiles(folder, short), deadline=deadline, keep=keep)
    write_page(out / "index.html", record)
    return record


def _show(questions: list[Case], *, as_json: bool) -> None:
    planned = plan(questions)
    if as_json:
        emit_json(planned)
        return
    say(table(["model", "tower", "batch", "input"], [
        [case["model"], case["tower"], str(case["batch"]), str(case["shape"])] for case in planned["cases"]
    ]))  # fmt: skip
    say()
    say(table(["candidate", "computes in", "graph", "here"], [
        [one["name"], one["precision"], one["graph"], one["missing"] or "can be tried"] for one in planned["candidates"]
    ]))  # fmt: skip
    say(f"\n{planned['measurements']} measurements; the GPU itself is asked when they begin")


if __name__ == "__main__":
    run_command(main)
