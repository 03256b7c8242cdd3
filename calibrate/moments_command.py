"""`invariclip moments`: look into files of moments, put them together, take one out of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from invariclip.calibrate.data.stream.state import MomentsState, read_state, write_state
from invariclip.console import emit_json, say, table
from invariclip.errors import InputError


@click.group()
def moments() -> None:
    """Files of moments, as `calibrate --sources` keeps them: what calibration needs of any amount of data."""


@moments.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def show(file: Path, as_json: bool) -> None:
    """What is counted in FILE, and what was left out."""
    _tell(read_state(file), {"file": str(file)}, as_json)


@moments.command()
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The file to write.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def merge(files: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Put the moments of several FILES together; a shard that stands in two of them is refused."""
    total = read_state(files[0])
    for file in files[1:]:
        try:
            total.merge(read_state(file))
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
    write_state(out, total)
    _tell(total, {"file": str(out)}, as_json)


@moments.command()
@click.argument("whole", type=click.Path(path_type=Path))
@click.argument("part", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The file to write.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def subtract(whole: Path, part: Path, out: Path, as_json: bool) -> None:
    """Take the moments of PART out of WHOLE, for example those of images that must be forgotten."""
    left = read_state(whole)
    try:
        left.subtract(read_state(part))
    except InputError as error:
        raise InputError(f"{part}: {error}") from error
    write_state(out, left)
    _tell(left, {"file": str(out)}, as_json)


def state_json(state: MomentsState) -> dict[str, Any]:
    """JSON-ready: width, encoder, counts by source and part, shards, what was left out."""
    return {
        "width": state.width,
        "encoder": state.encoder or None,
        "shards": len(state.done),
        "counts": state.counts(),
        "left_out": {source: tally.to_json() for source, tally in sorted(state.tallies.items()) if tally.counts},
    }


def state_text(state: MomentsState) -> str:
    """The same as a table and lines."""
    rows = [[source, part, f"{number:,}"] for source, parts in state.counts().items() for part, number in parts.items()]
    lines = [
        f"{len(state.done):,} shards, embeddings of width {state.width}",
        "",
        table(["source", "part", "rows"], rows),
    ]
    for source, tally in sorted(state.tallies.items()):
        lines += [f"{source}: {line}" for line in tally.lines()]
    return "\n".join(lines)


def _tell(state: MomentsState, facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit_json({**facts, **state_json(state)})
        return
    say(state_text(state))
