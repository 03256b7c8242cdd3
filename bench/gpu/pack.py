"""`python -m invariclip.bench.gpu.pack`: wheels for a machine without a network, in parts of bounded size.

`pack` fetches with pip and cuts what is too large; `unpack`, over there, puts it together, checks every digest and
prints the pip command. A list with digests travels along, so a part that is missing or damaged is named.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from invariclip.cli.main import run_command
from invariclip.console import say
from invariclip.errors import InputError
from invariclip.files import sha256_file, write_atomically

PART_BYTES = 60_000_000
"""Largest part."""
PACKAGES = ("onnxruntime-gpu", "tensorrt-rtx", "cuda-bindings", "open_clip_torch", "onnx", "onnxscript")
"""What is brought along unless other names are given; PyTorch with CUDA is expected over there, or named."""
LIST = "parts.json"


def cut(files: list[Path], out: Path, part_bytes: int = PART_BYTES) -> list[dict[str, Any]]:
    """Writes files as parts of at most `part_bytes`, and the list of them.

    Args:
        files: What to cut, of different names.
        out: Folder of the parts and of `parts.json`.
        part_bytes: The largest part.

    Raises:
        InputError: Two files share a name, a part is to hold nothing, or the folder cannot be written.
    """
    if part_bytes < 1 or len({file.name for file in files}) != len(files):
        raise InputError("parts of one byte at least, and files of different names, can be packed")
    entries = []
    for file in sorted(files):
        parts: list[dict[str, str]] = []
        with file.open("rb") as stream:
            while (content := stream.read(part_bytes)) or not parts:
                name = f"{file.name}.part{len(parts):03d}"
                write_atomically(out / name, content)
                parts.append({"name": name, "sha256": hashlib.sha256(content).hexdigest()})
        entries.append({"name": file.name, "sha256": sha256_file(file), "parts": parts})
    write_atomically(out / LIST, json.dumps(entries, indent=1))
    return entries


def join(parts: Path, out: Path) -> list[Path]:
    """Puts files together again, each checked part by part and as a whole.

    Args:
        parts: Folder with `parts.json`.
        out: Where the files go.

    Raises:
        InputError: The list or a part is missing, damaged, or names what lies elsewhere.
    """
    try:
        entries = json.loads((parts / LIST).read_text(encoding="utf-8"))
        names = [entry["name"] for entry in entries] + [part["name"] for entry in entries for part in entry["parts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{parts}: holds no list of parts that can be read ({error!r}); pack again") from error
    if any(not isinstance(name, str) or name != Path(name).name or name in ("", ".", "..") for name in names):
        raise InputError(f"{parts / LIST}: names a file outside its folder; pack again")
    out.mkdir(parents=True, exist_ok=True)
    found = []
    for entry in entries:
        target = out / entry["name"]
        whole = hashlib.sha256()
        with target.open("wb") as stream:
            for part in entry["parts"]:
                content = _part(parts / part["name"], part["sha256"])
                whole.update(content)
                stream.write(content)
        if whole.hexdigest() != entry["sha256"]:
            raise InputError(f"{target.name}: its parts do not make the file that was packed; pack again")
        found.append(target)
    return found


def _part(path: Path, sha256: str) -> bytes:
    if not path.is_file():
        raise InputError(f"{path}: is missing; bring all parts")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(f"{path}: is damaged (digest differs); bring it again")
    return content


@click.group()
def main() -> None:
    """Wheels in parts, for a machine without a network."""


@main.command()
@click.argument("packages", nargs=-1)
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("build/gpu-parts"), show_default=True)
@click.option("--constraints", type=click.Path(path_type=Path, exists=True), help="Versions, as pip's -c.")
@click.option("--part-mb", type=click.IntRange(1, 60), default=60, show_default=True)
def pack(packages: tuple[str, ...], out: Path, constraints: Path | None, part_mb: int) -> None:
    """Fetch PACKAGES and what they need with pip, and cut them."""
    wheels = out / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "-d", str(wheels), *(packages or PACKAGES)]
    if constraints is not None:
        command += ["-c", str(constraints)]
    if subprocess.run(command, check=False).returncode:
        raise InputError("pip could not fetch them; its own words are above")
    entries = cut(sorted(wheels.iterdir()), out / "parts", part_mb * 1_000_000)
    say(f"{out / 'parts'}: {len(entries)} files in {sum(len(entry['parts']) for entry in entries)} parts")


@main.command()
@click.argument("parts", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("wheels"), show_default=True)
def unpack(parts: Path, out: Path) -> None:
    """Put the files of PARTS together and say how to install them."""
    found = join(parts, out)
    say(f"{len(found)} files in {out}; install them: pip install --no-index --find-links {out} PACKAGE ...")


if __name__ == "__main__":
    run_command(main)
