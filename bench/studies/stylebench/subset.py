"""The part of the picture set that is committed: what the demo and the tests use without any download.

Rules alone decide what is in it, never a result: every concept that has a real photograph, and others in the order of a
seeded hash of their identifier until there are `CONCEPTS`. Concepts keep the split that they have in the full set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from typing import TYPE_CHECKING

from PIL import Image

from invariclip.bench.studies.stylebench.build import MANIFEST
from invariclip.bench.studies.stylebench.manifest import StyleImage, read_manifest, write_manifest
from invariclip.console import Progress, silent
from invariclip.errors import InputError
from invariclip.files import sha256_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CONCEPTS = 300
SEED = 0
"""Of the order in which concepts without a photograph are taken."""

DRAWN = ("noto", "fluent-flat", "fluent-3d", "openmoji", "openmoji-black")
"""Drawn styles: three to fit on, and two unseen ones whose drawings no training style shares (the high-contrast Fluent
drawings are the outlines of the flat ones)."""
PHOTOGRAPHS = "photograph"

LOSSY = {"noto": 85, "fluent-3d": 85, PHOTOGRAPHS: 85}
"""WebP quality of the styles with shading; the others are flat, and smaller without loss."""

MANIFEST_FILE = "pictures.jsonl"


def chosen_concepts(pictures: Sequence[StyleImage], count: int = CONCEPTS) -> list[str]:
    """The concepts of the subset: those with a photograph, then others in hashed order, `count` in all.

    Args:
        pictures: The full set's manifest.
        count: How many; those with a photograph are taken even if they are more.

    Raises:
        InputError: Fewer concepts stand in every drawn style.
    """
    styles: dict[str, set[str]] = {}
    for picture in pictures:
        styles.setdefault(picture.concept, set()).add(picture.style)
    able = [concept for concept, found in styles.items() if found >= set(DRAWN)]
    if len(able) < count:
        raise InputError(f"only {len(able)} of {count} concepts stand in every style of {', '.join(DRAWN)}")
    first = [concept for concept in able if PHOTOGRAPHS in styles[concept]]
    rest = sorted((concept for concept in able if concept not in set(first)), key=_hash)
    return first + rest[: max(0, count - len(first))]


def write_subset(data: Path, out: Path, progress: Progress = silent, *, count: int = CONCEPTS) -> list[StyleImage]:
    """Copies the committed subset out of a built set; pictures that stand in `out` and are not of it are removed.

    Args:
        data: Folder of the built picture set.
        out: Folder to write `pictures/<style>/<hexcode>.webp` and `pictures.jsonl` into.
        progress: Progress display.
        count: How many concepts.

    Returns:
        The subset's manifest.

    Raises:
        InputError: The set holds too few concepts.
    """
    everything = read_manifest(data / MANIFEST)
    wanted, styles = set(chosen_concepts(everything, count)), {*DRAWN, PHOTOGRAPHS}
    chosen = [picture for picture in everything if picture.concept in wanted and picture.style in styles]
    pictures = [_copy(data, out, picture) for picture in progress(chosen, total=len(chosen), desc="subset")]
    kept = {out / picture.file for picture in pictures}
    for left in sorted(set((out / "pictures").glob("*/*.webp")) - kept):
        left.unlink()
    write_manifest(out / MANIFEST_FILE, pictures)
    return pictures


def _hash(concept: str) -> bytes:
    return hashlib.sha256(f"bundled\n{SEED}\n{concept}".encode()).digest()


def _copy(data: Path, out: Path, picture: StyleImage) -> StyleImage:
    target = out / picture.file
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".part")
    if picture.style in LOSSY:
        with Image.open(data / picture.file) as opened:
            opened.convert("RGB").save(beside, format="WEBP", quality=LOSSY[picture.style], method=6)
    else:
        shutil.copyfile(data / picture.file, beside)
    beside.replace(target)
    return dataclasses.replace(picture, sha256=sha256_file(target))
