"""The images that are learnt from, with words: emoji of the training styles, emoji of people, and clip art.

Clip art is called by its SVG files' titles and subjects, and drawn by their PNG twins.
"""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from invariclip.bench.studies.stylebench.artwork import clean_words, find_artwork, hexcode_of
from invariclip.bench.studies.stylebench.images import SIZE, letterbox, read_manifest, render
from invariclip.bench.studies.stylebench.sources import TRAINING_STYLES
from invariclip.console import Progress, silent
from invariclip.files import sha256_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


SVG_ROOT, PNG_ROOT = Path("usr/share/openclipart/svg"), Path("usr/share/openclipart/png")
FOLDERS = (
    *("animals", "people", "food", "plants", "buildings", "transportation", "tools", "recreation", "containers"),
    *("education", "electronics", "computer/hardware", "office"),
)
"""Things that can be seen; signs, flags, buttons and patterns are left out."""
_NOT = ("roadsigns", "aiga-symbols", "games/cards", "chess", "dice", "boating_rules", "pantyhose")
_NOT_SUBJECTS = ("roadsign", "pantyhose")
_NOT_WHOLE_SUBJECTS = frozenset({"bullethole", "knot", "musicsym"})
_SAYS_NOTHING = frozenset(
    {
        *("hash", "unsorted", "11", "architetto francesco rollandin", "festive", "menu", "icon", "icons"),
        *("symbol", "shape", "logo", "appicon"),
    }
)
_TITLES_OF_SERIES = frozenset(
    {
        *("", "various cliparts", "svg road signs", "road signs", "etiquette icons", "blueman", "untitled", "hash"),
        *("image", "drawing"),
    }
)
MAX_SVG_BYTES = 400_000
_LONGEST_SUBJECT = 24
_METADATA = re.compile(r"<metadata.*?</metadata>", re.DOTALL)
_TITLE = re.compile(r"<dc:title[^>]*>(.*?)</dc:title>", re.DOTALL)
_SUBJECT = re.compile(r"<dc:subject>(.*?)</dc:subject>", re.DOTALL)
_ITEM = re.compile(r"<rdf:li[^>]*>(.*?)</rdf:li>", re.DOTALL)


@dataclass(frozen=True)
class ClipArt:
    """One drawing.

    Attributes:
        png: Its image.
        title: What its author called it, or its first subjects where the title is a series' name.
        subjects: Other words for it.
    """

    png: Path
    title: str
    subjects: tuple[str, ...]


def read_clip_art(svg_package: Path, png_package: Path) -> list[ClipArt]:
    """Every drawing of `FOLDERS` that says what it shows, in the order of its path; a file in two folders once.

    Args:
        svg_package: The unpacked package of SVG files.
        png_package: The unpacked package of PNG files.
    """
    root = svg_package / SVG_ROOT
    folders: dict[Path, list[str]] = {}
    for path in sorted(root.rglob("*.svg"), key=lambda path: (str(path.parent.relative_to(root)), path.name)):
        folder = path.parent.relative_to(root).as_posix()
        if folder.startswith(FOLDERS) and not any(part in folder or part in path.name for part in _NOT):
            folders.setdefault(path, []).append(folder)
    found = []
    for path, inside in folders.items():
        image = png_package / PNG_ROOT / path.relative_to(root).with_suffix(".png")
        if path.stat().st_size > MAX_SVG_BYTES or not image.is_file():
            continue
        item = _described(path, image, inside)
        if item is not None:
            found.append(item)
    return found


def _described(path: Path, image: Path, folders: list[str]) -> ClipArt | None:
    title, subjects = read_words(path.read_text(encoding="utf-8", errors="replace"))
    if any(part in subject for subject in subjects for part in _NOT_SUBJECTS) or _NOT_WHOLE_SUBJECTS & set(subjects):
        return None
    words = [s for s in subjects if s not in _SAYS_NOTHING and len(s) <= _LONGEST_SUBJECT and not s.startswith("0x")]
    plain = clean_title(title)
    if plain in _TITLES_OF_SERIES or "submission" in plain or "sibmission" in plain:
        plain = " ".join(words[:2])
    if not plain:
        return None
    if any(folder.rsplit("/", 1)[-1] == "people" for folder in folders):
        words.append("person")
    return ClipArt(image, plain, tuple(dict.fromkeys(words)))


def read_words(svg: str) -> tuple[str, list[str]]:
    """Title and lower-case subjects of an SVG text's metadata; empty where it has none.

    Example:
        >>> read_words("<metadata><dc:title>A Cat</dc:title><dc:subject><rdf:li>Pet</rdf:li></dc:subject></metadata>")
        ('A Cat', ['pet'])
    """
    metadata = _METADATA.search(svg)
    if metadata is None:
        return "", []
    title, bag = _TITLE.search(metadata[0]), _SUBJECT.search(metadata[0])
    subjects = [html.unescape(item).strip().lower() for item in _ITEM.findall(bag[1])] if bag else []
    return html.unescape(title[1]).strip() if title else "", [subject for subject in subjects if subject]


def clean_title(title: str) -> str:
    """A title without numbers, underscores and its series' name.

    Example:
        >>> clean_title("Clipart by Nicu Buculei - head_1")
        'head'
    """
    text = title.lower().replace("_", " ")
    text = re.sub(r"clipart by nicu buculei\s*-?", "", text)
    text = re.sub(r"[#\d]+", " ", text)
    return re.sub(r"\s+", " ", text).strip(" -|.")


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
