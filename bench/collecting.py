"""How fast and in how much memory pairs become moments: `python -m invariclip.bench.collecting`.

The work that cannot be saved is two matrix products, ZᵀZ and ΔᵀΔ; they are timed by themselves on rows that lie ready
in memory, in a process of their own, and taking turns with the collecting of the same number of rows from files.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from invariclip.bench.machine import peak_bytes
from invariclip.calibrate.sources.embeddings import Embeddings
from invariclip.calibrate.stream.blocks import BLOCK_ROWS
from invariclip.calibrate.stream.collect import collect
from invariclip.console import bar, emit_json, say, table
from invariclip.errors import InvariclipError

FILE_ROWS = 100_000


def write_pairs(folder: Path, rows: int, width: int, seed: int) -> None:
    """Pairs as float32 npy files: `first-*.npy`, and `second-*.npy` that lie near them."""
    rng = np.random.default_rng(seed)
    for place, start in enumerate(range(0, rows, FILE_ROWS)):
        first = rng.standard_normal((min(FILE_ROWS, rows - start), width), dtype=np.float32)
        np.save(folder / f"first-{place:04}.npy", first)
        first += 0.3 * rng.standard_normal(first.shape, dtype=np.float32)
        np.save(folder / f"second-{place:04}.npy", first)


def seconds_of_products(rows: int, width: int) -> float:
    """The two products alone, over as many rows, of which one block lies in memory."""
    block = np.random.default_rng(0).standard_normal((BLOCK_ROWS, width))
    total = np.zeros((width, width))
    started = time.perf_counter()
    for _ in range(2):
        for start in range(0, rows, BLOCK_ROWS):
            part = block[: min(BLOCK_ROWS, rows - start)]
            total += part.T @ part
    return time.perf_counter() - started


def seconds_of_collecting(folder: Path) -> tuple[float, int]:
    """From files to moments, with a state file; and how many pairs were counted."""
    source = Embeddings("pairs", first=str(folder / "first-*.npy"), second=str(folder / "second-*.npy"), points="first")
    with tempfile.TemporaryDirectory() as kept:
        started = time.perf_counter()
        state = collect([source], state_file=Path(kept) / "moments.safetensors")
        return time.perf_counter() - started, state.combined().pairs


@click.command()
@click.option("--rows", "sizes", multiple=True, type=int, default=(10_000, 100_000, 1_000_000), show_default=True)
@click.option("--width", default=512, show_default=True, help="D.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--data", type=click.Path(path_type=Path), help="Folder for the pairs; temporary by default.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@click.option("--one", hidden=True, help="What a child process does: products or collect.")
def main(
    sizes: tuple[int, ...], width: int, rounds: int, data: Path | None, seed: int, as_json: bool, one: str | None
) -> None:
    """Times collecting beside the two matrix products, and looks at its memory."""
    if one is not None:
        emit_json(_measure(one, sizes[0], width, data or Path()))
        return
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for rows in sizes:
            folder = (data or Path(temporary)) / f"{rows}x{width}"
            if not folder.is_dir():
                folder.mkdir(parents=True)
                write_pairs(folder, rows, width, seed)
            found.append({"rows": rows, "width": width, **_compare(folder, rows, width, rounds)})
    if as_json:
        emit_json({"runs": found})
        return
    lines = [
        [f"{run['rows']:,}", f"{run['products']:.2f} s", f"{run['collect']:.2f} s", f"{run['ratio']:.2f}",
         f"{run['ratio_low']:.2f} … {run['ratio_high']:.2f}", f"{run['peak_mb']:.0f} MB"]
        for run in found
    ]  # fmt: skip
    say(table(["pairs", "two products", "collecting", "ratio", "over rounds", "peak memory"], lines))


def _compare(folder: Path, rows: int, width: int, rounds: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {"products": [], "collect": []}
    peak = 0.0
    for _ in bar(range(rounds), total=rounds, desc=f"{rows:,} pairs"):
        for what, seconds in taken.items():
            answer = _child(what, folder, rows, width)
            seconds.append(answer["seconds"])
            if what == "collect":
                peak = max(peak, answer["peak_mb"])
    ratios = np.array(taken["collect"]) / np.array(taken["products"])
    return {
        "products": float(np.median(taken["products"])),
        "collect": float(np.median(taken["collect"])),
        "ratio": float(np.median(ratios)),
        "ratio_low": float(ratios.min()),
        "ratio_high": float(ratios.max()),
        "peak_mb": peak,
    }


def _child(what: str, folder: Path, rows: int, width: int) -> dict[str, float]:
    """Measures in a process of its own, so that memory is its own and no thread pool of another spins."""
    command = [sys.executable, "-m", "invariclip.bench.collecting", "--one", what, "--rows", str(rows)]
    command += ["--width", str(width), "--data", str(folder)]
    answer: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return answer


def _measure(what: str, rows: int, width: int, folder: Path) -> dict[str, float]:
    if what == "products":
        return {"seconds": seconds_of_products(rows, width)}
    seconds, pairs = seconds_of_collecting(folder)
    if pairs != rows:
        raise InvariclipError(f"{pairs} of {rows} pairs were counted")
    return {"seconds": seconds, "peak_mb": peak_bytes() / 2**20}


if __name__ == "__main__":
    main()
