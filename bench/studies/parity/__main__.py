"""`python -m invariclip.bench.studies.parity` holds every family's graphs against PyTorch and writes docs/parity.md.

Each family is a process of its own. What is done is kept under build/parity with a digest of the code and versions that
it came from, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

import invariclip
from invariclip import export
from invariclip.bench.studies.parity.family import RANK, FamilyParity
from invariclip.console import bar, note
from invariclip.export.checkpoints.families import FAMILIES
from invariclip.export.verification.figures import SIZES
from invariclip.files import write_atomically

PACKAGES = (
    "torch",
    "open_clip_torch",
    "timm",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "tensorrt_rtx",
)


def versions() -> dict[str, str]:
    """Of every package that the figures depend on.

    Raises:
        ClickException: One of them is not installed.
    """
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError as error:
            raise click.ClickException(f'{name} is not installed: pip install "invariclip[dev]"') from error
    return found


def state(used: dict[str, str]) -> str:
    """Digest of the code and of the versions: figures of another state are not taken over.

    The code is this study's, `export` and `runtime`. The package's own folder is `runtime` in a working tree;
    installed, it holds the other rooms too.
    """
    digest = hashlib.sha256(json.dumps(used, sort_keys=True).encode())
    for folder in (Path(__file__).parent, Path(export.__file__).parent, Path(invariclip.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def figures_of(name: str, cache: Path, key: str) -> FamilyParity | str:
    """One family's figures, from the cache or from a process of its own; a message if that fails."""
    kept = cache / f"{name}.json"
    if kept.is_file():
        stored = json.loads(kept.read_text())
        if stored["state"] == key:
            return FamilyParity.from_json(stored["figures"])
    raw = cache / f"{name}.running.json"
    done = subprocess.run(
        [sys.executable, "-m", "invariclip.bench.studies.parity.family", name, str(raw)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return f"{name}: {(done.stderr.strip().splitlines() or ['stopped'])[-1]} (exit {done.returncode})"
    figures = FamilyParity.from_json(json.loads(raw.read_text()))
    raw.unlink()
    write_atomically(kept, json.dumps({"state": key, "figures": asdict(figures)}, indent=1))
    return figures


@click.command()
@click.option("--family", "names", multiple=True, help="Repeatable [default: all of them].")
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("docs/parity.md"), show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=Path("build/parity"), show_default=True)
def parity(names: tuple[str, ...], out: Path, cache: Path) -> int:
    """Write the parity table of all families; exit code 1 if a bound is broken."""
    began = time.monotonic()
    known = [one.name for one in FAMILIES]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is no family; available: {', '.join(known)}")
    used = versions()
    key = state(used)
    cache.mkdir(parents=True, exist_ok=True)
    seen: list[FamilyParity] = []
    failed: list[str] = []
    chosen = list(names or known)
    for name in bar(chosen, total=len(chosen), desc="families"):
        result = figures_of(name, cache, key)
        if isinstance(result, str):
            failed.append(result)
            note(result)
        else:
            seen.append(result)
            failed += result.broken
    write_atomically(out, page(seen, failed, used))
    note(f"{out}: {len(seen)} families, {len(failed)} bounds broken, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def page(seen: list[FamilyParity], failed: list[str], used: dict[str, str]) -> str:
    """The tables as Markdown."""
    notes = {one.name: one.note for one in FAMILIES}
    sizes = " | ".join(f"batch {size}" for size in SIZES)
    lines = [
        "# Parity: exported graphs against PyTorch, family by family",
        "",
        "Made by `python -m invariclip.bench.studies.parity`. Each family has seeded random weights that leave no part "
        f"without effect, and a random projection of rank {RANK} folded in. Reference: the original PyTorch encoder in "
        "float32, unfolded, then the projection and the L2 norm in float64. Candidate: the rewritten graph in float32, "
        f"on {max(SIZES)} bundled images and texts.",
        "",
        "*max |Δ|* is the largest difference of any component of two unit embeddings. *could be* is how far two "
        "different inputs lie apart by the same measure: what a difference has to be seen against. *short texts* runs "
        "the text graph on ids cut to the longest text. Every graph passes ONNX's full check with shape inference, and "
        "*TensorRT-RTX* parses and builds it without a GPU.",
        "",
        "| family | tower | projection | nodes | " + sizes + " | OpenVINO, worst | short texts | could be | bound "
        "| TensorRT-RTX |",
        "|---|---|---|---|" + "---|" * (len(SIZES) + 5),
    ]
    for one in seen:
        for tower in one.towers:
            ours = " | ".join(f"{value:.1e}" for value in tower.diffs["onnxruntime"])
            cut = "–" if tower.cut_diff is None else f"{tower.cut_diff:.1e}"
            lines.append(
                f"| {one.name} | {tower.tower} | {tower.fold} | {tower.nodes} | {ours} | "
                f"{max(tower.diffs['openvino']):.1e} | {cut} | {tower.spread:.1e} | {one.tolerance:g} | "
                f"{tower.tensorrt} |"
            )
    lines += [
        "",
        f"Broken bounds: {'; '.join(failed) or 'none'}.",
        "",
        "## What was exported",
        "",
        "*Peak* is the largest resident memory of the process until both graphs were written, the interpreter and "
        "PyTorch included, beside the checkpoint's weights.",
        "",
        "| family | | weights | peak memory | trace and write, s | what is special |",
        "|---|---|---|---|---|---|",
    ]
    for one in seen:
        seconds = " + ".join(f"{tower.seconds:.0f}" for tower in one.towers)
        lines.append(
            f"| {one.name} | {one.source} | {one.weights / 1e6:,.0f} MB | {one.peak / 1e6:,.0f} MB "
            f"({one.peak / one.weights:.2f} ×) | {seconds} | {notes[one.name]} |"
        )
    lines += ["", "## Rewrites that did not apply", "", "| family | tower | rewrite | why |", "|---|---|---|---|"]
    for one in seen:
        for tower in one.towers:
            lines += [
                f"| {one.name} | {tower.tower} | {step['name']} | {step['detail']} |"
                for step in tower.plan
                if not step["applied"]
            ]
    made_by = ", ".join(f"{name} {number}" for name, number in used.items())
    return "\n".join([*lines, "", f"Versions: {made_by}.", ""])


if __name__ == "__main__":
    sys.exit(parity(standalone_mode=False))
