"""The C++ runtime beside the Python one: `python -m invariclip.bench.cpp` writes docs/cpp.md."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from invariclip.artifact.folder import read_manifest
from invariclip.bench.cpp.build import SOURCE, build
from invariclip.bench.cpp.compare import compare
from invariclip.bench.latency.machine import Ticks
from invariclip.cli.main import run_command
from invariclip.console import bar, note
from invariclip.errors import InputError
from invariclip.files import scratch_directory, write_atomically
from invariclip.machine import this_machine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HERE = Path(__file__).parent
HEAD = HERE / "head.md"
"""How to use the C++ runtime; the page begins with it."""
FRAMES = ((4000, 3000), (1920, 1080), (640, 480))
SIDE = 224
_TURN = 0.4


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(min=3))
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="Of the engine.")
@click.option(
    "--loading",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="An artifact, best a large one, whose loading is timed; by default ARTIFACT.",
)
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("docs/cpp.md"), show_default=True)
def cpp(artifact: Path, rounds: int, threads: int, loading: Path | None, out: Path) -> int:
    """Time pixels, whole answers and loading in C++ and in Python, one process each, in turns.

    OpenVINO comes with its wheel; ONNX Runtime's wheel lacks the headers, so it is timed where the environment variable
    ONNXRUNTIME_ROOT names a folder with include/ and lib/.
    """
    rows: dict[str, list[dict[str, Any]]] = {"pixels": []}
    before, load = Ticks.now(), os.getloadavg()[0]
    with scratch_directory() as folder:
        engines = build(HERE, folder / "build", f"-DINVARICLIP_SOURCE={SOURCE}")
        for columns, height in FRAMES:
            frame = folder / "frame"
            _frame(columns, height).tofile(frame)
            words = [str(frame), str(columns), str(height)]
            how: dict[str, Any] = {"rounds": rounds, "seconds": _TURN, "progress": bar}
            size = f"{columns}×{height}"
            ask = folder / "build" / "ask"
            rows["pixels"].append(asdict(compare(size, ask, [*words, "pixels", str(SIDE)], folder, **how)))
            for engine in engines:
                asked = [*words, "classify", str(artifact), engine, str(threads)]
                rows.setdefault(engine, []).append(asdict(compare(size, ask, asked, folder, **how)))
        loaded = time_loading(loading or artifact, ask, engines, folder, rounds=rounds, threads=threads)
    shares = Ticks.now().since(before)
    manifest = read_manifest(artifact)
    found = {
        "model": manifest.model.name, "classes": len(manifest.classes), "rounds": rounds, "threads": threads,
        "side": SIDE, "rows": rows, "processor": this_machine().processor, "processors": os.cpu_count(),
        "load": [load, os.getloadavg()[0]], "steal": shares["steal"],
        "versions": {name: version(name) for name in ("pillow", *engines)}, "loading": loaded,
    }  # fmt: skip
    unequal = [row["name"] for group in (*rows.values(), loaded["rows"]) for row in group if not row["equal"]]
    if unequal:
        raise InputError(f"C++ and Python do not answer the same bytes: {', '.join(unequal)}")
    write_atomically(out.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
    write_atomically(out, page(found))
    note(f"{out}: written")
    return 0


def time_loading(
    artifact: Path, ask: Path, engines: Sequence[str], folder: Path, *, rounds: int, threads: int
) -> dict[str, Any]:
    """An artifact opened by both, and the engine alone beside C++ that looks at no digest.

    Args:
        artifact: What is opened; its files are in the page cache from the second time on.
        ask: The C++ program.
        engines: Those to open it in.
        folder: For the first answers.
        rounds: Turns that each gets.
        threads: Of an engine.

    Returns:
        A part of the page's record.

    Raises:
        WorkerError: A process stopped.
    """
    _frame(8, 8).tofile(folder / "blank")
    before, rows = os.getloadavg()[0], []
    for engine in engines:
        for what, name in (("load", f"{engine}, digests looked at"), ("unverified", f"{engine} alone, C++ without")):
            asked = [str(folder / "blank"), "8", "8", what, str(artifact), engine, str(threads)]
            row = compare(name, ask, asked, folder, rounds=rounds, seconds=_TURN, progress=bar)
            rows.append(asdict(row))
    manifest = read_manifest(artifact)
    size = manifest.variants["float32"].image.size_bytes
    return {
        "model": manifest.model.name, "bytes": size, "rounds": rounds, "rows": rows,
        "load": [before, os.getloadavg()[0]],
    }  # fmt: skip


def _frame(columns: int, rows: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Waves and noise; what is in an image takes no time, only its size does."""
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    waves = np.stack([np.sin(x / (7 + band)) + np.cos(y / (11 + band)) for band in range(3)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 0.2, waves.shape)
    return ((waves + noise + 2.6) * 49).clip(0, 255).astype(np.uint8)


def page(found: Mapping[str, Any]) -> str:
    """The page, of the JSON's figures alone."""
    engines = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    before, after = found["load"]
    lines = [
        HEAD.read_text(encoding="utf-8").rstrip(),
        "",
        "## How fast",
        "",
        f"`python -m invariclip.bench.cpp ARTIFACT --rounds {found['rounds']}` ({found['model']}, {found['classes']} "
        f"classes) on {found['processor']}, {engines}, threads of an engine: "
        f"{found['threads']}. C++ and Python in a process each, {found['rounds']} rounds in turns. Medians in "
        "milliseconds; in brackets how far the slowest round is above the fastest. *C++ is faster* compares turns of "
        "the same round: median over rounds and its 95 % interval. *Fastest* is the shortest time "
        "of all. Both answered the same bytes in every row. "
        f"One-minute load average {before:.1f} before and {after:.1f} after, of {found['processors']} processors; the "
        "two that are compared are one of it.",
        "",
        f"Pixels: a decoded frame resized and cropped to {found['side']}×{found['side']} RGB, by Pillow and by C++.",
        "",
        *_table(found["rows"]["pixels"]),
    ]
    for engine, rows in found["rows"].items():
        if engine != "pixels":
            lines += ["", f"From a frame to a prediction, batch 1, in {engine}.", "", *_table(rows)]
    loading = found["loading"]
    lines += [
        "",
        f"Loading an image graph of {loading['bytes'] / 1e6:.0f} MB ({loading['model']}), {loading['rounds']} rounds, "
        "its file in the page cache. *Alone* is the engine's own Python API beside C++ with `LoadOptions::verify` off. "
        f"Load average {loading['load'][0]:.1f} before and {loading['load'][1]:.1f} after.",
        "",
        *_table(loading["rows"], "engine"),
    ]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Mapping[str, Any]], what: str = "frame") -> list[str]:
    return [
        f"| {what} | Python, ms | C++, ms | C++ is faster | fastest: Python, C++, ms |",
        "|---|---|---|---|---|",
        *map(_line, rows),
    ]


def _line(row: Mapping[str, Any]) -> str:
    cells = (
        row["name"],
        f"{row['python_ms']:.2f} (+{row['python_spread']:.0%})",
        f"{row['cpp_ms']:.2f} (+{row['cpp_spread']:.0%})",
        f"{row['faster']:.2f} × [{row['low']:.2f}, {row['high']:.2f}]",
        f"{row['python_best_ms']:.2f}, {row['cpp_best_ms']:.2f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    run_command(cpp)
