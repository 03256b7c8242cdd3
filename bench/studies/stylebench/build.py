"""Builds the whole image set: fetch, match, render, describe."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from invariclip.bench.studies.stylebench.artwork import Artwork, find_artwork
from invariclip.bench.studies.stylebench.concepts import Concept, common_concepts, image_split, read_concepts
from invariclip.bench.studies.stylebench.manifest import StyleImage, write_manifest
from invariclip.bench.studies.stylebench.render import SIZE, render
from invariclip.bench.studies.stylebench.sources import PACKAGES, STYLES, licence_of
from invariclip.console import Progress, silent
from invariclip.export.reference.packages import fetch_all
from invariclip.files import sha256_file

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = "manifest.jsonl"
RENDERER = f"resvg-{SIZE}-white-1"
"""Changes when images would come out differently; images of another renderer are drawn anew."""


def build(out: Path, packages: Path | None = None, progress: Progress = silent) -> list[StyleImage]:
    """Builds the image set; images that are there already are not drawn again.

    Args:
        out: Folder of the set: `manifest.jsonl` and `images/<style>/<hexcode>.webp`.
        packages: Where packages are kept; `out/packages` by default.
        progress: Progress display.

    Returns:
        The manifest, ordered by style and then by concept.

    Raises:
        InputError: A package cannot be fetched or an image not be drawn.
    """
    folders = fetch_all(PACKAGES, packages or out / "packages", progress)
    concepts = read_concepts(folders)
    artwork = find_artwork(folders, {code: concept.name for code, concept in concepts.items()})
    kept = common_concepts(concepts, artwork)
    jobs = [
        (style, concept, artwork[style][code])
        for style in STYLES
        for code, concept in kept.items()
        if code in artwork[style]
    ]
    _forget_other_renderers(out)
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        images = list(progress(pool.map(lambda job: _draw(out, *job), jobs), total=len(jobs), desc="images"))
    write_manifest(out / MANIFEST, images)
    return images


def _draw(out: Path, style: str, concept: Concept, artwork: Artwork) -> StyleImage:
    file = f"images/{style}/{concept.hexcode}.webp"
    path = out / file
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".part")
        render(artwork).save(beside, format="WEBP", lossless=True, method=2)
        beside.replace(path)
    return StyleImage(
        file=file,
        concept=concept.hexcode,
        name=concept.name,
        keywords=concept.keywords,
        group=concept.group,
        style=style,
        split=image_split(style, concept.split),
        concept_split=concept.split,
        licence=licence_of(style),
        sha256=sha256_file(path),
    )


def _forget_other_renderers(out: Path) -> None:
    marker = out / "images" / ".renderer"
    marker.parent.mkdir(parents=True, exist_ok=True)
    if not marker.is_file() or marker.read_text(encoding="ascii") != RENDERER:
        for stale in marker.parent.glob("*/*.webp"):
            stale.unlink()
        marker.write_text(RENDERER, encoding="ascii")


def digest_of(images: list[StyleImage]) -> str:
    """One digest for a set of images: over each one's style, concept, split and file digest."""
    lines = sorted(f"{p.style} {p.concept} {p.split} {p.sha256}" for p in images)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
