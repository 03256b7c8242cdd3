"""The images that are learnt from, with words: emoji of the training styles, emoji of people, and clip art."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from invariclip.bench.studies.reference.clipart import read_clip_art
from invariclip.bench.studies.stylebench.artwork import find_artwork, hexcode_of
from invariclip.bench.studies.stylebench.concepts import clean_words
from invariclip.bench.studies.stylebench.manifest import read_manifest
from invariclip.bench.studies.stylebench.render import SIZE, letterbox, render
from invariclip.bench.studies.stylebench.sources import TRAINING_STYLES
from invariclip.console import Progress, silent
from invariclip.files import sha256_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

PEOPLE_GROUPS = ("People & Body", "Smileys & Emotion")
_PERSON_WORDS = frozenset(
    {
        *("man", "woman", "boy", "girl", "person", "people", "men", "women", "child", "baby", "family", "couple"),
        "older",
    }
)
_LONGEST_SIDES = 8
"""Drawings that are longer than this times their width are left out: letterboxed, nothing of them is left."""


@dataclass(frozen=True)
class CaptionedImage:
    """One image with its words.

    Attributes:
        source: `emoji`, `people` or `clipart`: images of one source share a mean.
        path: The file.
        sha256: Its digest.
        name: What it shows.
        words: Other words for it.
        concept: What images of the same thing share, or empty.
        split: stylebench's split of the concept; `train` elsewhere.
    """

    source: str
    path: Path
    sha256: str
    name: str
    words: tuple[str, ...]
    concept: str
    split: str


def emoji(data: Path) -> list[CaptionedImage]:
    """Stylebench's images in training styles: all splits, of which only `train` is learnt from."""
    found = [p for p in read_manifest(data / "manifest.jsonl") if p.style in TRAINING_STYLES]
    return [
        CaptionedImage("emoji", data / p.file, p.sha256, p.name, p.keywords, p.concept, p.concept_split) for p in found
    ]


def people(packages: Mapping[str, Path], out: Path, progress: Progress = silent) -> list[CaptionedImage]:
    """Emoji of people, faces and bodies in the training styles, one skin tone each; stylebench leaves them out.

    Args:
        packages: stylebench's unpacked packages by key.
        out: Where images are drawn; what is there is left alone.
        progress: Progress display.
    """
    table = json.loads((packages["names"] / "data-by-emoji.json").read_text(encoding="utf-8"))
    keywords = json.loads((packages["keywords"] / "dist" / "emoji-en-US.json").read_text(encoding="utf-8"))
    entries = {
        hexcode_of("-".join(f"{ord(character):04x}" for character in emoji)): (entry["name"], keywords.get(emoji, []))
        for emoji, entry in table.items()
        if entry["group"] in PEOPLE_GROUPS and "skin tone" not in entry["name"]
    }
    artwork = find_artwork(packages, {code: name for code, (name, _) in entries.items()})
    jobs = [(style, code) for style in TRAINING_STYLES for code in entries if code in artwork[style]]
    found = []
    for style, code in progress(jobs, total=len(jobs), desc="people"):
        path = out / style / f"{code}.png"
        if not path.is_file():
            _save(render(artwork[style][code]), path)
        name, words = entries[code]
        found.append(
            CaptionedImage(
                "people", path, sha256_file(path), name.replace(":", " with"), people_words(name, words), code, "train"
            )
        )
    return found


def people_words(name: str, keywords: Iterable[str]) -> tuple[str, ...]:
    """Other words for an emoji of a person: keywords, the two halves of a name with a colon, and "person".

    Example:
        >>> people_words("man: bald", ["face"])
        ('face', 'man', 'bald', 'person')
    """
    words = list(clean_words(list(keywords), name))
    if ":" in name:
        words += [part.strip() for part in name.split(":", 1)]
    if _PERSON_WORDS & set(name.replace(":", " ").split()):
        words.append("person")
    return tuple(dict.fromkeys(words))


def clip_art(svg_package: Path, png_package: Path, out: Path, progress: Progress = silent) -> list[CaptionedImage]:
    """The clip art, letterboxed.

    Args:
        svg_package: The unpacked package of SVG files.
        png_package: The unpacked package of PNG files.
        out: Where images are drawn; what is there is left alone.
        progress: Progress display.
    """
    items = read_clip_art(svg_package, png_package)
    found = []
    for item in progress(items, total=len(items), desc="clip art"):
        path = out / item.png.relative_to(png_package)
        if not path.is_file():
            with Image.open(item.png) as image:
                long, short = max(image.size), max(1, min(image.size))
                if long > _LONGEST_SIDES * short or long * short > Image.MAX_IMAGE_PIXELS * 1.9:  # type: ignore[operator]
                    continue
                _save(letterbox(image, SIZE), path)
        found.append(CaptionedImage("clipart", path, sha256_file(path), item.title, item.subjects, "", "train"))
    return found


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    image.save(beside, format="PNG")
    beside.replace(path)
