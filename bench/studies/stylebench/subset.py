"""The part of the image set that is committed: what the demo and the tests use without any download.

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

MANIFEST_FILE = "images.jsonl"


def chosen_concepts(images: Sequence[StyleImage], count: int = CONCEPTS) -> list[str]:
    """The concepts of the subset: those with a photograph, then others in hashed order, `count` in all.

    Args:
        images: The full set's manifest.
        count: How many; those with a photograph are taken even if they are more.

    Raises:
        InputError: Fewer concepts stand in every drawn style.
    """
    styles: dict[str, set[str]] = {}
    for image in images:
        styles.setdefault(image.concept, set()).add(image.style)
    able = [concept for concept, found in styles.items() if found >= set(DRAWN)]
    if len(able) < count:
        raise InputError(f"only {len(able)} of {count} concepts stand in every style of {', '.join(DRAWN)}")
    first = [concept for concept in able if PHOTOGRAPHS in styles[concept]]
    rest = sorted((concept for concept in able if concept not in set(first)), key=_hash)
    return first + rest[: max(0, count - len(first))]


def write_subset(data: Path, out: Path, progress: Progress = silent, *, count: int = CONCEPTS) -> list[StyleImage]:
    """Copies the committed subset out of a built set; images that stand in `out` and are not of it are removed.

    Args:
        data: Folder of the built image set.
        out: Folder to write `images/<style>/<hexcode>.webp` and `images.jsonl` into.
        progress: Progress display.
        count: How many concepts.

    Returns:
        The subset's manifest.

    Raises:
        InputError: The set holds too few concepts.
    """
    everything = read_manifest(data / MANIFEST)
    wanted, styles = set(chosen_concepts(everything, count)), {*DRAWN, PHOTOGRAPHS}
    chosen = [image for image in everything if image.concept in wanted and image.style in styles]
    images = [_copy(data, out, image) for image in progress(chosen, total=len(chosen), desc="subset")]
    kept = {out / image.file for image in images}
    for left in sorted(set((out / "images").glob("*/*.webp")) - kept):
        left.unlink()
    write_manifest(out / MANIFEST_FILE, images)
    return images


def _hash(concept: str) -> bytes:
    return hashlib.sha256(f"bundled\n{SEED}\n{concept}".encode()).digest()


def _copy(data: Path, out: Path, image: StyleImage) -> StyleImage:
    target = out / image.file
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".part")
    if image.style in LOSSY:
        with Image.open(data / image.file) as opened:
            opened.convert("RGB").save(beside, format="WEBP", quality=LOSSY[image.style], method=6)
    else:
        shutil.copyfile(data / image.file, beside)
    beside.replace(target)
    return dataclasses.replace(image, sha256=sha256_file(target))
