"""Finds each style's image of a concept inside its package: an SVG text or a raster file."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from invariclip.bench.studies.stylebench.photographs import reviewed_photographs
from invariclip.bench.studies.stylebench.sources import STYLES, Style

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


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
