"""Clip art with what its authors called it: titles and subjects from the SVG files, images from their PNG twins."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path

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
