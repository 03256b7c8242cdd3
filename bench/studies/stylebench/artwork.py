"""The concepts, and each style's image of them inside its package: an SVG text or a raster file.

A concept is what is drawn in several styles; `Concept.split` says what an encoder or a projection may learn from it.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

from invariclip.bench.studies.stylebench.sources import STYLES, Style

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@cache
def reviewed_photographs() -> dict[str, str]:
    """Hexcode by file, relative to the stamps' folder; one file a concept, looked at one by one."""
    text = resources.files(__package__).joinpath("photographs.json").read_text(encoding="utf-8")
    return {file: hexcode for hexcode, file in json.loads(text)["photographs"].items()}


Split = Literal["train", "calibrate", "test"]

GROUPS = ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities")
"""Things that can be seen; faces, people, symbols and flags are left out."""

COMMON_STYLES = (
    "noto",
    "twemoji",
    "fluent-flat",
    "fluent-3d",
    "fluent-high-contrast",
    "openmoji",
    "openmoji-black",
)
"""A concept counts only if all of these draw it, so that every style is asked the same question."""

SPLIT_SEED = "stylebench-1"
_CLOCK_FACE = re.compile(r"o.clock$|-thirty$")


@dataclass(frozen=True)
class Concept:
    """One thing that is drawn in several styles.

    Attributes:
        hexcode: Its code points, as `hexcode_of` writes them.
        name: The English CLDR name.
        group: One of `GROUPS`.
        keywords: Other English words for it, without the name itself.
        split: What an encoder or a projection may learn from it.
    """

    hexcode: str
    name: str
    group: str
    keywords: tuple[str, ...]
    split: Split


def split_of(hexcode: str) -> Split:
    """Splits concepts 80/10/10 by a seeded hash, so that a concept's place never depends on which others exist.

    "train": an encoder learns from it. "calibrate": no encoder does, a projection may. "test": nothing is fitted on it.
    """
    digest = hashlib.sha256(f"{SPLIT_SEED}:{hexcode}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if share < 0.8 else "calibrate" if share < 0.9 else "test"


def image_split(style: str, concept: Split) -> Split:
    """The split of one image: "test" in a held-out style, whatever its concept; else the concept's."""
    return "test" if STYLES[style].held_out else concept


def read_concepts(packages: Mapping[str, Path]) -> dict[str, Concept]:
    """All concepts of `GROUPS` by hexcode, clock faces left out, whether or not every style draws them.

    Args:
        packages: Unpacked folder by package key.
    """
    table: dict[str, dict[str, Any]] = json.loads(
        (packages["names"] / "data-by-emoji.json").read_text(encoding="utf-8")
    )
    words: dict[str, list[str]] = json.loads(
        (packages["keywords"] / "dist" / "emoji-en-US.json").read_text(encoding="utf-8")
    )
    concepts: dict[str, Concept] = {}
    for emoji, entry in table.items():
        # twenty-four faces of a clock differ by the hands alone
        if entry["group"] not in GROUPS or _CLOCK_FACE.search(entry["name"]):
            continue
        code = hexcode_of("-".join(f"{ord(character):04x}" for character in emoji))
        name = entry["name"]
        concepts[code] = Concept(code, name, entry["group"], clean_words(words.get(emoji, []), name), split_of(code))
    return concepts


def clean_words(words: list[str], name: str) -> tuple[str, ...]:
    """Keywords as a caption would say them: no underscores, emoticons or repetition of the name."""
    plain = dict.fromkeys(word.replace("_", " ").strip().lower() for word in words)
    return tuple(w for w in plain if w != name.lower() and re.fullmatch(r"[a-z][a-z0-9 '-]+", w))


def common_concepts(concepts: Mapping[str, Concept], drawn: Mapping[str, Mapping[str, object]]) -> dict[str, Concept]:
    """The concepts that every one of `COMMON_STYLES` draws.

    Args:
        concepts: By hexcode.
        drawn: For each style, something by hexcode.
    """
    return {code: c for code, c in concepts.items() if all(code in drawn[style] for style in COMMON_STYLES)}


@dataclass(frozen=True)
class Artwork:
    """One style's image of one concept, before rendering: exactly one of the two is set.

    Attributes:
        svg: The complete SVG document.
        path: A raster or SVG file.
    """

    svg: str | None = None
    path: Path | None = None


def hexcode_of(codepoints: str) -> str:
    """Lower-case code points joined by hyphens, without the variation selector that only asks for colour."""
    return "-".join(part for part in codepoints.lower().split("-") if part != "fe0f")


def slug_of(name: str) -> str:
    """The iconify icon name of a CLDR name: ASCII words joined by hyphens.

    Example:
        >>> slug_of("piñata"), slug_of("woman’s hat")
        ('pinata', 'womans-hat')
    """
    ascii_only = unicodedata.normalize("NFKD", name.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only.replace("'", "")).strip("-")


class IconSet:
    """An iconify package: `icons.json` with SVG bodies and aliases, `chars.json` with code points where it has one."""

    def __init__(self, folder: Path) -> None:
        self._data: dict[str, Any] = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        self._parents: dict[str, str] = {
            alias: entry["parent"] for alias, entry in self._data.get("aliases", {}).items()
        }
        characters: dict[str, str] = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
        self.by_code: dict[str, str] = {hexcode_of(code): name for code, name in characters.items()}

    def root(self, name: str) -> str | None:
        """The icon that a name or alias stands for, or None when the set has no such name."""
        while name in self._parents:
            name = self._parents[name]
        return name if name in self._data["icons"] else None

    def svg(self, name: str) -> str:
        """The complete SVG document of an icon."""
        icon = self._data["icons"][name]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", self._data.get("width", 16))
        height = icon.get("height", self._data.get("height", 16))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )


def name_aliases(sets: Mapping[str, IconSet], names: Mapping[str, str]) -> dict[str, str]:
    """Icon names that mean exactly one concept: CLDR slugs, and the older names that other sets keep as aliases.

    EmojiOne has no code points and names that CLDR has since changed ("direct hit" is "bullseye" now). A set that does
    have code points and still lists the old name as an alias says what it means. Names on which sets disagree are out.

    Args:
        sets: Icon sets by style.
        names: CLDR name by hexcode.
    """
    meanings: dict[str, set[str]] = {}
    for icons in sets.values():
        code_of_root = {icons.root(name): code for code, name in icons.by_code.items() if code in names}
        for alias in (*icons._parents, *(root for root in code_of_root if root)):
            code = code_of_root.get(icons.root(alias))
            if code is not None:
                meanings.setdefault(alias, set()).add(code)
    found = {alias: codes.pop() for alias, codes in meanings.items() if len(codes) == 1}
    # the CLDR name itself outranks whatever a set calls its icons
    return found | {slug_of(name): code for code, name in names.items()}


def find_artwork(packages: Mapping[str, Path], names: Mapping[str, str]) -> dict[str, dict[str, Artwork]]:
    """All artwork of the named concepts.

    Args:
        packages: Unpacked folder by package key.
        names: CLDR name by hexcode; nothing else is looked for.

    Returns:
        For each style: artwork by hexcode.
    """
    sets = {s.name: IconSet(packages[s.package]) for s in STYLES.values() if s.reader == "iconify"}
    aliases = name_aliases(sets, names)
    found: dict[str, dict[str, Artwork]] = {}
    for style in STYLES.values():
        if style.reader == "iconify":
            found[style.name] = _from_icons(sets[style.name], names, aliases)
        elif style.reader == "folder":
            found[style.name] = _from_folder(packages[style.package], style, names)
        else:
            base = packages[style.package] / style.folder
            images = {code: base / file for file, code in reviewed_photographs().items()}
            found[style.name] = {code: Artwork(path=path) for code, path in images.items() if code in names}
    return found


def _from_icons(icons: IconSet, names: Mapping[str, str], aliases: Mapping[str, str]) -> dict[str, Artwork]:
    chosen: dict[str, str] = {}
    if icons.by_code:
        wanted = {code: name for code, name in icons.by_code.items() if code in names}
    else:
        by_slug = {code: slug for slug, code in aliases.items() if icons.root(slug)}
        wanted = by_slug | {code: slug_of(name) for code, name in names.items() if icons.root(slug_of(name))}
    for code, name in wanted.items():
        root = icons.root(name)
        if root is not None:
            chosen[code] = root
    return {code: Artwork(svg=icons.svg(root)) for code, root in chosen.items()}


def _from_folder(package: Path, style: Style, names: Mapping[str, str]) -> dict[str, Artwork]:
    files = sorted((package / style.folder).iterdir())
    by_code = {hexcode_of(path.stem): path for path in files if path.suffix in {".svg", ".webp", ".png"}}
    return {code: Artwork(path=path) for code, path in by_code.items() if code in names}
