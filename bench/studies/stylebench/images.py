"""The image set: fetched, matched, drawn on white squares, described in a manifest; and its committed subset.

The demo and the tests use the subset without any download. Rules alone decide what is in it, never a result: every
concept that has a real photograph, and others in the order of a seeded hash of their identifier until there are
`CONCEPTS`. Concepts keep the split that they have in the full set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from PIL import Image

from invariclip.bench.studies.stylebench.artwork import (
    Artwork,
    Concept,
    common_concepts,
    find_artwork,
    image_split,
    read_concepts,
)
from invariclip.bench.studies.stylebench.sources import PACKAGES, STYLES, licence_of
from invariclip.console import Progress, silent
from invariclip.errors import InputError
from invariclip.export.reference.packages import fetch_all
from invariclip.files import sha256_file, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path


@dataclasses.dataclass(frozen=True)
class StyleImage:
    """One image of the set.

    Attributes:
        file: Path relative to the manifest, with forward slashes.
        concept: Hexcode of what it shows.
        name: English name of the concept.
        keywords: Other English words for it.
        group: The concept's group.
        style: How it is drawn.
        split: "train", "calibrate" or "test"; always "test" in a held-out style.
        concept_split: The concept's own split: "train" means that the reference encoder learnt the concept.
        licence: SPDX identifier.
        sha256: Digest of the file.
    """

    file: str
    concept: str
    name: str
    keywords: tuple[str, ...]
    group: str
    style: str
    split: str
    concept_split: str
    licence: str
    sha256: str


def write_manifest(path: Path, images: Iterable[StyleImage]) -> None:
    """Writes a manifest whole: beside, then renamed."""
    lines = [json.dumps(dataclasses.asdict(image), ensure_ascii=False) for image in images]
    write_atomically(path, "\n".join(lines) + "\n")


def read_manifest(path: Path) -> list[StyleImage]:
    """Reads a manifest.

    Raises:
        InputError: The file is missing or a line is not an image's.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): build the image set first") from error
    images = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            images.append(StyleImage(**{**entry, "keywords": tuple(entry["keywords"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} line {number} is not an image's entry: {error}") from error
    return images


SIZE = 256
"""Side of every image in pixels."""

_WHITE = (255, 255, 255, 255)


def render(artwork: Artwork, size: int = SIZE) -> Image.Image:
    """Renders artwork.

    Args:
        artwork: An SVG text, an SVG file or a raster file.
        size: Side of the image in pixels.

    Returns:
        An RGB image of size x size.

    Raises:
        InputError: The artwork cannot be read.
    """
    try:
        if artwork.svg is not None:
            return letterbox(_rasterise(artwork.svg, size), size)
        if artwork.path is None:
            raise InputError("an artwork needs an SVG text or a file")
        if artwork.path.suffix == ".svg":
            return letterbox(_rasterise(artwork.path.read_text(encoding="utf-8"), size), size)
        with Image.open(artwork.path) as image:
            return letterbox(image, size)
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{artwork.path or 'an SVG text'} cannot be rendered: {error}") from error


def _rasterise(svg: str, size: int) -> Image.Image:
    # a stated width and height would win over ours for non-square drawings, so the longer side decides
    import resvg_py

    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size))))
    if drawn.height > size:
        drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, height=size))))
    return drawn


def letterbox(image: Image.Image, size: int) -> Image.Image:
    """Fits an image into a white square: aspect kept, whole, centred, transparency laid on white.

    Example:
        >>> letterbox(Image.new("RGB", (10, 20), "red"), 8).getpixel((0, 4))
        (255, 255, 255)
    """
    colour = image.convert("RGBA")
    scale = size / max(colour.size)
    fitted = (max(1, round(colour.width * scale)), max(1, round(colour.height * scale)))
    if fitted != colour.size:
        # premultiplied, or the unseen colour of transparent pixels bleeds into the edges
        colour = colour.convert("RGBa").resize(fitted, Image.Resampling.BICUBIC).convert("RGBA")
    canvas = Image.new("RGBA", (size, size), _WHITE)
    canvas.alpha_composite(colour, ((size - fitted[0]) // 2, (size - fitted[1]) // 2))
    return canvas.convert("RGB")


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
